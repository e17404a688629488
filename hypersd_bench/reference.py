"""The folder of images that set metrics compare a run's images with."""

from __future__ import annotations

from pathlib import Path

from hypersd_bench.errors import InputError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def image_paths(folder: Path) -> list[Path]:
    """List a reference folder's images in order of name; InputError for no folder, or one of fewer than two."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a reference is a folder of images")
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(paths) < 2:
        raise InputError(f"{folder}: a reference set needs at least two images ({', '.join(IMAGE_SUFFIXES)})")
    return paths
