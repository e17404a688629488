"""Tar shards in the layout of LAION and COYO as img2dataset writes them: key.jpg, key.txt, key.json side by side.

An image is read from its place inside the shard; where each lies is found out once per shard and remembered under the
shard's name, size and time of change.
"""

from __future__ import annotations

import glob
import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL.Image import Image
from tqdm import tqdm

from distill.sources.contract import SCHEMA, Catalogue, RawObject, Row, SampleError, remembered, with_caption_problem
from distill.sources.images import SUFFIXES, decode, size_of
from distill.sources.metadata import AESTHETIC, caption_of, number_of, parse_record, size_stated
from hypersd_bench.errors import InputError

INDEX_VERSION = 1
_BRACES = re.compile(r"\{([^{}]*)\}")
_SCHEMA = pa.schema([*SCHEMA, ("offset", pa.int64()), ("bytes", pa.int64())])


class Place(NamedTuple):
    """Where a member's content lies in its shard."""

    offset: int
    bytes: int


class TarShards:
    """The samples of some shards, in the order of the shards and of their members."""

    has_images = True
    has_instances = False

    def __init__(self, pattern: str, cache: Path | None = None, caption: str | None = None) -> None:
        self.name = pattern
        self._shards = expand(pattern)
        keys = [_identity(shard, caption) for shard in self._shards]
        tables = []
        work = zip(self._shards, keys, strict=True)
        for shard, key in tqdm(work, total=len(keys), desc="shards", unit="shard", disable=len(keys) < 2):
            tables.append(remembered(cache, key, partial(_index, shard, caption)))
        self._ends = np.cumsum([table.num_rows for table in tables])
        self.catalogue = Catalogue(pa.concat_tables(tables))
        self._offset, self._bytes = self.catalogue.numbers("offset"), self.catalogue.numbers("bytes")
        self.fingerprint = hashlib.sha256("\n".join(keys).encode()).hexdigest()

    def image(self, index: int) -> Image:
        """Decode a picture; raises SampleError."""
        shard = self._shards[int(np.searchsorted(self._ends, index, side="right"))]
        try:
            with shard.open("rb") as file:
                data = _read(file, Place(int(self._offset[index]), int(self._bytes[index])))
        except OSError as error:
            raise SampleError(f"can't read {shard.name}: {error.strerror}") from error
        return decode(data)

    def objects(self, index: int) -> list[RawObject]:
        """Shards carry no masks."""
        raise SampleError("no masks")


def expand(pattern: str) -> list[Path]:
    """The shards that a pattern names: ``{000..999}`` and ``{a,b}`` are spelled out, ``*`` finds what there is."""
    spelled = [Path(text).expanduser() for text in _spell_out(pattern)]
    shards: list[Path] = []
    for path in spelled:
        found = [Path(name) for name in sorted(glob.glob(str(path)))] if glob.has_magic(str(path)) else [path]
        if path.is_dir():
            found = sorted(path.glob("*.tar"))
        shards += found
    absent = [shard for shard in shards if not shard.is_file()]
    if absent:
        raise InputError(
            f"data {pattern!r}: {len(absent)} of {len(shards)} shards are missing, the first is {absent[0]}"
        )
    if not shards:
        raise InputError(f"data {pattern!r} names no shard; check the folder and the pattern")
    return shards


def _spell_out(pattern: str) -> list[str]:
    parts = _BRACES.split(pattern)  # text, braces' content, text, ...
    choices = [[part] if i % 2 == 0 else _choices(part, pattern) for i, part in enumerate(parts)]
    return ["".join(pick) for pick in product(*choices)]


def _choices(content: str, pattern: str) -> list[str]:
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", content):
        first, last = match.groups()
        if int(first) > int(last):
            raise InputError(f"data {pattern!r}: the range {{{content}}} runs backwards")
        width = len(first) if first.startswith("0") else 0
        return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    return content.split(",")


def _identity(shard: Path, caption: str | None) -> str:
    state = shard.stat()
    text = f"{INDEX_VERSION}\t{shard.name}\t{state.st_size}\t{state.st_mtime_ns}\t{caption}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _index(shard: Path, caption: str | None) -> Any:
    """Look through a shard once: a table of its samples in the order of their first members."""
    samples: dict[str, dict[str, Place]] = {}
    try:
        for member, place in _members(shard):
            folder, _, base = member.rpartition("/")
            stem, _, suffix = base.partition(".")
            samples.setdefault(f"{folder}/{stem}" if folder else stem, {})[f".{suffix.lower()}"] = place
    except (tarfile.TarError, EOFError, OSError) as error:
        problem = "is empty" if not shard.stat().st_size else f"is truncated or no plain tar file ({error})"
        raise InputError(f"shard {shard} {problem}; fetch it again or leave it out of the pattern") from error
    if not any(suffix in SUFFIXES for parts in samples.values() for suffix in parts):
        raise InputError(f"shard {shard} holds no image; fetch it again or leave it out of the pattern")
    records = []
    with shard.open("rb") as file:
        for key, parts in samples.items():
            image = next((parts[suffix] for suffix in SUFFIXES if suffix in parts), None)
            row = with_caption_problem(_row(f"{shard.name}:{key}", parts, image, file, caption))
            records.append(
                {**row._asdict(), "offset": image.offset if image else 0, "bytes": image.bytes if image else 0}
            )
    return pa.Table.from_pylist(records, schema=_SCHEMA)


def _members(shard: Path) -> Iterator[tuple[str, Place]]:
    """Name and place of each file in a shard; raises TarError for one that was cut off."""
    size = shard.stat().st_size
    with tarfile.open(shard, "r:") as tar:
        end = 0
        for member in tar:
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if end > size:
                raise tarfile.ReadError(f"{member.name} is cut off")
            if member.isfile():
                yield member.name, Place(member.offset_data, member.size)
        # tarfile takes a file cut off between two members for a whole one; a whole one ends with empty blocks
        if size < end + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("no end of archive")


def _row(name: str, parts: dict[str, Place], image: Place | None, file: io.BufferedReader, caption: str | None) -> Row:
    try:
        record = parse_record(_read(file, parts[".json"])) if ".json" in parts else {}
        text = caption_of(record, caption)
        if caption is None and ".txt" in parts:
            text = " ".join(_read(file, parts[".txt"]).decode("utf-8", "replace").split())
        if image is None:
            raise SampleError("no image")
        width, height = size_stated(record)
        if not width:
            width, height = size_of(_read(file, image))
        return Row(name, text, width, height, number_of(record, AESTHETIC))
    except SampleError as error:
        return Row(name, "", problem=str(error))


def _read(file: io.BufferedReader, place: Place) -> bytes:
    file.seek(place.offset)
    return file.read(place.bytes)
