"""A few batches, made, written and scored as a run does it: what they take says what the whole run will."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hypersd_bench import registry
from hypersd_bench.contracts import MetricContext
from hypersd_bench.errors import InputError
from hypersd_bench.reference import ReferenceSet
from hypersd_bench.runner.image_reader import load_images
from hypersd_bench.runner.maker import ENCODE_BATCH, Finished, Job, Maker
from hypersd_bench.runner.memory import Key, key_of
from hypersd_bench.runner.needs import without_reference
from hypersd_bench.runner.plan import Configuration, Plan, reference_of
from hypersd_bench.runner.timing import Clock, peak_memory
from hypersd_bench.store import CostRow, ImageRow, RunStore, write_bytes

STEPS = 4  # about as many are sampled
LEAST_SECONDS = 1.0  # timed batches go on until they took so long together, or
MOST_BATCHES = 5


@dataclass(frozen=True)
class BatchTime:
    """Seconds that a batch of ``size`` images takes: each step, the rest up to its pixels, and what writing adds."""

    size: int
    step: float
    rest: float
    writing: float

    def seconds(self, steps: int, written: bool) -> float:
        """All of it together."""
        return steps * self.step + self.rest + (self.writing if written else 0.0)


@dataclass(frozen=True)
class Speed:
    """What batches of one pipeline, precision and guidance take, from batches of a few sizes.

    of: the configuration that was sampled. batch_size: the one that a run would use. largest: what memory holds.
    peak_memory: bytes at ``batch_size``: of the device's tensors, on a CPU of the process; None where the kernel does
    not tell.
    """

    of: str
    batch_size: int
    largest: int
    batches: tuple[BatchTime, ...]
    peak_memory: int | None

    def batch_seconds(self, size: int, steps: int, written: bool = True) -> float:
        """Seconds for a batch of ``size``: on a straight line through the sizes measured, or in proportion to one."""
        first, last = self.batches[0], self.batches[-1]
        low, high = (batch.seconds(steps, written) for batch in (first, last))
        if first.size == last.size:
            return high * size / last.size
        return max(0.0, low + (high - low) * (size - first.size) / (last.size - first.size))

    def seconds(self, images: int, steps: int, batch_size: int) -> float:
        """Seconds for so many images, the last batch smaller than the others if need be."""
        whole, left = divmod(images, batch_size)
        return whole * self.batch_seconds(batch_size, steps) + (self.batch_seconds(left, steps) if left else 0.0)


@dataclass(frozen=True)
class ScoringTime:
    """What a metric takes in seconds: once, for each image, for each model and step count (set metrics)."""

    once: float
    image: float
    per_set: float = 0.0


@dataclass
class Probed:
    """What was measured, in seconds.

    loads: of a pipeline, by it and its precision, with what its first LoRA takes more than others. texts: of encoding
    a prompt, by the same. seats: of a checkpoint, by the same and its kind. speeds: by pipeline, precision and whether
    guidance doubles the batch. image_bytes: of a file, the mean, by pipeline. read: of reading an image. scoring: by
    metric; ``unscored`` are those that can't be computed, with the reason.
    """

    loads: dict[tuple[str, str], float] = field(default_factory=dict)
    texts: dict[tuple[str, str], float] = field(default_factory=dict)
    seats: dict[tuple[str, str, str], float] = field(default_factory=dict)
    speeds: dict[Key, Speed] = field(default_factory=dict)
    image_bytes: dict[str, float] = field(default_factory=dict)
    read: float = 0.0
    scoring: dict[str, ScoringTime] = field(default_factory=dict)
    unscored: dict[str, str] = field(default_factory=dict)


def probe(plan: Plan, wanted: Sequence[tuple[Configuration, int]], device: str, folder: Path) -> Probed:
    """Sample one configuration of each kind, in ``folder``, which is empty; then score what was made.

    wanted: the configurations whose weights are here, and how many images of each are to be made.
    """
    found = Probed()
    few = replace(plan, prompts=replace(plan.prompts, prompts=plan.prompts.prompts[:ENCODE_BATCH]))
    store = RunStore.create(folder, {})
    with Maker(few, device) as maker:
        for pipeline in dict.fromkeys((c.pipeline, c.dtype) for c, _ in wanted):
            mine = [c for c, _ in wanted if (c.pipeline, c.dtype) == pipeline]
            found.loads[pipeline] = _seconds(partial(maker.bench.base, *pipeline))
            encoder = partial(maker.embeddings(*pipeline).of, maker.bench.base(*pipeline))
            encoding = _seconds(partial(encoder, few.prompts.prompts))
            found.texts[pipeline] = encoding / len(few.prompts.prompts)
            for key in dict.fromkeys(map(key_of, mine)):
                _sample(maker, [(c, count) for c, count in wanted if key_of(c) == key], store, found)
            for kind in {c.model.kind for c in mine} - {seat[2] for seat in found.seats if seat[:2] == pipeline}:
                _seat(maker, next(c for c in mine if c.model.kind == kind), found)
    _score(plan, store, device, found)
    return found


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _seat(maker: Maker, configuration: Configuration, found: Probed) -> None:
    """Time the seating of a checkpoint. The first LoRA also has the weights kept that it changes: once a pipeline."""
    model, pipeline, dtype = configuration.model, configuration.pipeline, configuration.dtype
    key = (pipeline, dtype, model.kind)
    first = _seconds(partial(maker.bench.seat, model, pipeline, dtype))
    if key in found.seats:
        return
    found.seats[key] = first
    if model.kind == "lora":
        maker.bench.base(pipeline, dtype)
        found.seats[key] = _seconds(partial(maker.bench.seat, model, pipeline, dtype))
        found.loads[pipeline, dtype] += max(0.0, first - found.seats[key])


def _sample(maker: Maker, among: Sequence[tuple[Configuration, int]], store: RunStore, found: Probed) -> None:
    """Time batches of one image and of as many as a run would make at once, with the one of ``among`` that is apt."""
    examples = (_with_few_steps(c) for c, _ in among)
    example = min(examples, key=lambda c: (abs(c.steps - STEPS), c.model.kind == "unet"))
    _seat(maker, example, found)
    most = max(count for _, count in among)
    prompts = maker.plan.prompts.prompts
    clock = Clock(maker.plan, example, str(maker.bench.device))
    timer = _Timer(maker, example, clock.on_cpu, store)
    peaks: list[CostRow] = []
    batches: list[BatchTime] = []
    size = 1
    while not batches or size > batches[-1].size:
        jobs = [Job(prompt, i // len(prompts)) for i, prompt in enumerate(islice(cycle(prompts), size))]
        timer.warm_up(jobs)
        jobs = jobs[: maker.batch_size(example)]  # fewer where memory ran out
        with peak_memory(clock, len(jobs), peaks):
            batches.append(timer.time(jobs))
        size = min(maker.batch_size(example), most)  # on CUDA known only from the first image on
    peak = [row.value for row in peaks if row.name == "peak-memory"]
    found.speeds[key_of(example)] = Speed(
        of=str(example),
        batch_size=batches[-1].size,
        largest=maker.batch_size(example),
        batches=tuple(batches),
        peak_memory=int(peak[-1]) if peak else None,
    )
    sizes = [(store.folder / row.file).stat().st_size for row in store.images() if row.model == example.label]
    found.image_bytes.setdefault(example.pipeline, sum(sizes) / len(sizes))


def _with_few_steps(configuration: Configuration) -> Configuration:
    """The same checkpoint at the step count of its contract that is nearest to ``STEPS``."""
    steps = min(configuration.model.contract.timesteps, key=lambda count: (abs(count - STEPS), -count))
    return replace(configuration, steps=steps)


class _Timer:
    """Times batches that are made, written and entered in a ledger as those of a run."""

    def __init__(self, maker: Maker, configuration: Configuration, on_cpu: bool, store: RunStore) -> None:
        self._maker = maker
        self._configuration = configuration
        self._on_cpu = on_cpu
        self._store = store
        self._steps: list[float] = []  # when each began

    def warm_up(self, jobs: Sequence[Job]) -> None:
        """Make a batch, untimed."""
        self._make(jobs)

    def time(self, jobs: Sequence[Job]) -> BatchTime:
        """Time batches; returns the medians."""
        found: list[BatchTime] = []
        started = self._now()
        while not found or (self._now() - started < LEAST_SECONDS and len(found) < MOST_BATCHES):
            found.append(self._make(jobs))
        step, rest, writing = (median(getattr(one, name) for one in found) for name in ("step", "rest", "writing"))
        return BatchTime(len(jobs), step, rest, writing)

    def _make(self, jobs: Sequence[Job]) -> BatchTime:
        pipe = self._maker.bench.seat(
            self._configuration.model, self._configuration.pipeline, self._configuration.dtype
        )
        self._steps.clear()
        ends: list[float] = []
        hooks = [
            pipe.unet.register_forward_pre_hook(lambda *_: self._steps.append(self._now())),
            pipe.unet.register_forward_hook(lambda *_: ends.append(self._now())),
        ]
        started = self._now()
        futures = self._maker.make(self._configuration, jobs, self._write)
        made = self._now()
        for hook in hooks:
            hook.remove()
        rows = [future.result() for future in futures]
        written = self._now()
        self._store.record_images(rows)
        recording = self._now() - written
        starts = self._steps
        step = (starts[-1] - starts[0]) / (len(starts) - 1) if len(starts) > 1 else ends[0] - starts[0]
        rest = made - started - len(starts) * step
        beside = max(0.0, (written - made) - (made - started))  # files are written while the next batch is made
        return BatchTime(len(jobs), step, max(0.0, rest), beside + recording)

    def _write(self, finished: Finished) -> ImageRow:
        write_bytes(self._store.folder / finished.row.file, finished.png)
        return finished.row

    def _now(self) -> float:
        if not self._on_cpu:
            torch.cuda.synchronize(self._maker.bench.device)
        return time.perf_counter()


def _score(plan: Plan, store: RunStore, device: str, found: Probed) -> None:
    """Time each metric on images of the probe, all of one size."""
    made = store.images()
    rows = [row for row in made if row.key[:2] == made[0].key[:2]][:ENCODE_BATCH]
    started = time.perf_counter()
    images = load_images(store.folder, rows)
    found.read = (time.perf_counter() - started) / len(rows)
    context, reference = MetricContext(device), reference_of(plan)
    found.unscored |= without_reference(plan.metrics, reference)
    timed: set[str] = set()  # extractors: each image passes one once for all of its metrics
    for info in plan.metrics:
        if info.id in found.unscored:
            continue
        started = time.perf_counter()
        try:
            metric = registry.resolve("metric", info.id)(context)
            load = time.perf_counter() - started
            prompts = [row.prompt for row in rows]
            if info.features:
                again = info.features in timed
                found.scoring[info.id] = _feature_time(metric, load, images, prompts, reference, again)
                timed.add(info.features)
            else:
                found.scoring[info.id] = _scoring_time(metric, load, images, prompts, plan)
        except InputError as error:
            found.unscored[info.id] = str(error)


def _scoring_time(metric: Any, load: float, images: Tensor, prompts: Sequence[str], plan: Plan) -> ScoringTime:
    """Score images twice, the first time to warm up."""
    count, group = len(images), max(2, plan.spec.replicates)
    match metric.info.kind:
        case "image":
            return ScoringTime(load, _warm_seconds(lambda: metric.score(images, prompts)) / count)
        case "prompt":
            some = images[:group] if count >= group else images[:1].expand(group, -1, -1, -1)
            return ScoringTime(load, _warm_seconds(lambda: metric.score_group(some, prompts[0])) / group)
    return ScoringTime(load, _warm_seconds(lambda: metric.score_pairs(images, images)) / count)


def _feature_time(
    metric: Any, load: float, images: Tensor, prompts: Sequence[str], reference: ReferenceSet | None, again: bool
) -> ScoringTime:
    """Time an extractor, unless it was timed (``again``), and what a metric does with its features."""
    count = len(images)
    image = 0.0 if again else _warm_seconds(lambda: metric.extractor(images)) / count
    if metric.info.kind == "image":
        features = metric.extractor(images)
        return ScoringTime(load, image + _warm_seconds(lambda: metric.score_features(features, prompts)) / count)
    features = metric.extractor(images if count > 1 else images.expand(2, -1, -1, -1))
    features = features.repeat(-(-metric.info.min_images // len(features)), 0)
    distance = _warm_seconds(lambda: metric.distance(features, features))
    return ScoringTime(load + image * (reference.num_images if reference else 0), image, distance)


def _warm_seconds(call: Callable[[], object]) -> float:
    """Seconds of a second call: the first warms up."""
    call()
    return _seconds(call)
