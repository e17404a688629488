"""What training data offer, and what a source of samples must offer to become training data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL.Image import Image

from distill.batch import Batch
from hypersd_bench.store import write_bytes


class TrainingData(Protocol):
    """Batches by position: which images a step sees is a pure function of (seed, images seen so far).

    latent_shape: (C, h, w) of a square image; a batch of another aspect says its own. has_images: whether batches
    carry z0. has_instances: whether they carry masks.

    Process p of P asks ``batch(position + p * size, size)``. All images of one such batch share a shape, those of two
    processes, or of two parts of an accumulated step, need not.
    """

    latent_shape: tuple[int, int, int]
    has_images: bool
    has_instances: bool

    def batch(self, position: int, size: int) -> Batch:
        """The ``size`` images that follow after ``position`` images seen, float32, on the device."""
        ...

    def report(self) -> dict[str, Any]:
        """Counts: total, filtered and by what, broken and why, buckets."""
        ...


class SampleError(Exception):
    """One sample can't be used; the message is the reason in a few words."""


class Row(NamedTuple):
    """What is known of a sample before its pixels are decoded.

    width, height: of the stored picture, upright, in pixels; 0 where unknown. aesthetic: NaN where unknown. problem:
    why the sample can't be used, empty where it can.
    """

    id: str
    caption: str
    width: int = 0
    height: int = 0
    aesthetic: float = float("nan")
    problem: str = ""


SCHEMA = pa.schema(
    [
        ("id", pa.large_string()),
        ("caption", pa.large_string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("aesthetic", pa.float32()),
        ("problem", pa.large_string()),
    ]
)


class Texts(Sequence[str]):
    """A column of texts that stays in its compact form."""

    def __init__(self, column: Any) -> None:
        self._column = column.combine_chunks()

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._column[index].to_pylist()
        return self._column[int(index)].as_py()


@dataclass(frozen=True)
class Catalogue:
    """The rows of a source as columns; sources may keep further columns of their own in ``table``."""

    table: Any

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Catalogue:
        """Collect rows."""
        columns = list(zip(*rows, strict=True)) or [()] * len(Row._fields)
        return cls(pa.table(dict(zip(Row._fields, map(list, columns), strict=True)), schema=SCHEMA))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __iter__(self) -> Iterator[Row]:
        for record in self.table.select(list(Row._fields)).to_pylist():
            yield Row(**record)

    @cached_property
    def ids(self) -> Texts:
        """The samples' names."""
        return Texts(self.table["id"])

    @cached_property
    def captions(self) -> Texts:
        """The samples' captions, empty where there is none."""
        return Texts(self.table["caption"])

    @cached_property
    def broken(self) -> dict[int, str]:
        """Index to reason of the samples known to be unusable."""
        problems = self.table["problem"].to_pylist()
        return {i: problem for i, problem in enumerate(problems) if problem}

    def numbers(self, name: str) -> NDArray[Any]:
        """A column of numbers: width, height, aesthetic."""
        column: NDArray[Any] = self.table[name].to_numpy()
        return column


def with_caption_problem(row: Row) -> Row:
    """The row, marked unusable where it has no caption."""
    return row if row.problem or row.caption.strip() else row._replace(problem="no caption")


def remembered(folder: Path | None, key: str, make: Callable[[], Any]) -> Any:
    """The table ``key`` stands for, read from ``folder`` where an earlier run left it, else made and left there."""
    if folder is None:
        return make()
    path = folder / f"index-{key}.parquet"
    if path.exists():
        return pq.read_table(path)
    table = make()
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_bytes(path, sink.getvalue().to_pybytes())
    return table


class RawObject(NamedTuple):
    """An object of a stored picture: its class, and its mask (H, W) bool at the stored size, upright."""

    label: int
    mask: NDArray[np.bool_]


class Source(Protocol):
    """Samples by index.

    name: for messages. catalogue: what is known without decoding. fingerprint: changes whenever the samples may have.
    """

    name: str
    catalogue: Catalogue
    fingerprint: str
    has_images: bool
    has_instances: bool

    def image(self, index: int) -> Image:
        """Decode a picture, upright RGB; raises SampleError."""
        ...

    def objects(self, index: int) -> list[RawObject]:
        """The objects of a picture; raises SampleError."""
        ...
