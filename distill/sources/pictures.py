"""Pictures, or prompts alone, as training data: filtered, put in buckets, cut, encoded; broken ones are replaced."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.batch import Batch, Instances
from distill.sources.buckets import STEP, Bucket, Fit, cut, fit, group, make_buckets
from distill.sources.cache import CacheFolder, Encoded, LatentCache, PromptCache, Shard, dtype_of
from distill.sources.contract import SampleError, Source
from distill.sources.encoding import Encoder
from distill.sources.filters import Filters, sift
from distill.sources.images import sharpness
from distill.sources.loading import Loaded, finished
from distill.sources.objects import instances_of
from distill.sources.order import Plan, Slot
from hypersd_bench.errors import InputError, unknown_name

LISTED = 20  # broken samples that a report names
CROPS = ("center", "random")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What to train on, and how it is prepared.

    source: as ``open_source`` takes it. scenes: size of the pool of scenes. resolution: side of a square image in
    pixels; the base's own by default. square: centre cuts alone, as the papers have it, no buckets. bucket_step:
    pixels between buckets. smallest_bucket: rarer shapes join the nearest bucket; give the images of a batch's part.
    crop: where a picture is cut, ``center`` or, by the seed, ``random``. max_broken: share of the samples that may be
    unusable; one may always be, unless it is 0. workers: threads that decode. cache_latents, cache_prompts: keep what
    is encoded, in ``cache_precision``; a random cut is then drawn once per image instead of once per epoch.
    """

    source: str = "scenes"
    seed: int = 0
    scenes: int = 8192
    resolution: int | None = None
    square: bool = False
    bucket_step: int = STEP
    smallest_bucket: int = 1
    crop: str = "center"
    filters: Filters = field(default_factory=Filters)
    max_broken: float = 0.01
    workers: int = 4
    image_column: str | None = None
    caption_column: str | None = None
    split: str = "train"
    cache_latents: bool = False
    cache_prompts: bool = False
    cache_precision: str = "bf16"

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise unknown_name("crop", self.crop, CROPS)
        if self.square and self.crop != "center":
            raise InputError("square images are cut at the centre; leave out either square or the random crop")
        if not 0 <= self.max_broken < 1:
            raise InputError(f"max_broken is {self.max_broken}; give a share from 0 to below 1")
        dtype_of(self.cache_precision)


class Filtered(SampleError):
    """A picture that a filter takes once it is decoded; the message is the filter's name."""


class Ready(NamedTuple):
    """A picture ready for its batch: pixels (H, W, 3) uint8 or a latent (C, h, w), and its size ids."""

    sample: int
    pixels: Tensor | None
    latent: Tensor | None
    time_ids: tuple[int, ...]
    instances: Instances | None


class PictureData:
    """The samples of a source under a base's encoders. Prompts alone are one bucket without pixels."""

    def __init__(self, source: Source, encoder: Encoder, settings: DataSettings, cache: Path | None = None) -> None:
        self.source, self._encoder, self._settings = source, encoder, settings
        self.has_images, self.has_instances = source.has_images, source.has_instances
        resolution = settings.resolution or encoder.resolution
        side = resolution // encoder.factor
        self.latent_shape = (encoder.latent_shape[0], side, side)
        self._lock = Lock()
        self.broken = dict(source.catalogue.broken)
        self._blurred: dict[int, str] = {}
        self._check_captions()
        self._check_broken()
        kept, self._filtered = sift(source.catalogue, settings.filters if self.has_images else Filters(), source.name)
        if not len(kept):
            taken = ", ".join(f"{name} takes {count}" for name, count in self._filtered.items() if count)
            raise InputError(f"data {source.name!r}: no sample is left of {len(source.catalogue)} ({taken or 'none'})")
        self._groups = self._group(kept, resolution)
        self._pool = ThreadPoolExecutor(settings.workers, "decode") if settings.workers > 1 else None
        self._plan = lru_cache(maxsize=8)(self._new_plan)
        self._latents = self._open_latents(cache) if settings.cache_latents and self.has_images else None
        self._prompts = self._open_prompts(cache, kept) if settings.cache_prompts else None

    def batch(self, position: int, size: int) -> Batch:
        """The ``size`` images that follow after ``position`` images seen."""
        return self.finish(self.load(position, size))

    def load(self, position: int, size: int) -> Loaded:
        """Decode and cut the pictures of a batch, or read their latents."""
        plan = self._plan(size)
        slots = plan.slots(position)
        pick = self._pool.map if self._pool and self._latents is None and self.has_images else map
        ready = list(pick(lambda slot: self._ready(plan, slot), slots))
        catalogue = self.source.catalogue
        prompts = [catalogue.captions[item.sample] for item in ready]
        pixels = [item.pixels for item in ready if item.pixels is not None]
        latents = [item.latent for item in ready if item.latent is not None]
        instances = [item.instances for item in ready if item.instances is not None]
        return Loaded(
            ids=[catalogue.ids[item.sample] for item in ready],
            prompts=prompts,
            time_ids=torch.tensor([item.time_ids for item in ready]),
            pixels=torch.stack(pixels) if pixels else None,
            latents=torch.stack(latents) if latents else None,
            embeddings=self._prompts.get(prompts) if self._prompts else None,
            instances=instances if self.has_instances else None,
        )

    def finish(self, loaded: Loaded) -> Batch:
        """Put a batch onto the device and encode what is not encoded yet."""
        return finished(loaded, self._encoder, self.latent_shape)

    def report(self) -> dict[str, Any]:
        """Counts so far: what only decoding tells is known of the pictures decoded, with a cache of all."""
        with self._lock:
            broken, blurred = sorted(self.broken.items()), list(self._blurred.values())
        decoded = {name: blurred.count(name) for name in sorted(set(blurred))}
        if self.has_images and self._settings.filters.min_sharpness is not None:
            decoded.setdefault("min_sharpness", 0)
        filtered = {name: self._filtered.get(name, 0) + decoded.get(name, 0) for name in {**self._filtered, **decoded}}
        total = len(self.source.catalogue)
        return {
            "source": self.source.name,
            "total": total,
            "used": total - len(broken) - sum(filtered.values()),
            "filtered": filtered,
            "broken": {
                "count": len(broken),
                "allowed": self._allowed(),
                "first": [[self.source.catalogue.ids[i], reason] for i, reason in broken[:LISTED]],
            },
            "buckets": {str(bucket): len(members) for bucket, members in self._groups.items()},
            "prompts_over_limit": len(self._encoder.too_long),
        }

    # which pictures

    def _group(self, kept: np.ndarray[Any, np.dtype[np.int64]], resolution: int) -> dict[Bucket, Any]:
        settings, catalogue = self._settings, self.source.catalogue
        if settings.square or not self.has_images:
            if resolution % self._encoder.factor:
                raise InputError(f"resolution {resolution} is no multiple of {self._encoder.factor} pixels")
            return {Bucket(resolution, resolution): kept}
        if settings.bucket_step % self._encoder.factor:
            raise InputError(f"bucket_step {settings.bucket_step} is no multiple of {self._encoder.factor} pixels")
        width = np.maximum(catalogue.numbers("width")[kept], 1)  # an unknown size counts as square
        height = np.maximum(catalogue.numbers("height")[kept], 1)
        buckets = make_buckets(resolution, settings.bucket_step)
        return group(buckets, kept, width, height, settings.smallest_bucket)

    def _new_plan(self, size: int) -> Plan:
        return Plan(list(self._groups.values()), list(self._groups), self._settings.seed, size)

    def _ready(self, plan: Plan, slot: Slot) -> Ready:
        """The picture of a slot, or the next in its bucket's order that can be used."""
        bucket = list(self._groups)[slot.bucket]
        for skipped in range(len(plan.members[slot.bucket])):
            index = plan.candidate(slot, skipped)
            if index in self.broken or index in self._blurred:
                continue
            try:
                return self._prepare(index, bucket, slot.epoch)
            except SampleError as error:
                self._note(index, error)
        raise InputError(f"data {self.source.name!r}: no usable image is left in bucket {bucket}; {self._counts()}")

    def _prepare(self, index: int, bucket: Bucket, epoch: int) -> Ready:
        if not self.has_images:
            return Ready(index, None, None, (bucket.height, bucket.width, 0, 0, bucket.height, bucket.width), None)
        if self._latents is not None:
            stored = self._latents.get(index)
            ids = tuple(stored.time_ids.tolist())
            how = fit((ids[1], ids[0]), bucket, self._place(index, 0))
            return Ready(index, None, stored.latent, ids, self._instances(index, how))
        how, pixels = self._cut(index, bucket, epoch)
        return Ready(index, pixels, None, how.time_ids, self._instances(index, how))

    def _cut(self, index: int, bucket: Bucket, epoch: int) -> tuple[Fit, Tensor]:
        image, filters = self.source.image(index), self._settings.filters
        if filters.min_side is not None and min(image.size) < filters.min_side:
            raise Filtered("min_side")  # the metadata had said otherwise
        how = fit(image.size, bucket, self._place(index, epoch))
        pixels = cut(image, how)
        if filters.min_sharpness is not None and sharpness(pixels) < filters.min_sharpness:
            raise Filtered("min_sharpness")
        return how, torch.from_numpy(pixels.copy())

    def _place(self, index: int, epoch: int) -> tuple[float, float]:
        if self._settings.crop == "center":
            return (0.5, 0.5)
        x, y = np.random.default_rng([self._settings.seed, index, epoch, 2]).random(2)
        return (float(x), float(y))

    def _instances(self, index: int, how: Fit) -> Instances | None:
        return instances_of(self.source.objects(index), how) if self.has_instances else None

    # what can't be used

    def _note(self, index: int, error: SampleError) -> None:
        with self._lock:
            if isinstance(error, Filtered):
                self._blurred[index] = str(error)
                return
            self.broken[index] = str(error)
        self._check_broken()

    def _allowed(self) -> int:
        share = self._settings.max_broken
        return max(1, int(share * len(self.source.catalogue))) if share else 0

    def _check_broken(self) -> None:
        if len(self.broken) > self._allowed():
            raise InputError(
                f"data {self.source.name!r}: {self._counts()}; mend or remove them, or raise max_broken "
                f"(now {self._settings.max_broken:g})"
            )

    def _check_captions(self) -> None:
        captions = sum(reason == "no caption" for reason in self.broken.values())
        if captions and captions == len(self.source.catalogue):
            raise InputError(
                f"data {self.source.name!r}: none of the {captions} samples has a caption; add them, or name the "
                "column or field that holds them (caption_column)"
            )

    def _counts(self) -> str:
        with self._lock:
            index, reason = min(self.broken.items(), default=(0, "none"))
        total = len(self.source.catalogue)
        name = self.source.catalogue.ids[index] if self.broken else "none"
        return f"{len(self.broken)} of {total} samples can't be used, the first is {name} ({reason})"

    # what is kept

    def _open_latents(self, cache: Path | None) -> LatentCache:
        settings = self._settings
        assert cache is not None, "a cache needs a folder"
        identity = {
            "autoencoder": self._encoder.image_hash,
            "source": self.source.fingerprint,
            "resolution": self.latent_shape[1] * self._encoder.factor,
            "bucket step": 0 if settings.square else settings.bucket_step,
            "smallest bucket": 0 if settings.square else settings.smallest_bucket,
            "crop": settings.crop if settings.crop == "center" else f"{settings.crop} by seed {settings.seed}",
            **{name.replace("_", " "): value for name, value in asdict(settings.filters).items()},
            "precision": settings.cache_precision,
        }
        folder = CacheFolder(cache, "latents", identity)
        latents = LatentCache(
            folder, self._groups, self.latent_shape[0], self._encoder.factor, settings.cache_precision
        )
        for index, (kind, reason) in latents.unusable.items():
            self._note(index, Filtered(reason) if kind == "filtered" else SampleError(reason))
        latents.build(self._encode_shard)
        return latents

    def _encode_shard(self, shard: Shard) -> tuple[Iterator[Encoded], dict[int, tuple[str, str]]]:
        unusable: dict[int, tuple[str, str]] = {}

        def attempt(index: int) -> tuple[int, Fit, Tensor] | SampleError:
            try:
                self._instances_readable(index)
                return (index, *self._cut(index, shard.bucket, 0))
            except SampleError as error:
                self._note(index, error)
                unusable[index] = ("filtered" if isinstance(error, Filtered) else "broken", str(error))
                return error

        def parts() -> Iterator[Encoded]:
            step = self._encoder.image_batch
            for first in range(0, len(shard.indices), step):
                indices = [int(i) for i in shard.indices[first : first + step]]
                tried = self._pool.map(attempt, indices) if self._pool else map(attempt, indices)
                found = [item for item in tried if not isinstance(item, SampleError)]
                if found:
                    latents = self._encoder.latents(torch.stack([pixels for _, _, pixels in found]))
                    if not latents.isfinite().all():
                        raise InputError(
                            f"data {self.source.name!r}: the base's autoencoder gives latents that are not finite in "
                            f"{self._encoder.pipe.vae.dtype}; load it in float32"
                        )
                    ids = torch.tensor([how.time_ids for _, how, _ in found])
                    yield Encoded([index for index, _, _ in found], latents, ids)

        return parts(), unusable

    def _instances_readable(self, index: int) -> None:
        """Raise SampleError where the objects are broken: with a cache that must be known while it is built."""
        if self.has_instances:
            self.source.objects(index)

    def _open_prompts(self, cache: Path | None, kept: Sequence[int] | Any) -> PromptCache:
        assert cache is not None, "a cache needs a folder"
        captions = self.source.catalogue.captions
        distinct = list(dict.fromkeys(captions[int(i)] for i in kept))
        identity = {
            "text encoders": self._encoder.prompt_hash,
            "prompts": hashlib.sha256("\n".join(distinct).encode()).hexdigest(),
            "precision": self._settings.cache_precision,
        }
        return PromptCache(
            CacheFolder(cache, "prompts", identity), distinct, self._encoder, self._settings.cache_precision
        )
