"""What a run will take, before it starts: images, time, memory, disk, and where each number comes from.

Times come from what the run itself has measured already, else from a probe (``runner.probe``), else they are unknown.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from hypersd_bench.errors import InputError
from hypersd_bench.host import keep_freed_memory
from hypersd_bench.machine import num_cores
from hypersd_bench.reference import ReferenceSet
from hypersd_bench.runner.generate import missing
from hypersd_bench.runner.manifest import manifest
from hypersd_bench.runner.memory import key_of
from hypersd_bench.runner.needs import Need, at_hand, needs_of, pixels_of, without_reference
from hypersd_bench.runner.plan import Configuration, Plan, by_pipeline, lacks_arithmetic, reference_of
from hypersd_bench.runner.probe import Probed, Speed, probe
from hypersd_bench.runner.timing import GAIN, LARGER, LONGEST, Todo, settings_of
from hypersd_bench.runner.truncation import count_truncated
from hypersd_bench.store import RunStore

BYTES_PER_PIXEL = 1.5  # of a PNG, assumed where no image is there to tell
PIXELS = {"sd15": 512, "sd21": 512, "sdxl": 1024}  # the bases' own, for as long as their files are not here
LOOKED_AT = 200  # files of a run whose sizes are read


@dataclass(frozen=True, kw_only=True)
class ConfigurationForecast:
    """A model at a step count. images: in all; missing: of these, still to make; seconds: for those.

    batch_size: images at once. seconds_per_image: in full batches. peak_memory: bytes, of the device's tensors or, on
    a CPU, of the process. pixels: width and height. None: unknown. source: where time and memory come from.
    """

    name: str
    images: int
    missing: int
    batch_size: int | None
    seconds_per_image: float | None
    seconds: float | None
    peak_memory: int | None
    pixels: int | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run; ``seconds`` is None where unknown, and ``note`` says why, or what is not in it."""

    name: str
    seconds: float | None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes. image: of a file, the mean. source: where that comes from. free: where the run and the weights go."""

    image: float | None
    source: str
    images: int | None
    weights: int | None
    free_for_images: int
    free_for_weights: int


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A run before it starts. ready: whether all weights are here."""

    run: str
    device: str
    images: int
    missing: int
    prompts: Mapping[str, Any]
    replicates: int
    needs: tuple[Need, ...]
    configurations: tuple[ConfigurationForecast, ...]
    phases: tuple[Phase, ...]
    disk: Disk
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ready(self) -> bool:
        """Whether all that the models need is on this disk."""
        return all(need.here for need in self.needs)

    @property
    def seconds(self) -> float | None:
        """All phases whose time is known together; None where that of the images is not."""
        known = {phase.name: phase.seconds for phase in self.phases}
        return None if known["images"] is None else sum(value for value in known.values() if value is not None)

    def to_json(self) -> dict[str, Any]:
        """Everything, with the sums."""
        return {**asdict(self), "ready": self.ready, "seconds": self.seconds}


def forecast(plan: Plan, out: Path, device: str, probing: bool = True) -> Forecast:
    """Predict what running a plan into ``out`` will take from where that run stands now.

    probing: whether batches are made to measure what nothing else tells; only weights that are here are used.
    """
    keep_freed_memory()
    store = RunStore.begun(out)
    needs = needs_of(plan, store.manifest.get("pins", {}) if store else {})
    here = {str(c): local for c in plan.configurations if (local := at_hand(c, needs)) is not None}
    each = len(plan.prompts.prompts) * plan.spec.replicates
    to_make = {str(c): each for c in plan.configurations}
    if store:
        to_make |= dict.fromkeys(to_make, 0) | {str(c): len(jobs) for c, jobs in missing(plan, store)}
    measured = _Measured(store, device, plan.spec.batch_size)
    start, probed = None, None
    able = not lacks_arithmetic(plan, device)
    if probing and able and here:
        start, probed = _probe(plan, [(local, to_make[name] or each) for name, local in here.items()], out, device)
    rows = tuple(
        _configuration(c, here.get(str(c)), each, to_make[str(c)], measured, probed) for c in plan.configurations
    )
    phases = tuple(_phases(plan, store, rows, here, to_make, start, probed, device))
    disk = _disk(plan, out, store, needs, here, probed, rows)
    return Forecast(
        run=str(out),
        device=device,
        images=plan.num_images,
        missing=sum(to_make.values()),
        prompts={
            "id": plan.prompts.id,
            "count": len(plan.prompts.prompts),
            "of": plan.prompts.of or len(plan.prompts.prompts),
            "selection": plan.prompts.selection,
            "license": plan.prompts.license,
        },
        replicates=plan.spec.replicates,
        needs=needs,
        configurations=rows,
        phases=phases,
        disk=disk,
        warnings=tuple(_warnings(plan, device, needs, rows, disk)),
        notes=tuple(_notes(plan, here, probed, probing or not able)),
    )


def _probe(
    plan: Plan, wanted: Sequence[tuple[Configuration, int]], out: Path, device: str
) -> tuple[float | None, Probed]:
    """Probe beside the run directory, on whose disk the images will be; first, what comes before any image."""

    near = _nearest_folder(out)
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".hypersd-bench-plan-", dir=near)
    except OSError as error:
        raise InputError(f"can't write to {near}, where the run would go: {error.strerror}; choose another --out, or "
                         "--no-probe") from error  # fmt: skip
    with temporary as folder:
        started = time.perf_counter()
        whole = len(wanted) == len(plan.configurations)
        if whole:
            local = replace(plan, configurations=tuple(c for c, _ in wanted))
            manifest(local, device, out)
            count_truncated(local)
        start = time.perf_counter() - started if whole else None
        return start, probe(plan, wanted, device, Path(folder))


class _Measured:
    """What a run has measured of itself, on the same device."""

    def __init__(self, store: RunStore | None, device: str, batch_size: int | None) -> None:
        self._timings = [row for row in store.timings() if row.device == device] if store else []
        self._costs = [row for row in store.costs() if row.device == device] if store else []
        self._wanted = batch_size

    def seconds(self, configuration: Configuration, batch_size: int | None) -> tuple[float, int] | None:
        """Seconds per image, and the batch size that it was measured at: the nearest, or the largest, one."""
        key = (configuration.label, configuration.steps, "total")
        mine = [row for row in self._timings if (row.model, row.steps, row.stage) == key]
        if not mine:
            return None
        size = _nearest({row.batch_size for row in mine}, batch_size or self._wanted)
        return median(row.seconds for row in mine if row.batch_size == size) / size, size

    def peak_memory(self, configuration: Configuration, batch_size: int) -> int | None:
        """Bytes at the nearest batch size."""
        key = (configuration.label, configuration.steps, "peak-memory")
        mine = {row.batch_size: row.value for row in self._costs if (row.model, row.steps, row.name) == key}
        return int(mine[_nearest(mine, batch_size)]) if mine else None


def _nearest(sizes: Iterable[int], wanted: int | None) -> int:
    return max(sizes) if wanted is None else min(sizes, key=lambda size: abs(size - wanted))


def _configuration(
    configuration: Configuration,
    local: Configuration | None,
    each: int,
    to_make: int,
    measured: _Measured,
    probed: Probed | None,
) -> ConfigurationForecast:
    speed = probed.speeds.get(key_of(local)) if probed and local else None
    own = measured.seconds(configuration, speed.batch_size if speed else None)
    batch_size = speed.batch_size if speed else own[1] if own else None
    per_image: float | None = None
    seconds: float | None = None if to_make else 0.0
    peak = speed.peak_memory if speed else None
    source = "unknown until the weights are here" if local is None else "unknown without a probe"
    if own:
        per_image = own[0]
        seconds = to_make * per_image
        peak = peak or measured.peak_memory(configuration, own[1])
        source = f"the run's own timing at batch size {own[1]}"
    elif speed and batch_size:
        per_image = speed.batch_seconds(batch_size, configuration.steps) / batch_size
        seconds = speed.seconds(to_make, configuration.steps, batch_size)
        source = f"probe of {speed.of}"
    return ConfigurationForecast(
        name=str(configuration),
        images=each,
        missing=to_make,
        batch_size=batch_size,
        seconds_per_image=per_image,
        seconds=seconds,
        peak_memory=peak,
        pixels=pixels_of(local.pipeline) if local else None,
        source=source,
    )


def _phases(
    plan: Plan,
    store: RunStore | None,
    rows: Sequence[ConfigurationForecast],
    here: Mapping[str, Configuration],
    to_make: Mapping[str, int],
    start: float | None,
    probed: Probed | None,
    device: str,
) -> Iterator[Phase]:
    """The parts of a run in their order."""
    whole = len(here) == len(plan.configurations)
    why = "without a probe" if whole else "until all weights are here"
    yield Phase(name="start", seconds=start, note="" if start is not None else f"unknown {why}")
    local = [here[name] for name in here if to_make[name]]
    known = probed is not None and whole
    load = _load_seconds(local, len(plan.prompts.prompts), probed) if probed and known else None
    yield Phase(name="load", seconds=load, note="" if known else f"unknown {why}")
    seconds = [row.seconds for row in rows]
    images = None if None in seconds else sum(value for value in seconds if value is not None)
    yield Phase(name="images", seconds=images, note="" if images is not None else f"unknown {why}")
    if plan.spec.timing:
        todo = [(here[name], done) for name, done in _untimed(plan, store, device) if name in here]
        timing = _timing_seconds(plan, todo, probed, device) if probed and known else None
        yield Phase(name="timing", seconds=timing, note="" if known else f"unknown {why}")
    if plan.metrics:
        unscored = ", ".join(probed.unscored) if probed else ""
        yield Phase(
            name="scores",
            seconds=_scoring_seconds(plan, store, to_make, probed) if probed else None,
            note=f"without {unscored}, which can't be computed" if unscored else "" if probed else f"unknown {why}",
        )


def _load_seconds(local: Sequence[Configuration], num_prompts: int, probed: Probed) -> float:
    """Seconds to load each pipeline, to encode the prompts for it, and to seat each checkpoint once."""
    pipelines = {(c.pipeline, c.dtype) for c in local}
    seats = {(c.pipeline, c.dtype, c.model.name): c.model.kind for c in local}
    seconds = sum(probed.loads[key] + probed.texts[key] * num_prompts for key in pipelines)
    return seconds + sum(probed.seats[pipeline, dtype, kind] for (pipeline, dtype, _), kind in seats.items())


def _untimed(plan: Plan, store: RunStore | None, device: str) -> list[tuple[str, int]]:
    """The configurations that the timing pass has not measured to the end under these settings; their rounds done."""
    known = (store.manifest.get("timing") if store else None) or {}
    assert plan.spec.timing
    done = known["rounds"] if known.get("settings") == settings_of(plan.spec.timing, device) else {}
    found = [(str(c), done.get(str(c), 0)) for c in plan.configurations]
    return [(name, rounds) for name, rounds in found if rounds < plan.spec.timing.rounds]


def _timing_seconds(plan: Plan, todo: Todo, probed: Probed, device: str) -> float:
    """Seconds of the timing pass: in each round every model is seated, run once, warmed up and timed."""
    timing = plan.spec.timing
    assert timing
    pipelines = [(c.pipeline, c.dtype) for c in by_pipeline([c for c, _ in todo])]
    loaded = pipelines[:1] + timing.rounds * [after for before, after in pairwise(pipelines) if before != after]
    total = sum(probed.loads[pipeline] for pipeline in loaded)
    for c, done in todo:
        speed, text = probed.speeds[key_of(c)], probed.texts[c.pipeline, c.dtype]
        batch = timing.batch_size * text + speed.batch_seconds(timing.batch_size, c.steps, written=False)
        rounds = range(done, timing.rounds)
        total += len(rounds) * (probed.seats[c.pipeline, c.dtype, c.model.kind] + (1 + timing.warmup) * batch)
        total += sum(len(range(number, timing.repeats, timing.rounds)) for number in rounds) * batch
        if timing.throughput and not done:
            total += _throughput_seconds(speed, c.steps, timing.batch_size, LONGEST[device.partition(":")[0]])
    return total


def _throughput_seconds(speed: Speed, steps: int, first: int, longest: float) -> float:
    """Seconds of trying larger batches, three times each, for as long as they gain."""
    best = speed.batch_seconds(first, steps, written=False) / first
    total = 0.0
    for size in (size for size in LARGER if first < size <= speed.largest):
        if best * size > longest:
            break
        seconds = speed.batch_seconds(size, steps, written=False)
        total += 3 * seconds
        if best * size / seconds < GAIN:
            break
        best = seconds / size
    return total


def _scoring_seconds(plan: Plan, store: RunStore | None, to_make: Mapping[str, int], probed: Probed) -> float:
    """Seconds to score what has no score yet; images are read beside it, on all cores."""
    read = probed.read / num_cores()
    one_pass: list[tuple[float, int]] = []  # seconds and images of each metric that shares it
    total = 0.0
    for info in plan.metrics:
        cost = probed.scoring.get(info.id)
        if cost is None:
            continue
        images = plan.num_images
        if info.kind == "set":
            done = _scored_sets(store, info.id, reference_of(plan)) if store else set()
            todo = [c for c in plan.configurations if to_make[str(c)] or (c.label, c.steps) not in done]
            images = len(todo) * images // len(plan.configurations)
            total += len(todo) * cost.per_set
        else:
            images -= sum(row.value is not None for row in store.scores(info.id).values()) if store else 0
            if info.kind == "prompt" and plan.spec.replicates == 1:
                images = 0
        total += cost.once
        images = max(0, images)
        if info.kind == "pair":
            total += _pair_seconds(plan, images, cost.image, read)
        else:
            one_pass.append((cost.image * images, images))
    return total + max(sum(seconds for seconds, _ in one_pass), read * max((n for _, n in one_pass), default=0))


def _pair_seconds(plan: Plan, images: int, score: float, read: float) -> float:
    """Seconds of a metric of pairs: the teacher's images are read once for all models."""
    models = len(plan.configurations) - 1
    if not models or not any(c.model.family == "teacher" for c in plan.configurations):
        return 0.0
    pairs = images * models / (models + 1)
    return pairs * max(score, read * (1 + 1 / models))


def _scored_sets(store: RunStore, metric: str, reference: ReferenceSet | None) -> set[tuple[str, int]]:
    """The models and step counts that have a value under a set metric; none where any is of another reference."""
    rows = [row for row in store.set_scores() if row.metric == metric and row.value is not None]
    one = reference is not None and all(row.reference == reference.id for row in rows)
    return {(row.model, row.steps) for row in rows} if one else set()


def _disk(
    plan: Plan,
    out: Path,
    store: RunStore | None,
    needs: Sequence[Need],
    here: Mapping[str, Configuration],
    probed: Probed | None,
    rows: Sequence[ConfigurationForecast],
) -> Disk:
    from huggingface_hub.constants import HF_HUB_CACHE

    image, source = _image_bytes(plan, store, here, probed)
    lacking = [need.lacking for need in needs]
    return Disk(
        image=image,
        source=source,
        images=None if image is None else int(image * sum(row.missing for row in rows)),
        weights=None if None in lacking else sum(value for value in lacking if value is not None),
        free_for_images=shutil.disk_usage(_nearest_folder(out)).free,
        free_for_weights=shutil.disk_usage(_nearest_folder(Path(HF_HUB_CACHE))).free,
    )


def _image_bytes(
    plan: Plan, store: RunStore | None, here: Mapping[str, Configuration], probed: Probed | None
) -> tuple[float | None, str]:
    """Mean bytes of an image file, and where that comes from."""
    made = store.images() if store else []
    files = [store.folder / row.file for row in made[:: max(1, len(made) // LOOKED_AT)]] if store else []
    sizes = [path.stat().st_size for path in files if path.exists()]
    if sizes:
        return fmean(sizes), f"{len(sizes)} of the run's images"
    if probed and len(here) == len(plan.configurations):
        return fmean(probed.image_bytes[local.pipeline] for local in here.values()), "the probe's images"
    known = [
        pixels_of(here[str(c)].pipeline) if str(c) in here else PIXELS.get(c.model.base) for c in plan.configurations
    ]
    if None in known:
        return None, "unknown until the weights are here"
    return (fmean(BYTES_PER_PIXEL * side**2 for side in known if side), f"assumed: {BYTES_PER_PIXEL} bytes per pixel")


def _warnings(
    plan: Plan, device: str, needs: Sequence[Need], rows: Sequence[ConfigurationForecast], disk: Disk
) -> Iterator[str]:
    """What would spoil the run, or its result."""
    if lacks_arithmetic(plan, device):
        yield "float16 needs a GPU, and there is none here: it can't be run, or probed, on this machine as it stands"
    yield from dict.fromkeys(need.problem for need in needs if need.problem)
    yield from _too_full(disk)
    sizes = {row.name: row.pixels for row in rows if row.pixels}
    if len(set(sizes.values())) > 1:
        groups = (
            f"{', '.join(name for name in sizes if sizes[name] == side)} at {side}" for side in set(sizes.values())
        )
        yield f"images of different sizes in one run, in pixels: {'; '.join(groups)}"
    dtypes = dict.fromkeys(c.dtype for c in plan.configurations)
    if len(dtypes) > 1:
        yield f"models of different precision in one run: {', '.join(dtypes)}"
    for label in plan.labels:
        doubts = dict.fromkeys(c.model.unconfirmed for c in plan.configurations if c.label == label)
        if said := "; ".join(doubt for doubt in doubts if doubt):
            yield f"{label}: not confirmed by a primary source: {said}"
    for c in plan.configurations:
        if c.breaches:
            yield f"{c} is forced against its contract: {'; '.join(c.breaches)}"


def _too_full(disk: Disk) -> Iterator[str]:
    if disk.images is not None and disk.images > disk.free_for_images:
        yield (f"the images take {disk.images / 1e9:.3g} GB, and {disk.free_for_images / 1e9:.3g} GB are free; choose "
               "another --out, or fewer prompts")  # fmt: skip
    if disk.weights is not None and disk.weights > disk.free_for_weights:
        yield (f"the weights take {disk.weights / 1e9:.3g} GB, and {disk.free_for_weights / 1e9:.3g} GB are free; set "
               "HF_HOME to a folder on a larger disk")  # fmt: skip


def _notes(plan: Plan, here: Mapping[str, Configuration], probed: Probed | None, probing: bool) -> Iterator[str]:
    """What the numbers rest on."""
    if len(here) < len(plan.configurations):
        yield "time unknown until the weights are here; run: hypersd-bench fetch SPEC, then plan again"
    if probed:
        yield "times hold for a machine as busy as it is now (their error: benchmarks/test_forecast.py)"
    elif not probing:
        yield "no probe was made: without --no-probe, a few batches tell the time"
    lacking = probed.unscored if probed else without_reference(plan.metrics, reference_of(plan))
    for name, reason in lacking.items():
        yield f"{name} can't be computed: {reason}"


def _nearest_folder(path: Path) -> Path:
    """The folder, or the nearest above it that there is."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
