"""The next batches prepared while the device works on this one.

A batch is a pure function of its position, so preparing it earlier, or in vain, changes nothing that is seen.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from distill.batch import Batch
from distill.sources.loading import Loaded, Loading


class Prefetch:
    """Training data with a thread that loads ``ahead`` batches before they are asked for.

    The next position is guessed from the last two, so a process that sees every P-th batch is served as well. An
    error belongs to its position: it is raised when that batch is asked for, never earlier, and not at all for a batch
    that was guessed wrong. ``pin``: copy into pinned memory, for CUDA.
    """

    def __init__(self, data: Loading, ahead: int = 2, pin: bool = False) -> None:
        self.data, self._ahead, self._pin = data, ahead, pin
        self.latent_shape, self.has_images = data.latent_shape, data.has_images
        self.has_instances = data.has_instances
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._pending: dict[tuple[int, int], Future[Loaded]] = {}
        self._last: tuple[int, int] | None = None

    def batch(self, position: int, size: int) -> Batch:
        """The ``size`` images that follow after ``position`` images seen."""
        future = self._pending.pop((position, size), None) or self._submit(position, size)
        stride = self._stride(position, size)
        wanted = [(position + k * stride, size) for k in range(1, self._ahead + 1)]
        for key in self._pending.keys() - set(wanted):
            self._pending.pop(key).cancel()
        for key in wanted:
            if key not in self._pending:
                self._pending[key] = self._submit(*key)
        self._last = (position, size)
        return self.data.finish(future.result())

    def report(self) -> dict[str, Any]:
        """The counts of the data beneath; images loaded ahead are among them."""
        return self.data.report()

    def close(self) -> None:
        """Stop the thread; a batch it has begun is finished first."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _submit(self, position: int, size: int) -> Future[Loaded]:
        return self._thread.submit(self._load, position, size)

    def _load(self, position: int, size: int) -> Loaded:
        loaded = self.data.load(position, size)
        return loaded.pinned() if self._pin else loaded

    def _stride(self, position: int, size: int) -> int:
        if self._last is None or self._last[1] != size or position <= self._last[0]:
            return size
        return position - self._last[0]
