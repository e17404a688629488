"""A folder of pictures described by ``metadata.jsonl``, one JSON object a line.

file_name and text (or caption) name the picture and what it shows. Optional: width, height, aesthetic, and objects: a
list of instances as COCO has them, each with category_id (a positive number) and segmentation, which is polygons
([x1, y1, x2, y2, ...] in pixels), a run-length code (counts and size, compressed or not) or the name of a mask file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from distill.sources.contract import Catalogue, RawObject, Row, SampleError, with_caption_problem
from distill.sources.images import decode, size_of
from distill.sources.metadata import AESTHETIC, caption_of, number_of, parse_record, read_lines, size_stated
from hypersd_bench.errors import InputError

METADATA = "metadata.jsonl"
FINE = 4  # polygons are drawn this much larger: the drawing fills every pixel that it touches


class ImageFolder:
    """The pictures that a folder's ``metadata.jsonl`` names, in its order."""

    has_images = True

    def __init__(self, folder: Path, caption: str | None = None) -> None:
        self.name = str(folder)
        self._folder = folder
        lines = read_lines(folder / METADATA)
        if not lines:
            raise InputError(f"{folder / METADATA} is empty; give one line {{file_name, text}} for each picture")
        self._files: list[Path] = []
        self._objects: list[Sequence[Any]] = []
        self.catalogue = Catalogue.of([self._row(number, line, caption) for number, line in enumerate(lines, 1)])
        self.has_instances = any(self._objects)
        state = [(path.name, *_state(path)) for path in self._files]
        self.fingerprint = hashlib.sha256(repr((lines, state, caption)).encode()).hexdigest()

    def image(self, index: int) -> Image.Image:
        """Decode a picture; raises SampleError."""
        return decode(self._files[index])

    def objects(self, index: int) -> list[RawObject]:
        """The objects of a picture; crowds, which are no instances, are left out."""
        size = size_of(self._files[index])
        found = []
        for number, item in enumerate(self._objects[index]):
            if not isinstance(item, Mapping) or not isinstance(item.get("category_id"), int):
                raise SampleError(f"object {number} has no category_id")
            if not item.get("iscrowd"):
                found.append(RawObject(item["category_id"], self._mask(item.get("segmentation"), size, number)))
        return found

    def _row(self, number: int, line: str, caption: str | None) -> Row:
        path, row = self._folder, Row(f"line {number}", "")
        objects: Any = []
        try:
            record = parse_record(line)
            name = record.get("file_name")
            if not isinstance(name, str) or not name:
                raise SampleError(f"no file_name in line {number}")
            path, objects = self._folder / name, record.get("objects") or []
            row = Row(name, caption_of(record, caption), *size_stated(record), number_of(record, AESTHETIC))
            if not path.is_file():
                raise SampleError("no such file")
            if not row.width:
                width, height = size_of(path)
                row = row._replace(width=width, height=height)
        except SampleError as error:
            row = row._replace(problem=str(error))
        self._files.append(path)
        self._objects.append(objects if isinstance(objects, list) else [])
        return with_caption_problem(row)

    def _mask(self, shape: Any, size: tuple[int, int], number: int) -> NDArray[np.bool_]:
        if isinstance(shape, str):
            mask = np.asarray(decode(self._folder / shape).convert("L")) >= 128
        elif isinstance(shape, Mapping):
            mask = run_lengths(shape)
        elif isinstance(shape, list) and shape:
            mask = polygons(shape, size)
        else:
            raise SampleError(f"object {number} has no segmentation")
        if mask.shape != (size[1], size[0]):
            raise SampleError(
                f"object {number}: its mask is {mask.shape[1]}x{mask.shape[0]}, the picture {size[0]}x{size[1]}"
            )
        return mask


def polygons(rings: Sequence[Sequence[float]], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The union of polygons [x1, y1, x2, y2, ...] in pixels: (height, width) bool, pixels at least half inside."""
    canvas = Image.new("L", (size[0] * FINE, size[1] * FINE))
    draw = ImageDraw.Draw(canvas)
    for ring in rings:
        if not isinstance(ring, list) or len(ring) < 6 or len(ring) % 2:
            raise SampleError("a polygon has fewer than three corners")
        # the drawing counts pixels by their middle, COCO by their edge
        draw.polygon([(x * FINE - 0.5, y * FINE - 0.5) for x, y in zip(ring[::2], ring[1::2], strict=True)], fill=255)
    covered: NDArray[np.bool_] = np.asarray(canvas.reduce(FINE)) >= 128
    return covered


def run_lengths(code: Mapping[str, Any]) -> NDArray[np.bool_]:
    """COCO's run-length code to (height, width) bool: runs of 0 and 1 in turn, down the columns."""
    try:
        height, width = map(int, code["size"])
        counts = code["counts"]
        runs = _uncompressed(counts) if isinstance(counts, str) else [int(count) for count in counts]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise SampleError("a run-length code is damaged") from error
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise SampleError("a run-length code does not fill its size")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T


def _uncompressed(text: str) -> list[int]:
    """COCO's compressed counts: 5 bits a character, the sixth says go on; from the fourth on, less that two before."""
    runs: list[int] = []
    at = 0
    while at < len(text):
        value, shift, more = 0, 0, True
        while more:
            bits = ord(text[at]) - 48
            value |= (bits & 31) << shift
            more, at, shift = bool(bits & 32), at + 1, shift + 5
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs


def _state(path: Path) -> tuple[int, int]:
    if not path.is_file():
        return (0, 0)
    state = path.stat()
    return (state.st_size, state.st_mtime_ns)
