"""A plan over Ray: a worker process for each device, on one machine or many.

Workers only make pictures and send them to this process, which alone writes files and the ledger: machines need no disk
in common, and nothing can be entered twice. Weights are read where the worker is: from the hub at the plan's commits,
or from the same path.

A worker that dies is replaced; what it had in hand goes back to the others.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import ray
import torch
from ray._private import services
from ray.exceptions import RayError, RayTaskError
from tqdm import tqdm

from hypersd_bench import provenance
from hypersd_bench.errors import HypersdBenchError, InputError, first_line
from hypersd_bench.host import keep_freed_memory
from hypersd_bench.hub import file_sha256
from hypersd_bench.runner.generate import Work
from hypersd_bench.runner.maker import WRITERS, Finished, Job, Maker
from hypersd_bench.runner.plan import Configuration, Plan
from hypersd_bench.runner.timing import Measured, Todo, measure
from hypersd_bench.runner.weights import local_weights
from hypersd_bench.store import ImageRow, write_bytes

CORES = 4  # of a CPU worker, where nobody says how many workers there shall be
IN_FLIGHT = 2  # chunks a worker has: it denoises one while the other's pictures are coded and sent
CHUNK_BATCHES = 2  # a call costs milliseconds, so few do; whoever dies takes at most IN_FLIGHT such chunks along
DEATHS = 3  # in a row at one place, and the run stops: whatever kills its workers will kill the next
DECISIVE = ("hypersd-bench", "torch", "diffusers", "transformers", "peft")  # packages that make other pictures
PROBE_S = 10  # for a cluster to answer
START_S = 600  # for any worker to start, on a cluster that others use too


class RayEngine:
    """Workers of a Ray cluster, one for each GPU or for some CPU cores. Close it, or use it as a context.

    address: ``auto``, or host:port of a cluster that this machine is part of; None: a cluster of this machine alone,
    which lives as long as the engine. workers: None for as many as there is room for. device: ``cuda`` or ``cpu``;
    None: ``cuda`` where the cluster has a GPU. verbose: whether Ray and the workers may write to the screen.
    """

    def __init__(
        self, address: str | None = None, workers: int | None = None, device: str | None = None, verbose: bool = False
    ) -> None:
        if device not in (None, "cpu", "cuda"):
            raise InputError(f"device {device!r}: Ray chooses the GPU of each worker; say cuda or cpu")
        self._address = address
        self._workers = workers
        self._device = device
        self._verbose = verbose
        self._ours = False
        self._machines: dict[str, dict[str, Any]] = {}
        self._files: dict[str, str] | None = None

    def __enter__(self) -> RayEngine:
        try:
            self._room()  # before anything is downloaded
        except InputError:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self._ours:
            ray.shutdown()
            self._ours = False

    @property
    def device(self) -> str:
        """What the workers compute on: ``cuda`` or ``cpu``. Connects to the cluster."""
        return self._device or ("cuda" if sum(self._resource("GPU")) else "cpu")

    def images(self, plan: Plan, work: Work, folder: Path) -> Iterator[list[ImageRow]]:
        """Have the workers make images, and write their files here; rows come in the order that they are done in."""

        def write(finished: Finished) -> ImageRow:
            write_bytes(folder / finished.row.file, finished.png)
            return finished.row

        size, cores = self._room()
        plan_there = ray.put(plan)
        meet = partial(self._meet, plan)
        crew = Crew(work, size, plan.spec.batch_size or 1, lambda: self._hire(plan_there, cores, IN_FLIGHT), meet)
        try:
            with ThreadPoolExecutor(WRITERS, thread_name_prefix="files") as threads:
                while crew.feed():
                    if done := crew.next():
                        crew.feed()  # before the files are written: nobody waits for this disk
                        yield list(threads.map(write, done))
        finally:
            crew.dismiss()

    def machines(self) -> list[dict[str, Any]]:
        """The provenance of the workers' machines, each once."""
        return list(self._machines.values())

    def timings(self, plan: Plan, todo: Todo) -> Iterator[Measured]:
        """Measure configurations on a worker that has a GPU, or a machine's CPU, for itself.

        When it dies another one starts anew, and what is yielded then stands in place of what was yielded before.
        """
        cores = max(self._resource("CPU"))
        plan_there, reason = ray.put(plan), ""
        for _ in range(DEATHS):
            worker = self._hire(plan_there, cores, 1)
            try:
                self._meet(plan, ray.get(_wait([worker.hello.remote()], START_S)))
                for ref in worker.timings.remote(todo):
                    yield ray.get(ref)
                return
            except RayTaskError as error:
                raise _cause(error) from error
            except RayError as error:
                reason = _reason(error)
            finally:
                ray.kill(worker)
        raise _gave_up(reason)

    def _meet(self, plan: Plan, hello: Hello) -> None:
        """Note a worker's machine; raises InputError where it would not make the same pictures as another."""
        machine = hello.machine
        self._machines[f"{machine['machine']}, {machine['device']}"] = machine
        here = provenance.collect("cpu").packages
        unlike = [name for name in DECISIVE if machine["packages"].get(name) != here.get(name)]
        if unlike:
            raise InputError(
                f"a machine of the Ray cluster has {unlike[0]} {machine['packages'].get(unlike[0])}, and this one has "
                f"{here.get(unlike[0])}; install the same versions on all of them"
            )
        if self._files is None:
            self._files = {path: file_sha256(Path(path)) for path in local_weights(plan)}
        for path, sha256 in hello.files.items():
            if sha256 != self._files[path]:
                raise InputError(f"{path} on a machine of the Ray cluster ({sha256[:12]}) is another file than here "
                                 f"({self._files[path][:12]}); copy it there")  # fmt: skip

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else a cluster of ours reports to its makers
        try:
            if self._address:
                _probe(self._address)
            ray.init(
                self._address or "local",
                include_dashboard=False,
                log_to_driver=self._verbose,
                logging_level=logging.INFO if self._verbose else logging.ERROR,
            )
        except (OSError, RuntimeError, ValueError) as error:
            if self._address is None:
                raise InputError(f"Ray can't start on this machine: {first_line(error)}") from error
            raise InputError(
                f"no Ray cluster answers at {self._address} ({first_line(error)}); start one with `ray start --head`, "
                "on its other machines `ray start --address HOST:PORT`, and say --address auto; or leave --address out "
                "for workers on this machine alone"
            ) from error
        # Ray prints what it thinks of a worker's death to stdout, where a summary in JSON may go; we say it ourselves
        ray._private.worker._worker_logs_enabled = self._verbose
        self._ours = True

    def _resource(self, name: str) -> list[int]:
        """How much of a resource each machine of the cluster has."""
        self._connect()
        return [int(node["Resources"].get(name, 0)) for node in ray.nodes() if node["Alive"]]

    def _room(self) -> tuple[int, int]:
        """How many workers there shall be, and each one's CPU cores; raises InputError for too many."""
        if self.device == "cpu":
            return share_cores(self._resource("CPU"), self._workers)
        gpus = sum(self._resource("GPU"))
        if gpus < (self._workers or 1):
            raise InputError(
                f"the Ray cluster has {gpus} GPUs, and {self._workers or 1} workers would need one each; take fewer "
                "--workers, or --device cpu"
            )
        return self._workers or gpus, 0

    def _hire(self, plan: Any, cores: int, concurrency: int) -> Any:
        """A new worker, which starts once the cluster has room for it."""
        needs = {"num_gpus": 1, "num_cpus": 0} if self.device == "cuda" else {"num_cpus": cores}
        hire = ray.remote(Worker).options(**needs, max_concurrency=concurrency)
        return hire.remote(plan, self.device, cores if self.device == "cpu" else None, os.getcwd())


def share_cores(cores: Sequence[int], workers: int | None) -> tuple[int, int]:
    """Divide the CPU cores of machines among workers; returns how many workers there are, and each one's cores.

    A worker's cores are of one machine. Raises InputError where a worker would have none.
    """
    if workers is None and any(cores):
        share = min(CORES, max(cores))
        return sum(count // share for count in cores), share
    for share in range(max(cores, default=0), 0, -1):
        if workers is not None and sum(count // share for count in cores) >= workers:
            return workers, share
    raise InputError(f"the Ray cluster has {sum(cores)} CPU cores, too few for {workers or 1} workers; take fewer "
                     "--workers, or a larger cluster")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Made:
    """A chunk's images, and how many the worker makes at once, as it knows by now."""

    images: list[Finished]
    batch_size: int


@dataclass(frozen=True, slots=True)
class Hello:
    """A worker's machine: its provenance, and the hashes of the weights that a plan gives by path."""

    machine: dict[str, Any]
    files: dict[str, str]


class Worker:
    """A device of the cluster at work on a plan; this runs in a process of its own.

    threads: those that torch may use. folder: where relative paths in the plan start, if it is on this machine.
    """

    def __init__(self, plan: Plan, device: str, threads: int | None, folder: str) -> None:
        keep_freed_memory()
        with suppress(OSError):
            os.chdir(folder)
        if threads:
            torch.set_num_threads(threads)
        self.plan = plan
        self.device = device
        self.maker = Maker(plan, device)
        self.turn = Lock()

    def hello(self) -> Hello:
        """Say what the worker runs on, once it has started."""
        with _place_named():
            files = {path: file_sha256(Path(path)) for path in local_weights(self.plan)}
            return Hello(provenance.collect(self.device).to_json(), files)

    def make(self, configuration: Configuration, jobs: Sequence[Job]) -> Made:
        """Make a chunk's images. The next chunk, in another thread, has the device once this one is denoised."""
        with _place_named():
            with self.turn:
                futures = self.maker.make(configuration, jobs, lambda finished: finished)
                batch_size = self.maker.batch_size(configuration)
            return Made([future.result() for future in futures], batch_size)

    def timings(self, todo: Todo) -> Iterator[Measured]:
        """Measure configurations."""
        with _place_named():
            yield from measure(self.plan, todo, self.device)


@dataclass(eq=False, slots=True)
class Queue:
    """A configuration's images that nobody is making."""

    configuration: Configuration
    jobs: deque[Job]

    def nearness(self, last: Queue | None) -> tuple[bool, bool, bool, int]:
        """How little a worker must load that did ``last`` before; among equals, the longest queue comes first."""
        if last is None:
            return (False, False, False, len(self.jobs))
        ours, theirs = self.configuration, last.configuration
        same_pipeline = (ours.pipeline, ours.dtype) == (theirs.pipeline, theirs.dtype)
        return (self is last, same_pipeline, ours.model == theirs.model, len(self.jobs))


@dataclass(eq=False, slots=True)
class Seat:
    """A place for a worker, and the one that has it."""

    batch_size: int
    worker: Any = None
    started: bool = False
    chunks: int = 0  # in flight
    last: Queue | None = None
    deaths: int = 0  # since anything was finished here


@dataclass(frozen=True, slots=True)
class Errand:
    """What a worker was asked for: a chunk of a queue, or without a queue only to start."""

    seat: Seat
    worker: Any
    queue: Queue | None = None
    jobs: Sequence[Job] = ()


class Crew:
    """Workers that share work: ``feed`` them and take what is done ``next``, until nothing is left."""

    def __init__(
        self, work: Work, size: int, batch_size: int, hire: Callable[[], Any], meet: Callable[[Hello], None]
    ) -> None:
        self._queues = [Queue(configuration, deque(jobs)) for configuration, jobs in work]
        self._hire = hire
        self._meet = meet
        self._errands: dict[Any, Errand] = {}  # by the reference to their result
        self._seats = [Seat(batch_size) for _ in range(size)]
        for seat in self._seats:
            self._fill(seat)

    def feed(self) -> bool:
        """Give chunks to whoever has too few; returns whether any image is still to come."""
        for depth in range(IN_FLIGHT):  # nobody gets a second chunk before all have a first one
            for seat in self._seats:
                if seat.started and seat.chunks == depth and self._left():
                    self._give(seat)
        return bool(self._left()) or any(errand.queue for errand in self._errands.values())

    def next(self) -> list[Finished]:
        """Wait until any errand is done; returns its images, none when it was another errand or its worker died."""
        ref = _wait(list(self._errands), None if any(seat.started for seat in self._seats) else START_S)
        errand = self._errands.pop(ref)
        try:
            answer: Any = ray.get(ref)  # Hello to an errand without a queue, else Made
        except RayTaskError as error:
            raise _cause(error) from error
        except RayError as error:
            self._replace(errand, error)
            return []
        seat = errand.seat
        if errand.worker is seat.worker:
            seat.started = True
            if errand.queue:
                seat.batch_size, seat.deaths = answer.batch_size, 0
                seat.chunks -= 1
        if errand.queue:
            images: list[Finished] = answer.images
            return images
        self._meet(answer)
        return []

    def dismiss(self) -> None:
        """End all workers, those too that have not started."""
        for seat in self._seats:
            ray.kill(seat.worker)

    def _left(self) -> int:
        return sum(len(queue.jobs) for queue in self._queues)

    def _give(self, seat: Seat) -> None:
        """Give a worker a chunk: some batches, towards the end smaller ones, so that all are done at about one time."""
        last = seat.last
        queue = max((queue for queue in self._queues if queue.jobs), key=lambda queue: queue.nearness(last))
        fair = math.ceil(self._left() / (IN_FLIGHT * len(self._seats)))
        size = min(CHUNK_BATCHES * seat.batch_size, fair, len(queue.jobs))
        jobs = [queue.jobs.popleft() for _ in range(size)]
        ref = seat.worker.make.remote(queue.configuration, jobs)
        self._errands[ref] = Errand(seat, seat.worker, queue, jobs)
        seat.chunks += 1
        seat.last = queue

    def _fill(self, seat: Seat) -> None:
        seat.worker, seat.started, seat.chunks, seat.last = self._hire(), False, 0, None
        self._errands[seat.worker.hello.remote()] = Errand(seat, seat.worker)

    def _replace(self, errand: Errand, error: RayError) -> None:
        """Put a lost chunk back, and on the first one of a worker that died, have another take its place."""
        if errand.queue:
            errand.queue.jobs.extendleft(reversed(errand.jobs))
        seat = errand.seat
        if errand.worker is not seat.worker:
            return
        ray.kill(seat.worker)  # it may only have been out of reach
        seat.deaths += 1
        if seat.deaths == DEATHS:
            raise _gave_up(_reason(error))
        tqdm.write(f"a Ray worker died and is replaced: {_reason(error)}", file=sys.stderr)
        self._fill(seat)


def _probe(address: str) -> None:
    """Raise OSError or ValueError where nothing listens: Ray itself would try for minutes, then end the process."""
    if address.startswith("ray://"):
        raise ValueError("Ray's client protocol is not supported")
    host, _, port = (services.canonicalize_bootstrap_address(address) or "").rpartition(":")
    socket.create_connection((host, int(port)), PROBE_S).close()


def _wait(refs: list[Any], timeout: float | None) -> Any:
    """The first reference that is done; raises InputError when none is within ``timeout`` seconds."""
    done, _ = ray.wait(refs, num_returns=1, timeout=timeout)
    if not done:
        raise InputError(f"no Ray worker could start within {timeout:.0f} s; `ray status` says what the cluster is "
                         "busy with; run the same command again to go on")  # fmt: skip
    return done[0]


def _cause(error: RayTaskError) -> BaseException:
    """What was raised in a worker, as it was raised there."""
    cause = error.cause
    if "failed to import on the worker" in str(cause):
        last = str(cause).strip().splitlines()[-1]
        return InputError(f"a machine of the Ray cluster can't run hypersd-bench ({last}); install this version there")
    assert isinstance(cause, BaseException)
    return cause


def _reason(error: RayError) -> str:
    """The line of Ray's answer that says why a worker died."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "in its creation task" in lines[0]:
        return lines[-1]  # of the traceback
    dead = next((line for line in lines if line.startswith("The actor is dead because")), lines[0])
    return dead.partition(" Some common causes")[0].removeprefix("The actor is dead because ")


def _gave_up(reason: str) -> InputError:
    return InputError(
        f"Ray workers died {DEATHS} times in a row with nothing done in between ({reason}); if memory ran out, take "
        "fewer --workers or a smaller --batch-size. What is made is kept: run the same command again to go on"
    )


@contextmanager
def _place_named() -> Iterator[None]:
    """Have the line for the user say which machine it is about."""
    try:
        yield
    except HypersdBenchError as error:
        raise type(error)(f"{error} (on {platform.node()})") from error
