"""Reads a run's images ahead of who scores them."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

from torch import Tensor

from hypersd_bench.errors import InputError
from hypersd_bench.machine import num_cores
from hypersd_bench.reference import Picture, read_picture, stack
from hypersd_bench.store import ImageRow

BATCH_SIZE = 64
AHEAD = 2  # batches read beforehand


class ImageReader:
    """Reads images in as many threads as there are cores, some batches ahead."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._threads = ThreadPoolExecutor(num_cores())

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def read(self, batches: Iterable[Sequence[ImageRow]]) -> Iterator[tuple[Sequence[ImageRow], list[Picture]]]:
        """Give each batch with its images, in order."""
        ahead: deque[tuple[Sequence[ImageRow], list[Future[Picture]]]] = deque()
        for batch in batches:
            ahead.append((batch, [self._threads.submit(_read, self._folder, row) for row in batch]))
            if len(ahead) > AHEAD:
                rows, pictures = ahead.popleft()
                yield rows, [picture.result() for picture in pictures]
        while ahead:
            rows, pictures = ahead.popleft()
            yield rows, [picture.result() for picture in pictures]


def load_images(folder: Path, rows: Sequence[ImageRow]) -> Tensor:
    """Read images of one size as (N, 3, H, W) uint8 RGB; grey and RGBA files are converted, a broken one is refused."""
    return stack([_read(folder, row) for row in rows])


def whole_prompts(rows: Sequence[ImageRow]) -> Iterator[list[ImageRow]]:
    """Cut rows into batches of about ``BATCH_SIZE`` that never part the images of a prompt."""
    batch: list[ImageRow] = []
    for _, group in groupby(rows, lambda row: row.key[:3]):
        batch += group
        if len(batch) >= BATCH_SIZE:
            yield batch
            batch = []
    if batch:
        yield batch


def by_size(pictures: Sequence[Picture]) -> list[list[int]]:
    """The places of images that are of one size, for each size."""
    places: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, picture in enumerate(pictures):
        places[picture.shape].append(i)
    return list(places.values())


def _read(folder: Path, row: ImageRow) -> Picture:
    try:
        return read_picture(folder / row.file)
    except InputError as error:
        raise InputError(f"{error}, or have hypersd-bench run make it anew") from error
