"""Aspect-ratio buckets: pictures of like shape train together, cut as little as possible, and SDXL is told how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hypersd_bench.errors import InputError

STEP = 64  # pixels between the sides of two buckets, as in SDXL
AREA = 0.9  # of the target area that a bucket must exceed: with STEP 64 at 1024 px this is SDXL's own table


class Bucket(NamedTuple):
    """A training size in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class Fit(NamedTuple):
    """How a stored picture becomes one of a bucket: scaled to (width, height), then cut at (left, top), pixels."""

    original: tuple[int, int]  # width, height as stored
    width: int
    height: int
    left: int
    top: int
    bucket: Bucket

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's size conditioning: original height and width, top and left of the cut, target height and width."""
        width, height = self.original
        return (height, width, self.top, self.left, self.bucket.height, self.bucket.width)


def make_buckets(resolution: int, step: int = STEP) -> tuple[Bucket, ...]:
    """Sizes of at most ``resolution`` squared pixels and little less, sides in steps, from 1:4 to 4:1.

    At 1024 px and 64 px steps: the table of SDXL (arXiv 2307.01952, appendix I).
    """
    if resolution % step:
        near = max(step, round(resolution / step) * step)
        raise InputError(f"resolution {resolution} is no multiple of {step} pixels; {near} would be")
    sides = range(math.ceil(resolution / 2 / step) * step, 2 * resolution + 1, step)
    area = resolution**2
    found: dict[float, Bucket] = {}
    for bucket in (Bucket(width, height) for width in sides for height in sides):
        pixels = bucket.width * bucket.height
        aspect = bucket.width / bucket.height
        if AREA * area < pixels <= area and pixels > math.prod(found.get(aspect, (0, 0))):
            found[aspect] = bucket
    return tuple(found[aspect] for aspect in sorted(found))


def assign(buckets: Sequence[Bucket], width: NDArray[np.int32], height: NDArray[np.int32]) -> NDArray[np.int64]:
    """The bucket of nearest aspect ratio, by its logarithm, of each picture; ``buckets`` sorted as ``make_buckets``."""
    aspects = np.log([bucket.width / bucket.height for bucket in buckets])
    borders = (aspects[1:] + aspects[:-1]) / 2
    return np.searchsorted(borders, np.log(width / height))


def group(
    buckets: Sequence[Bucket],
    indices: NDArray[np.int64],
    width: NDArray[np.int32],
    height: NDArray[np.int32],
    smallest: int,
) -> dict[Bucket, NDArray[np.int64]]:
    """The images of each bucket that has at least ``smallest``; those of rarer shapes go to the nearest that has.

    A bucket smaller than a batch would fill it with the same pictures again. Where no bucket is large enough, all
    images go to the one with most.
    """
    found = assign(buckets, width, height)
    counts = np.bincount(found, minlength=len(buckets))
    kept = [bucket for bucket, count in zip(buckets, counts, strict=True) if count >= smallest]
    if not kept:
        kept = [buckets[int(counts.argmax())]]
    found = assign(kept, width, height)
    groups = {bucket: indices[found == i] for i, bucket in enumerate(kept)}
    return {bucket: members for bucket, members in groups.items() if len(members)}


def fit(size: tuple[int, int], bucket: Bucket, place: tuple[float, float] = (0.5, 0.5)) -> Fit:
    """Scale a picture of ``size`` (width, height) to cover a bucket and cut it at ``place`` in [0, 1]^2 of the room.

    ``place`` is (horizontal, vertical); (0.5, 0.5) is the centre.
    """
    scale = max(bucket.width / size[0], bucket.height / size[1])
    width, height = max(bucket.width, round(size[0] * scale)), max(bucket.height, round(size[1] * scale))
    left, top = int((width - bucket.width) * place[0]), int((height - bucket.height) * place[1])
    return Fit(size, width, height, left, top, bucket)


def cut(image: Image.Image, how: Fit) -> NDArray[np.uint8]:
    """Scale (Lanczos) and cut a picture: (bucket height, bucket width, 3) uint8."""
    scaled = image if image.size == (how.width, how.height) else image.resize(
        (how.width, how.height), Image.Resampling.LANCZOS
    )  # fmt: skip
    box = (how.left, how.top, how.left + how.bucket.width, how.top + how.bucket.height)
    return np.asarray(scaled.crop(box), np.uint8)


def cut_mask(mask: NDArray[np.bool_], how: Fit) -> NDArray[np.bool_]:
    """The same for a mask: a pixel belongs to the object where at least half of it does."""
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    scaled = grey.resize((how.width, how.height), Image.Resampling.BOX)
    box = (how.left, how.top, how.left + how.bucket.width, how.top + how.bucket.height)
    result: NDArray[np.bool_] = np.asarray(scaled.crop(box)) >= 128
    return result
