"""Plan to images: each missing image of each configuration, entered in the ledger as it is done."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from hypersd_bench.runner.maker import Finished, Job, Maker
from hypersd_bench.runner.plan import Configuration, Plan, by_pipeline
from hypersd_bench.runner.timing import Measured, Todo, measure
from hypersd_bench.store import ImageRow, RunStore, write_bytes

IN_FLIGHT = 3  # batches whose files are being written while the device goes on
Work = Sequence[tuple[Configuration, Sequence[Job]]]


class Engine(Protocol):
    """Where a plan's images are made and its configurations timed."""

    @property
    def device(self) -> str:
        """What the images are made on: ``cpu``, ``cuda``, ``cuda:1``."""
        ...

    def images(self, plan: Plan, work: Work, folder: Path) -> Iterator[list[ImageRow]]:
        """Make images; yields the rows of those whose files are complete in ``folder``, in any order."""
        ...

    def timings(self, plan: Plan, todo: Todo) -> Iterator[Measured]:
        """Measure what configurations cost, on one device; yields what there is to record as it comes."""
        ...

    def machines(self) -> list[dict[str, Any]]:
        """The provenance of the machines that the images of this start were made on; none for this process's own."""
        ...


class LocalEngine:
    """This process, on one device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def images(self, plan: Plan, work: Work, folder: Path) -> Iterator[list[ImageRow]]:
        """Make images in the order of the work, writing files beside it."""

        def write(finished: Finished) -> ImageRow:
            write_bytes(folder / finished.row.file, finished.png)
            return finished.row

        written: deque[list[Future[ImageRow]]] = deque()
        with Maker(plan, self.device) as maker:
            for configuration, jobs in work:
                todo = list(jobs)
                while todo:
                    size = maker.batch_size(configuration)
                    written.append(maker.make(configuration, todo[:size], write))
                    todo = todo[size:]
                    while len(written) > IN_FLIGHT:
                        yield [future.result() for future in written.popleft()]
            while written:
                yield [future.result() for future in written.popleft()]

    def timings(self, plan: Plan, todo: Todo) -> Iterator[Measured]:
        """Measure configurations here."""
        return measure(plan, todo, self.device)

    def machines(self) -> list[dict[str, Any]]:
        """None but this one."""
        return []


def generate(plan: Plan, store: RunStore, engine: Engine) -> None:
    """Make the images that the ledger does not have yet."""
    work = missing(plan, store)
    if not work:
        return
    done = plan.num_images - sum(len(jobs) for _, jobs in work)
    with tqdm(total=plan.num_images, initial=done, desc="images", unit="image", smoothing=0.1) as bar:
        for rows in engine.images(plan, work, store.folder):
            store.record_images(rows)
            bar.set_postfix_str(f"{rows[-1].model}@{rows[-1].steps}")
            bar.update(len(rows))


def missing(plan: Plan, store: RunStore) -> list[tuple[Configuration, list[Job]]]:
    """What is still to do, models of one pipeline and precision together, and of one checkpoint."""
    rows = store.images()
    here = _files_of(rows, store.folder)
    done = {row.key for row in rows if row.file in here}
    jobs = [Job(prompt, replicate) for prompt in plan.prompts.prompts for replicate in range(plan.spec.replicates)]
    work = [
        (c, [job for job in jobs if (c.label, c.steps, job.prompt.id, job.replicate) not in done])
        for c in by_pipeline(plan.configurations)
    ]
    return [(c, todo) for c, todo in work if todo]


def _files_of(rows: Sequence[ImageRow], folder: Path) -> set[str]:
    """The files that lie in the rows' folders; each of those is listed once, however many images are in it."""
    here: set[str] = set()
    for part in {row.file.rpartition("/")[0] for row in rows}:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder / part) as entries:
            here |= {f"{part}/{entry.name}" for entry in entries}
    return here
