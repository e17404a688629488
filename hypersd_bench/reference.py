"""The reference that set metrics compare a run's images with: a folder of images, statistics from a file, or renders.

A reference's id names its content: where it comes from, how many images, and the start of a hash over all of them.
Features of it are computed once for each extractor and kept in this machine's cache; none are shipped.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hypersd_bench.cache import own_cache
from hypersd_bench.contracts import Extractor, ReferenceMoments
from hypersd_bench.errors import InputError, first_line
from hypersd_bench.features import Reference, load_reference, save_reference
from hypersd_bench.provenance import sha256
from hypersd_bench.store import write_bytes

if TYPE_CHECKING:
    from torch import Tensor

Picture = NDArray[np.uint8]  # (H, W, 3), RGB
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
NUM_RENDERS = 512
NO_REFERENCE = "needs a reference: give --reference FOLDER of real images"
FIRST_RENDER_SEED = 10_000_000  # trainings draw from 0, prompt sets from 20 000 000
BATCH_SIZE = 32


class ReferenceSet(Protocol):
    """A reference before its features are known."""

    @property
    def id(self) -> str:
        """What names it: ``photographs-5000-1a2b3c4d``."""
        ...

    @property
    def num_images(self) -> int:
        """How many images pass an extractor for it."""
        ...

    def features(self, extractor: Extractor) -> Reference:
        """Its features under an extractor; computed once on this machine. Raises InputError for a broken image."""
        ...


@dataclass(frozen=True)
class FolderReference:
    """The centre squares of a folder's images, in order of name, grey and RGBA converted to RGB."""

    folder: Path

    @cached_property
    def paths(self) -> list[Path]:
        """Its images."""
        return image_paths(self.folder)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over its images' own, in order; names don't count. Remembered until a size or time changes."""
        stats = ((path.name, path.stat()) for path in self.paths)
        listing = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
        key = hashlib.sha256(f"{self.folder.resolve()}\n{listing}".encode()).hexdigest()
        known = _cache() / "digests" / key
        with suppress(OSError, ValueError):
            if re.fullmatch("[0-9a-f]{64}", text := known.read_text(encoding="ascii")):
                return text
        found = hashlib.sha256("".join(map(sha256, self.paths)).encode()).hexdigest()
        with suppress(InputError):  # it is hashed again the next time
            write_bytes(known, found.encode("ascii"))
        return found

    @property
    def id(self) -> str:
        """What names it."""
        return f"{self.folder.name}-{len(self.paths)}-{self.digest[:8]}"

    @property
    def num_images(self) -> int:
        """How many images it has."""
        return len(self.paths)

    def features(self, extractor: Extractor) -> Reference:
        """Its features under an extractor."""
        pictures = (_square(read_picture(path)) for path in self.paths)
        return _cached(self.id, self.digest, extractor, pictures, len(self.paths))


@dataclass(frozen=True)
class RendersReference:
    """Fresh renders of the miniature's held-out captions: 512 scenes of 64 pixels.

    The captions are those of the prompts, so that a distance is about pictures and not about which captions occur.
    """

    @cached_property
    def pictures(self) -> list[Picture]:
        """The renders, the captions in turn, each time anew."""
        from hypersd_bench.pocket.prompts import held_out_prompts
        from hypersd_bench.pocket.scenes import Scene, parse_caption, render

        captions = [prompt.text for prompt in held_out_prompts().prompts]
        seeds = range(FIRST_RENDER_SEED, FIRST_RENDER_SEED + NUM_RENDERS)
        return [render(Scene(*parse_caption(captions[i % len(captions)]), seed)).image for i, seed in enumerate(seeds)]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the pixels."""
        return hashlib.sha256(b"".join(picture.tobytes() for picture in self.pictures)).hexdigest()

    @property
    def id(self) -> str:
        """What names it."""
        return f"held-out-renders-{len(self.pictures)}-{self.digest[:8]}"

    @property
    def num_images(self) -> int:
        """How many are rendered."""
        return NUM_RENDERS

    def features(self, extractor: Extractor) -> Reference:
        """Its features under an extractor."""
        return _cached(self.id, self.digest, extractor, iter(self.pictures), len(self.pictures))


@dataclass(frozen=True)
class StatisticsReference:
    """Mean and covariance from a .npz as pytorch-fid and MLPerf publish them (``mu``, ``sigma``, perhaps ``n``).

    extractor: the features they are of, from a key ``features`` in the file or from ``FILE.npz=inception/pytorch-fid``;
    the file's numbers alone don't tell, and those of another convention are refused.
    """

    path: Path
    extractor: str = ""

    @cached_property
    def _read(self) -> tuple[ReferenceMoments, str]:
        try:
            # opened here: where a zip is broken, numpy leaves it open
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
                mean, covariance = (np.asarray(saved[name], np.float64) for name in ("mu", "sigma"))
                n = int(np.asarray(saved["n"]).item()) if "n" in saved else 0
                own = str(saved["features"]) if "features" in saved else ""
        except FileNotFoundError:
            raise InputError(f"{self.path}: no such file; a reference is a folder of images or a .npz") from None
        except (OSError, ValueError, TypeError, AttributeError, KeyError, EOFError, BadZipFile,
                NotImplementedError) as error:  # fmt: skip
            raise InputError(
                f"{self.path} holds no statistics that can be read: it must be a .npz with arrays mu and sigma"
            ) from error
        d = len(mean) if mean.ndim == 1 else 0
        if not d or covariance.shape != (d, d) or not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise InputError(f"{self.path}: mu must be (d,) and sigma (d, d), finite, not {mean.shape} and "
                             f"{covariance.shape}")  # fmt: skip
        if own and self.extractor not in ("", own):
            raise InputError(f"{self.path} says that it is of {own}, not of {self.extractor}")
        return ReferenceMoments(n, mean, covariance), own or self.extractor

    @property
    def id(self) -> str:
        """What names it."""
        moments, _ = self._read
        return f"{self.path.stem}-{moments.n or 'statistics'}-{sha256(self.path)[:8]}"

    @property
    def num_images(self) -> int:
        """None: only their statistics are here."""
        return 0

    def features(self, extractor: Extractor) -> Reference:
        """The statistics, for the extractor that they are of; InputError for any other."""
        moments, own = self._read
        if not own:
            raise InputError(f"{self.path} does not say which features its statistics are of; if they are, say "
                             f"--reference {self.path}={extractor.id}")  # fmt: skip
        if own != extractor.id:
            raise InputError(f"{self.path} is of {own}, not of {extractor.id}: statistics of one convention say "
                             "nothing in another; give a folder of images, or a metric of that convention")  # fmt: skip
        return Reference(self.id, moments)


def open_reference(given: Path | None, scenes: bool) -> ReferenceSet | None:
    """The reference for what a user gave: a folder, ``FILE.npz`` or ``FILE.npz=EXTRACTOR``.

    None given: the miniature's renders where the images are of its ``scenes``, else none. Raises InputError for what
    can't be one.
    """
    if given is None:
        return RendersReference() if scenes else None
    name, _, extractor = str(given).partition(".npz=")
    if extractor or given.suffix == ".npz":
        found = StatisticsReference(Path(f"{name.removesuffix('.npz')}.npz"), extractor)
        _ = found.id  # read, and refused if it is none
        return found
    image_paths(given)
    return FolderReference(given)


def image_paths(folder: Path) -> list[Path]:
    """List a reference folder's images in order of name; InputError for no folder, or one of fewer than two."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a reference is a folder of images")
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(paths) < 2:
        raise InputError(f"{folder}: a reference set needs at least two images ({', '.join(IMAGE_SUFFIXES)})")
    return paths


def read_picture(path: Path) -> Picture:
    """Read an image as (H, W, 3) uint8 RGB, grey and RGBA converted; InputError for a broken file."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a PNG's chunks
        raise InputError(f"can't read image {path} ({first_line(error)}); remove or replace it") from error


def stack(pictures: Sequence[Picture]) -> Tensor:
    """Images of one size as (N, 3, H, W) uint8."""
    import torch

    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _square(picture: Picture) -> Picture:
    """The centre square."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = round((height - side) / 2), round((width - side) / 2)  # as torchvision's center_crop
    return picture[top : top + side, left : left + side]


def _cached(name: str, digest: str, extractor: Extractor, pictures: Iterator[Picture], total: int) -> Reference:
    """Features of a reference, from this machine's cache where it has them."""
    from tqdm import tqdm

    kept = _cache() / extractor.id.replace("/", "_") / f"{digest[:32]}-{extractor.fingerprint[:32]}.npz"
    found = None
    with suppress(InputError):  # a broken cache costs time
        found = load_reference(kept, extractor.fingerprint)
    if found is None:
        bar = tqdm(pictures, total=total, desc=f"{extractor.id} reference", unit="image")
        features = np.concatenate([extractor(stack(batch)) for batch in _same_size(bar)])
        found = Reference(name, features)
        with suppress(InputError):  # a full or read-only cache costs time the next time, no more
            save_reference(kept, extractor.fingerprint, found)
    return Reference(name, found.values)  # the same images under another folder's name


def _same_size(pictures: Iterator[Picture]) -> Iterator[list[Picture]]:
    """Batches in order; a batch ends where the size changes, so nothing is resized but by the extractor."""
    for _, run in groupby(pictures, key=lambda picture: picture.shape):
        while batch := list(islice(run, BATCH_SIZE)):
            yield batch


def _cache() -> Path:
    return own_cache() / "references"
