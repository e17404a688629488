"""Captions, sizes and aesthetic scores under the many names that data sets give them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distill.sources.contract import SampleError
from hypersd_bench.errors import InputError, unknown_name

CAPTION = ("caption", "text", "prompt", "captions", "sentences")
IMAGE = ("image", "jpg", "jpeg", "png", "webp", "img")
WIDTH, HEIGHT = ("width", "image_width"), ("height", "image_height")
# LAION's, COYO's and those of the tools that add the score later
AESTHETIC = ("aesthetic", "aesthetic_score", "aesthetics_score", "aesthetic_score_laion_v2", "laion_aesthetic")


def named(fields: Iterable[str], names: Iterable[str]) -> str | None:
    """The field that carries one of ``names``, whatever its case; earlier names win.

    Of two cases of one name the lower wins: beside LAION's WIDTH of the image on the web, img2dataset's width is that
    of the image stored.
    """
    spelled = {field.lower(): field for field in sorted(fields)}
    return next((spelled[name] for name in names if name in spelled), None)


def column(fields: Iterable[str], asked: str | None, names: Iterable[str], what: str, where: str) -> str | None:
    """The column asked for, or the one of a usual name; an absent one that was asked for is an InputError."""
    fields = list(fields)
    if asked is None:
        return named(fields, names)
    if asked not in fields:
        raise unknown_name(f"{what} column", asked, fields, where)
    return asked


def caption_of(record: Mapping[str, Any], name: str | None = None) -> str:
    """A record's caption on one line, empty where there is none; of several captions the first."""
    field = name or named(record, CAPTION)
    value = record.get(field) if field else None
    if isinstance(value, list | tuple):
        value = next((text for text in value if isinstance(text, str) and text.strip()), None)
    return " ".join(value.split()) if isinstance(value, str) else ""


def number_of(record: Mapping[str, Any], names: Iterable[str]) -> float:
    """A record's number under one of ``names``, NaN where there is none; a list (several raters) gives its mean."""
    field = named(record, names)
    value = record.get(field) if field else None
    if isinstance(value, list | tuple) and value:
        return sum(map(_number, value)) / len(value)
    return _number(value)


def size_stated(record: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height that a record states, (0, 0) where it does not."""
    width, height = number_of(record, WIDTH), number_of(record, HEIGHT)
    return (int(width), int(height)) if width >= 1 and height >= 1 else (0, 0)


def parse_record(text: str | bytes) -> dict[str, Any]:
    """A JSON object; raises SampleError."""
    try:
        record = json.loads(text)
    except ValueError as error:
        raise SampleError("its metadata are not JSON") from error
    if not isinstance(record, dict):
        raise SampleError("its metadata are no JSON object")
    return record


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that hold something."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    return [line for line in text.splitlines() if line.strip()]


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan
