"""What the page, the tables and the figures show: one frozen value, read from a run directory and printable as JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from math import comb, isfinite
from statistics import quantiles
from typing import Any, Literal

from hypersd_bench.contracts import MetricInfo
from hypersd_bench.errors import InputError
from hypersd_bench.runner.doubtful import doubtful_images
from hypersd_bench.store import CostRow, ImageRow, RunStore, TimingRow
from metrics.comparison import ALPHA, Comparison, Summary, View, comparisons, is_trained_on, summaries
from metrics.stats import holm
from metrics.tradeoff import CostName, cheapest_within, default_cost, step_curves, tradeoff
from reports.curves import Curve, read_curves
from reports.pictures import PromptRow, choose_prompts
from reports.study import StudyData

# Okabe & Ito (2008), "Color universal design": told apart with every common colour vision deficiency. Their black is
# left out, because it vanishes on a dark page, and their yellow comes last, because it is faint on a white one.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross")
REFERENCE_COLOUR = "#8a8a8a"
DUPLICATE = "the same as another"
DELTA_SHARE = 0.01  # of the best value: what "nearly the best" means where nobody says

Mark = Literal["best", "level", ""]
ComparedWith = Callable[[str], Sequence[Comparison]]  # baseline -> everybody's difference to it


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A weights file of a model and the step counts it was sampled at; file is empty for the base itself."""

    file: str
    sha256: str
    steps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the run and how it is drawn, everywhere alike.

    is_reference: it competes with nobody, as the many-step teacher does (``_references``).
    """

    name: str
    label: str
    family: str
    steps: tuple[int, ...]
    trained_on: tuple[str, ...]
    license: str
    checkpoints: tuple[Checkpoint, ...]
    sampler: str
    is_reference: bool
    colour: str
    shape: str

    def was_trained_on(self, metric: str) -> bool:
        """Whether the model was optimised for this metric, named by its id or by its family."""
        return is_trained_on(self.trained_on, metric)


@dataclass(frozen=True, slots=True)
class Cell:
    """One metric of one model at one step count; value is None with a reason when there is none.

    low and high are None where one prompt, or a set metric without features on disk, gives no interval.

    mark: ``best`` of its step count, ``level`` when no difference from the best is shown, else empty.
    """

    metric: str
    model: str
    steps: int
    value: float | None
    low: float | None
    high: float | None
    n: int
    num_prompts: int
    missing: int
    reason: str
    mark: Mark


@dataclass(frozen=True, slots=True)
class Difference:
    """Model minus baseline at one step count, paired by prompt and noise; verdict is said of the model."""

    metric: str
    model: str
    steps: int
    baseline: str
    value: float
    low: float | None
    high: float | None
    n: int
    num_prompts: int
    p_value: float
    p_holm: float
    verdict: str
    detectable: float | None  # the smallest true difference that this n shows with 80 % power


@dataclass(frozen=True, slots=True)
class Memory:
    """Peak memory at the smallest batch that was measured: the device's tensors', on a CPU the process's."""

    model: str
    steps: int
    peak_bytes: float
    batch_size: int
    device: str


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """A configuration's place between quality and a cost; on_front: none that costs no more is shown to be better."""

    metric: str
    cost: CostName
    model: str
    steps: int
    on_front: bool


@dataclass(frozen=True, slots=True)
class Cheapest:
    """The cheapest configuration shown to be within ``delta`` of the best; model is empty where none is shown to be."""

    metric: str
    delta: float
    cost: CostName
    model: str
    steps: int
    num_within: int
    n: int


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds per image of a stage: median and quartiles over n timed repeats."""

    model: str
    steps: int
    stage: str
    median_ms: float
    q1_ms: float
    q3_ms: float
    n: int
    batch_size: int
    device: str


@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything a report shows. baseline is empty when the run names none."""

    title: str
    base: str
    baseline: str
    spec: dict[str, Any]
    spec_hash: str
    provenance: dict[str, Any]
    prompts: dict[str, Any]
    num_images: int
    num_expected: int
    num_replicates: int
    models: tuple[Model, ...]
    steps: tuple[int, ...]
    metrics: tuple[MetricInfo, ...]
    cells: tuple[Cell, ...]
    differences: tuple[Difference, ...]
    latencies: tuple[Latency, ...]
    memories: tuple[Memory, ...]
    fronts: tuple[FrontPoint, ...]
    cheapest: Cheapest | None
    grid: tuple[PromptRow, ...]
    curves: tuple[Curve, ...]
    notes: tuple[str, ...]
    study: StudyData | None = None

    def model(self, name: str) -> Model:
        """The model of this name."""
        return next(model for model in self.models if model.name == name)

    def metric(self, metric_id: str) -> MetricInfo:
        """The metric of this id."""
        return next(metric for metric in self.metrics if metric.id == metric_id)

    def cell(self, metric: str, model: str, steps: int) -> Cell | None:
        """The cell of a metric, model and step count, when the run has it."""
        return next((c for c in self.cells if (c.metric, c.model, c.steps) == (metric, model, steps)), None)

    def latency(self, model: str, steps: int, stage: str = "total") -> Latency | None:
        """The latency of a stage, when it was timed."""
        wanted = (model, steps, stage)
        return next((x for x in self.latencies if (x.model, x.steps, x.stage) == wanted), None)

    def memory(self, model: str, steps: int) -> Memory | None:
        """The peak memory, when it was measured."""
        return next((x for x in self.memories if (x.model, x.steps) == (model, steps)), None)

    def on_front(self, metric: str, cost: CostName, model: str, steps: int) -> bool:
        """Whether a configuration is on the front of this metric and cost."""
        return any(
            p.on_front for p in self.fronts if (p.metric, p.cost, p.model, p.steps) == (metric, cost, model, steps)
        )

    def configurations(self) -> list[tuple[int, Model]]:
        """All (steps, model) of the run, by step count, then in the order of the models."""
        return [(steps, model) for steps in self.steps for model in self.models if steps in model.steps]

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``data.json``."""
        return asdict(self)


def read_report(store: RunStore, study: StudyData | None = None) -> ReportData:
    """Read all a report shows from a run directory, and a study of its images.

    Raises InputError when the run holds no image yet, or the study is of another run.
    """
    images = store.images()
    if not images:
        raise InputError(f"{store.folder} holds no images yet; give its spec to hypersd-bench run first")
    manifest = store.manifest
    if study is not None and study.run != manifest["spec_hash"]:
        raise InputError(f"the study shows images of the run {study.run[:12]}, and {store.folder} is the run "
                         f"{manifest['spec_hash'][:12]}: a report never mixes them")  # fmt: skip
    models = _models(manifest, images)
    compared_with = cache(lambda model: tuple(comparisons(store, model)))  # set metrics make this the slow part
    cells = _cells(summaries(store), models, compared_with)
    grid, grid_notes = choose_prompts(store, images, [model.name for model in models])
    scored = {cell.metric for cell in cells}
    baseline = _baseline(manifest, models)
    view = View([store])
    return ReportData(
        title=str(manifest["spec"].get("name") or store.folder.resolve().name),
        base=str(manifest["spec"].get("base", "")),
        baseline=baseline,
        spec=manifest["spec"],
        spec_hash=manifest["spec_hash"],
        provenance=manifest["provenance"],
        prompts=manifest.get("prompts", {}),
        num_images=len(images),
        num_expected=_num_expected(manifest),
        num_replicates=len({row.replicate for row in images}),
        models=models,
        steps=tuple(sorted({row.steps for row in images})),
        metrics=tuple(MetricInfo(**entry) for entry in manifest["metrics"] if entry["id"] in scored),
        cells=cells,
        differences=to_differences(compared_with(baseline)) if baseline else (),
        latencies=_latencies(store.timings()),
        memories=_memories(store.costs()),
        fronts=_fronts(view),
        cheapest=_cheapest(view, models),
        grid=grid,
        curves=tuple(curve for entry in manifest["models"] for curve in read_curves(store.folder, entry)),
        notes=(*manifest.get("notes", ()), *_doubtful(store, models), *_truncated(manifest), *grid_notes),
        study=study,
    )


def _models(manifest: Mapping[str, Any], images: Sequence[ImageRow]) -> tuple[Model, ...]:
    """The models that have images, in the manifest's order, with the steps they have images of."""
    steps: dict[str, set[int]] = defaultdict(set)
    for row in images:
        steps[row.model].add(row.steps)
    entries = [entry for entry in manifest["models"] if entry["name"] in steps]
    labels = [entry.get("label") or entry["name"] for entry in entries]
    references = _references(entries, steps)
    models: list[Model] = []
    num_competing = 0
    for entry, label in zip(entries, labels, strict=True):
        name = entry["name"]
        is_reference = name in references
        models.append(
            Model(
                name=name,
                label=label if labels.count(label) == 1 else f"{label} ({name})",
                family=entry.get("family", ""),
                steps=tuple(sorted(steps[name])),
                trained_on=tuple(entry.get("trained_on", ())),
                license=entry.get("license") or "",
                checkpoints=_checkpoints(entry.get("checkpoints", {})),
                sampler=_samplers(entry),
                is_reference=is_reference,
                colour=REFERENCE_COLOUR if is_reference else COLOURS[num_competing % len(COLOURS)],
                shape=SHAPES[0] if is_reference else SHAPES[num_competing % len(SHAPES)],
            )
        )
        num_competing += not is_reference
    return tuple(models)


def _references(entries: Sequence[Mapping[str, Any]], steps: Mapping[str, set[int]]) -> set[str]:
    """Name those who compete with nobody: without a step count in common, or, where nobody has one, the teachers."""
    names = {str(entry["name"]) for entry in entries}
    alone = {name for name in names if not any(steps[name] & steps[other] for other in names - {name})}
    teachers = {str(entry["name"]) for entry in entries if entry.get("family") == "teacher"}
    references = alone if alone < names else teachers
    return references if references < names else set()


def _checkpoints(by_steps: Mapping[str, Mapping[str, str]]) -> tuple[Checkpoint, ...]:
    """Gather the manifest's checkpoints by file."""
    steps: dict[tuple[str, str], list[int]] = defaultdict(list)
    for count, checkpoint in by_steps.items():
        steps[checkpoint["file"], checkpoint["sha256"]].append(int(count))
    found = [Checkpoint(file, sha256, tuple(sorted(counts))) for (file, sha256), counts in steps.items()]
    return tuple(sorted(found, key=lambda checkpoint: checkpoint.steps))


def _samplers(entry: Mapping[str, Any]) -> str:
    """Say a model's contracts in a few words; where they differ, with their step counts."""
    contracts = entry.get("contracts") or {"": entry.get("contract") or {}}  # runs of old have one for all
    steps: dict[str, list[str]] = defaultdict(list)
    for count, contract in contracts.items():
        steps[_sampler(contract)].append(count)
    if len(steps) == 1:
        return next(iter(steps))
    return "; ".join(f"{sampler} (steps: {', '.join(counts)})" for sampler, counts in steps.items())


def _sampler(contract: Mapping[str, Any]) -> str:
    """Say a contract in a few words: scheduler, guidance, eta."""
    words = [str(contract.get("scheduler", "")).removesuffix("Scheduler")]
    if (contract.get("guidance_scale") or 0) > 1:
        words.append(f"guidance {contract['guidance_scale']:g}")
    if contract.get("eta"):
        words.append(f"eta {contract['eta']:g}")
    return ", ".join(words)


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def _baseline(manifest: Mapping[str, Any], models: Sequence[Model]) -> str:
    wanted = manifest.get("baseline") or ""
    return wanted if any(model.name == wanted for model in models) else ""


def _num_expected(manifest: Mapping[str, Any]) -> int:
    """How many images the spec asks for."""
    per_configuration: int = manifest.get("prompts", {}).get("count", 0) * manifest["spec"].get("replicates", 1)
    num_configurations = sum(len(entry.get("steps", ())) for entry in manifest["models"])
    return num_configurations * per_configuration


def _cells(found: Sequence[Summary], models: Sequence[Model], compared_with: ComparedWith) -> tuple[Cell, ...]:
    marks = _marks(found, compared_with)
    order = {model.name: i for i, model in enumerate(models)}
    metrics = list(dict.fromkeys(summary.metric for summary in found))  # in the manifest's order
    known = [summary for summary in found if summary.model in order]
    return tuple(
        Cell(
            metric=s.metric,
            model=s.model,
            steps=s.steps,
            value=s.estimate.value if s.estimate else None,
            low=_finite(s.estimate.low) if s.estimate else None,
            high=_finite(s.estimate.high) if s.estimate else None,
            n=s.estimate.n if s.estimate else 0,
            num_prompts=s.estimate.num_clusters if s.estimate else 0,
            missing=s.missing,
            reason=s.reason,
            mark=marks.get((s.metric, s.model, s.steps), ""),
        )
        for s in sorted(known, key=lambda s: (metrics.index(s.metric), s.steps, order[s.model]))
    )


def _marks(found: Iterable[Summary], compared_with: ComparedWith) -> dict[tuple[str, str, int], Mark]:
    """Mark the best of each metric and step count, and those not shown to be worse than it.

    A model loses its mark only by a paired difference from the best that holds after correction: what nothing tells
    from the best is level with it.
    """
    rivals: dict[tuple[str, int], list[Summary]] = defaultdict(list)
    for summary in found:
        if summary.estimate is not None:
            rivals[summary.metric, summary.steps].append(summary)
    best = {key: _best(group).model for key, group in rivals.items() if len(group) > 1}
    num_pairs = sum(comb(len(rivals[key]), 2) for key in best)
    worse = _worse_than_best(best, num_pairs, compared_with)
    marks: dict[tuple[str, str, int], Mark] = {}
    for (metric, steps), winner in best.items():
        for summary in rivals[metric, steps]:
            key = (metric, summary.model, steps)
            if key not in worse:
                marks[key] = "best" if summary.model == winner else "level"
    return marks


def _worse_than_best(
    best: Mapping[tuple[str, int], str], num_pairs: int, compared_with: ComparedWith
) -> set[tuple[str, str, int]]:
    """(metric, model, steps) of those whose difference from the best holds after Holm's correction over all pairs.

    The best was chosen by looking, so every pair counts, not only those with the best. Pairs that were not tested
    enter with p = 1, which can only make the others' corrected p larger.
    """
    tested = [
        c
        for winner in sorted(set(best.values()))
        for c in compared_with(winner)
        if best.get((c.metric, c.steps)) == winner
    ]
    untested = [1.0] * (num_pairs - len(tested))
    corrected = holm([c.difference.p_value for c in tested] + untested)[: len(tested)]
    return {(c.metric, c.model, c.steps) for c, p in zip(tested, corrected, strict=True) if p < ALPHA}


def _best(group: Sequence[Summary]) -> Summary:
    sign = 1.0 if group[0].info.direction == "higher" else -1.0
    return max(group, key=lambda s: sign * s.estimate.value if s.estimate else float("-inf"))


def to_differences(found: Iterable[Comparison]) -> tuple[Difference, ...]:
    """Comparisons as a report shows them."""
    return tuple(
        Difference(
            metric=c.metric,
            model=c.model,
            steps=c.steps,
            baseline=c.baseline,
            value=c.difference.value,
            low=_finite(c.difference.low),
            high=_finite(c.difference.high),
            n=c.difference.n,
            num_prompts=c.difference.num_clusters,
            p_value=c.difference.p_value,
            p_holm=c.p_holm,
            verdict=c.verdict,
            detectable=_finite(c.detectable),
        )
        for c in found
    )


def _latencies(rows: Iterable[TimingRow]) -> tuple[Latency, ...]:
    """Median and quartiles per stage, at the smallest batch size that was timed."""
    groups: dict[tuple[str, int, str], dict[int, list[TimingRow]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row.model, row.steps, row.stage][row.batch_size].append(row)
    latencies = []
    for (model, steps, stage), by_batch in sorted(groups.items()):
        batch_size = min(by_batch)
        timed = by_batch[batch_size]
        times_ms = [1000 * row.seconds / batch_size for row in timed]
        q1, median, q3 = quantiles(times_ms, n=4, method="inclusive") if len(times_ms) > 1 else times_ms * 3
        latencies.append(Latency(model, steps, stage, median, q1, q3, len(timed), batch_size, timed[0].device))
    return tuple(latencies)


def _memories(rows: Iterable[CostRow]) -> tuple[Memory, ...]:
    """Peak memory, at the smallest batch size that was measured."""
    smallest: dict[tuple[str, int], CostRow] = {}
    for row in rows:
        key = (row.model, row.steps)
        if row.name == "peak-memory" and (key not in smallest or row.batch_size < smallest[key].batch_size):
            smallest[key] = row
    return tuple(
        Memory(row.model, row.steps, row.value, row.batch_size, row.device) for _, row in sorted(smallest.items())
    )


def _fronts(view: View) -> tuple[FrontPoint, ...]:
    """Who is on the front of each per-image metric and each cost that was measured alike."""
    return tuple(
        FrontPoint(info.id, cost, row.model, row.steps, row.on_front)
        for info in view.infos
        if info.per_image
        for cost, rows in tradeoff(view, info).fronts.items()
        if cost != "steps"
        for row in rows
    )


def _cheapest(view: View, models: Sequence[Model]) -> Cheapest | None:
    """The cheapest that is nearly the best, by the first per-image metric that the fewest models were trained on."""
    per_image = [info for info in view.infos if info.per_image]
    if not per_image:
        return None
    info = min(per_image, key=lambda info: sum(model.was_trained_on(info.id) for model in models))
    points = step_curves(view, info)
    values = [point.summary.estimate.value for point in points if point.summary.estimate]
    if len(values) < 2:
        return None
    best = max(values) if info.direction == "higher" else min(values)
    delta, cost = DELTA_SHARE * abs(best), default_cost(points)
    try:
        found = cheapest_within(view, info, delta, cost)
    except InputError:  # too few prompts shared by all, or a best of zero: then nothing can be said
        return None
    model, steps = found.choice or ("", 0)
    return Cheapest(info.id, delta, cost, model, steps, sum(loss.within for loss in found.losses), found.n)


def _doubtful(store: RunStore, models: Sequence[Model]) -> list[str]:
    """Count the images that can't be trusted, by model and by what is wrong with them."""
    labels = {model.name: model.label for model in models}
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for found in doubtful_images(store):
        for defect, count in found.defects.items():
            counts[found.model, defect] += count
        counts[found.model, DUPLICATE] += found.duplicates
    return [
        f"{labels.get(model, model)}: {count} {'image is' if count == 1 else 'images are'} {what}; "
        f"{'counted here and scored' if what == DUPLICATE else 'counted here and left out of the scores'}."
        for (model, what), count in sorted(counts.items())
        if count
    ]


def _truncated(manifest: Mapping[str, Any]) -> list[str]:
    """Say how many prompts the text encoder does not read to their end."""
    cut = manifest.get("prompts", {}).get("truncated", {})
    if not cut.get("count"):
        return []
    return [f"{cut['count']} of {manifest['prompts']['count']} prompts are longer than the {cut['limit']} tokens that "
            "the text encoder reads; their ends are not drawn."]  # fmt: skip
