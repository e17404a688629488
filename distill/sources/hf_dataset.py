"""Hugging Face data sets: a hub id, a folder of ``save_to_disk``, or a folder of parquet files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL.Image import Image
from tqdm import tqdm

from distill.sources.contract import Catalogue, RawObject, Row, SampleError, remembered, with_caption_problem
from distill.sources.images import decode, size_of
from distill.sources.metadata import (
    AESTHETIC,
    CAPTION,
    HEIGHT,
    IMAGE,
    WIDTH,
    caption_of,
    column,
    named,
    number_of,
    size_stated,
)
from hypersd_bench.errors import InputError

CHUNK = 256  # rows read at once while the catalogue is made


class HubDataset:
    """The rows of one split. Without an image column it gives prompts alone."""

    has_instances = False

    def __init__(
        self,
        name: str,
        split: str = "train",
        image: str | None = None,
        caption: str | None = None,
        cache: Path | None = None,
    ) -> None:
        self.name = name
        self._rows = _load(name, split)
        where = f"data {name!r}"
        self._caption = column(self._rows.column_names, caption, CAPTION, "caption", where)
        self._image = column(self._rows.column_names, image, IMAGE, "image", where)
        if self._caption is None:
            raise InputError(
                f"{where} has no caption column ({', '.join(CAPTION)}); name it, it has {_list(self._rows)}"
            )
        self.has_images = self._image is not None
        if self._image is not None:
            self._rows = self._rows.cast_column(self._image, _undecoded())
        text = f"{self._rows._fingerprint}\t{len(self._rows)}\t{self._image}\t{self._caption}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self.catalogue = Catalogue(remembered(cache, self.fingerprint[:16], lambda: Catalogue.of(self._index()).table))

    def image(self, index: int) -> Image:
        """Decode a picture; raises SampleError."""
        return decode(_content(self._rows[int(index)][self._image]))

    def objects(self, index: int) -> list[RawObject]:
        """These data sets carry no masks that we know to read."""
        raise SampleError("no masks")

    def _index(self) -> Iterator[Row]:
        fields = self._rows.column_names
        sized = named(fields, WIDTH) and named(fields, HEIGHT)
        asked = [self._caption, named(fields, WIDTH), named(fields, HEIGHT), named(fields, AESTHETIC)]
        asked.append(None if sized else self._image)
        rows = self._rows.select_columns([name for name in asked if name])
        for first in tqdm(range(0, len(rows), CHUNK), desc="data set", unit="chunk", disable=len(rows) <= CHUNK):
            columns = rows[first : first + CHUNK]
            for offset in range(len(columns[self._caption])):
                record = {name: values[offset] for name, values in columns.items()}
                yield with_caption_problem(self._row(f"row {first + offset}", record))

    def _row(self, name: str, record: dict[str, Any]) -> Row:
        row = Row(name, caption_of(record, self._caption), aesthetic=number_of(record, AESTHETIC))
        width, height = size_stated(record)
        try:
            if not width and self._image is not None:
                width, height = size_of(_content(record.get(self._image)))
            row = row._replace(width=width, height=height)
        except SampleError as error:
            return row._replace(problem=str(error))
        return row


def _load(name: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"data {name!r} need the package datasets; install it with: pip install 'hypersd-bench[data]'"
        ) from error
    folder = Path(name).expanduser()
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(folder))
            return _split(found, split, name) if isinstance(found, datasets.DatasetDict) else found
        if folder.is_dir():
            files = sorted(str(path) for path in folder.rglob("*.parquet"))
            return datasets.Dataset.from_parquet(files)
        return datasets.load_dataset(name, split=split)
    except InputError:
        raise
    except Exception as error:  # the library raises its own, fsspec's, the hub's and pyarrow's errors
        raise InputError(
            f"data {name!r} can't be loaded: {_line(error)}; check the name, the split and your connection, or give a "
            "local folder"
        ) from error


def _split(found: Any, split: str, name: str) -> Any:
    if split not in found:
        raise InputError(f"data {name!r} has no split {split!r}; it has {', '.join(found)}")
    return found[split]


def _undecoded() -> Any:
    from datasets import Image as ImageFeature

    return ImageFeature(decode=False)


def _content(value: Any) -> bytes | Path:
    if isinstance(value, dict) and value.get("bytes"):
        return bytes(value["bytes"])
    if isinstance(value, dict) and value.get("path"):
        return Path(value["path"])
    raise SampleError("no image")


def _list(rows: Any) -> str:
    return ", ".join(rows.column_names)


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
