"""Stored pictures to pixels, and their measures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from distill.sources.contract import SampleError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_PIL_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def size_of(data: bytes | BinaryIO | Path) -> tuple[int, int]:
    """Width and height of a stored picture as it is to be seen, from its header alone; raises SampleError."""
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            # to look for one behind the pixels, as a PNG may have it, would decode them all
            silent = image.format == "PNG" and "exif" not in image.info
            turned = not silent and image.getexif().get(ExifTags.Base.Orientation) in _TURNED
            width, height = image.size
    except _PIL_ERRORS as error:
        raise SampleError(f"unreadable image: {_reason(error)}") from error
    return (height, width) if turned else (width, height)


def decode(data: bytes | Path) -> Image.Image:
    """Decode a picture: upright, RGB, what is transparent on white; raises SampleError."""
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as stored:
            stored.load()
            upright = ImageOps.exif_transpose(stored)
            if not upright.has_transparency_data:
                return upright.convert("RGB")
            rgba = upright.convert("RGBA")
    except _PIL_ERRORS as error:
        raise SampleError(f"unreadable image: {_reason(error)}") from error
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def sharpness(pixels: NDArray[np.uint8]) -> float:
    """Variance of the Laplacian (4-neighbour) of the grey picture: (H, W, 3) uint8 RGB, H and W at least 3.

    Grey is ITU-R 601's in [0, 255], the border is left out.
    """
    grey = pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    centre = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * centre
    return float(laplacian.var(dtype=np.float64))


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if "cannot identify" in text:  # PIL adds the address of a buffer, which says nothing
        return "no known image format"
    return text.splitlines()[0][:120] if text else type(error).__name__
