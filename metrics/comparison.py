"""Levels and paired differences of runs, read from their ledgers and features. No torch: reports call this.

A difference is always model minus baseline, on the images that both have: same prompt, same noise, same step count.
Models of several runs stand side by side where the runs pair: same noise, same texts, metrics of the same version and
of the same reference.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from statistics import median
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hypersd_bench.contracts import MetricInfo
from hypersd_bench.errors import InputError, unknown_name
from hypersd_bench.features import Reference, read_features, read_reference
from hypersd_bench.store import ImageRow, RunStore, SetScoreRow
from metrics.replicate_cache import replicates_of
from metrics.set_statistics import STATISTICS, PreparedReference, subset_statistic
from metrics.stats import (
    Difference,
    Estimate,
    Replicates,
    VarianceSplit,
    clustered_mean,
    clustered_rate,
    holm,
    minimum_detectable_difference,
    paired_differences,
    variance_split,
)

Verdict = Literal["better", "worse", "no difference shown"]
Cell = tuple[str, int]  # model, steps
Key = tuple[str, int]  # prompt id, replicate: what models share
Pair = tuple[str, str, int]  # model, baseline, steps of both
CellPair = tuple[Cell, Cell]
ALPHA = 0.05
RATE = "rate"  # the unit of values in [0, 1]


@dataclass(frozen=True, slots=True)
class Summary:
    """A metric's level for a model at a step count; ``missing`` images are not in it, ``reason`` says why.

    Where none is missing, ``reason`` says why a set metric has no interval, if it has none.
    """

    metric: str
    info: MetricInfo
    model: str
    steps: int
    estimate: Estimate | None
    missing: int
    reason: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Model against baseline at the same step count.

    difference: model minus baseline. p_holm: corrected over all comparisons of the run. verdict: of the model.
    detectable: the smallest true difference that this n shows with 80 % power, at ALPHA over the number of comparisons
    (on the safe side of Holm's steps); NaN where there is no interval, or no spread to tell it by.
    """

    metric: str
    model: str
    steps: int
    baseline: str
    difference: Difference
    p_holm: float
    verdict: Verdict
    detectable: float = np.nan


@dataclass(frozen=True, slots=True)
class Spread:
    """How a metric's paired differences spread: medians over the comparisons, in the metric's unit.

    between, within: standard deviations between prompts, and between seeds of one prompt. now, twice_the_prompts,
    twice_the_seeds, one_seed (as many images, each of another prompt): the smallest true difference that would be shown
    with 80 % power, as ``Comparison.detectable``. num_comparisons: those with several seeds, which tell.
    """

    metric: str
    between: float
    within: float
    now: float
    twice_the_prompts: float
    twice_the_seeds: float
    one_seed: float
    num_comparisons: int


def summaries(of: RunStore | View) -> list[Summary]:
    """Every metric's level for every model and step count, in the manifest's order of metrics and models."""
    return list(_view(of).summaries)


def comparisons(of: RunStore | View, baseline: str | None = None) -> list[Comparison]:
    """Compare every model to the baseline (default: the run's own) wherever both have the step count and scores."""
    view = _view(of)
    baseline = baseline or view.baseline
    if not baseline:
        raise InputError(f"{view.name} names no baseline; choose one with --against MODEL")
    models = {model for model, _ in view.cells}
    if baseline not in models:
        raise unknown_name("model", baseline, models, view.name)
    return _compared(view, [(model, baseline, steps) for model, steps in view.cells if model != baseline])


def contrasts(of: RunStore | View, pairs: Iterable[Pair]) -> list[Comparison]:
    """Compare chosen pairs, (model, baseline, steps), wherever both have scores; one that has none is left out."""
    view = _view(of)
    return _compared(view, [pair for pair in pairs if (pair[0], pair[2]) in view.images])


def spreads(of: RunStore | View, found: Sequence[Comparison]) -> list[Spread]:
    """The spread of each per-image metric's differences, where they have several seeds and differ at all.

    found: all comparisons of the run; what could be shown is corrected over their number.
    """
    view = _view(of)
    of_metrics = [(info, [c for c in found if c.metric == info.id]) for info in view.infos if info.per_image]
    known = [_spread(view, info, of_metric, len(found)) for info, of_metric in of_metrics]
    return [spread for spread in known if spread]


def corrected(found: Sequence[Comparison], infos: Mapping[str, MetricInfo]) -> list[Comparison]:
    """The same comparisons, judged after Holm's correction over all of them."""
    adjusted = holm([comparison.difference.p_value for comparison in found])
    return [
        replace(
            c,
            p_holm=p,
            verdict=verdict(c.difference.value, p, infos[c.metric].direction == "higher"),
            detectable=_detectable(c.difference.error, len(found)),
        )
        for c, p in zip(found, adjusted, strict=True)
    ]


def verdict(difference: float, p: float, higher_is_better: bool) -> Verdict:
    """Say what a corrected p-value lets one say of the model."""
    if p >= ALPHA or difference == 0:
        return "no difference shown"
    return "better" if (difference > 0) == higher_is_better else "worse"


def is_trained_on(targets: Iterable[str], metric: str) -> bool:
    """Whether what a model was optimised for, metrics by id or by family, names this metric."""
    return not {metric, metric.split("/")[0]}.isdisjoint(targets)


class View:
    """The models of one or several runs side by side: images by model and step count, values by image.

    A model whose name is in two runs is called ``run:model``, the run by its folder's name. metrics and steps: the only
    ones wanted; all unless given. Raises InputError for unknown ones, and where the runs don't pair: another seed,
    another text for a prompt, a metric of another version, of other weights or of another reference.
    """

    def __init__(self, stores: Sequence[RunStore], metrics: Collection[str] = (), steps: Collection[int] = ()) -> None:
        """Read the ledgers."""
        self.stores = list(stores)
        self.name = ", ".join(str(store.folder) for store in stores)
        self.only_steps = tuple(steps)
        self.run_names = _run_names(stores)
        self._labels = _labels(stores, self.run_names)
        self.images: dict[Cell, list[ImageRow]] = {}
        self._origin: dict[Cell, int] = {}
        for i, store in enumerate(stores):
            self._read_images(i, store, steps)
        if steps and (absent := set(steps) - {count for _, count in self.images}):
            raise InputError(f"no images at {_listed(map(str, sorted(absent)))} steps in {self.name}; see --steps")
        self.cells = self._ordered()
        self.asked = [{str(raw["id"]): MetricInfo(**raw) for raw in store.manifest["metrics"]} for store in stores]
        known = {metric_id: info for asked in reversed(self.asked) for metric_id, info in asked.items()}
        for wanted in metrics:
            if wanted not in known:
                raise unknown_name("metric", wanted, known, self.name)
        order = dict.fromkeys(metric_id for asked in self.asked for metric_id in asked)
        self.infos = [known[metric_id] for metric_id in order if not metrics or metric_id in metrics]
        self._scores = [{info.id: store.scores(info.id) for info in self.infos if info.per_image} for store in stores]
        self.set_scores = [{(r.metric, r.model, r.steps): r for r in store.set_scores()} for store in stores]
        self._references: dict[tuple[str, str], PreparedReference] = {}
        self._feature_keys: dict[tuple[str, Cell], list[Key]] = {}
        self._known_replicates: dict[tuple[str, Cell, tuple[Key, ...]], Replicates | None] = {}
        self._known_values: dict[tuple[str, Cell], dict[Key, float]] = {}
        if len(stores) > 1:
            _require_pairing(self)

    @property
    def baseline(self) -> str:
        """The first run's own baseline; empty where it names none."""
        return self._labels[0].get(str(self.stores[0].manifest.get("baseline") or ""), "")

    @property
    def trained_on(self) -> dict[str, list[str]]:
        """What each model was optimised for, metrics by id or by family."""
        return {name: list(entry.get("trained_on", ())) for name, _, entry in self.models}

    @cached_property
    def summaries(self) -> list[Summary]:
        """Every metric's level for every configuration that its run asks it for."""
        return [_summary(self, info, cell) for info in self.infos for cell in self.cells if self.asks(info.id, cell)]

    @property
    def models(self) -> list[tuple[str, RunStore, dict[str, Any]]]:
        """What each model is called here, its run, and its entry in that run's manifest."""
        return [
            (labels[str(entry["name"])], store, entry)
            for store, labels in zip(self.stores, self._labels, strict=True)
            for entry in store.manifest["models"]
        ]

    def origin(self, cell: Cell) -> tuple[RunStore, str]:
        """The run that a configuration is of, and the model's name there."""
        return self.stores[self._origin[cell]], self.images[cell][0].model

    def asks(self, metric: str, cell: Cell) -> bool:
        """Whether the configuration's run is scored by this metric."""
        return metric in self.asked[self._origin[cell]]

    def version(self, run: int, metric: str) -> str:
        """Version of the metric that the scores of a run are of."""
        scored = self.stores[run].manifest.get("scored_versions", {})
        return str(scored.get(metric, self.asked[run][metric].version))

    def values(self, metric: str, cell: Cell) -> dict[Key, float]:
        """The values there are, by prompt and replicate; not to be changed."""
        if (metric, cell) not in self._known_values:
            found = self._scored(metric, cell)
            self._known_values[metric, cell] = {(r.prompt_id, r.replicate): v for r, v, _ in found if v is not None}
        return self._known_values[metric, cell]

    def reasons(self, metric: str, cell: Cell) -> str:
        """Why images have no value: ``black (2), not scored (1)``."""
        return _counted([reason for _, value, reason in self._scored(metric, cell) if value is None])

    def set_score(self, metric: str, cell: Cell) -> SetScoreRow | None:
        """A set metric's row."""
        return self.set_scores[self._origin[cell]].get((metric, self.images[cell][0].model, cell[1]))

    def features(self, info: MetricInfo, cell: Cell) -> dict[Key, NDArray[np.float32]]:
        """Features of the sound images that have some, by prompt and replicate; none for a metric without statistic."""
        if not info.features or info.statistic not in STATISTICS:
            return {}
        store, model = self.origin(cell)
        fingerprint = str(store.manifest.get("extractors", {}).get(info.features, ""))
        kept = read_features(store.folder, info.features, model, cell[1], fingerprint)
        rows = (row for row in self.images[cell] if not row.defect and row.sha256 in kept)
        return {(row.prompt_id, row.replicate): kept[row.sha256] for row in rows}

    def feature_keys(self, info: MetricInfo, cell: Cell) -> list[Key]:
        """Prompt and replicate of the images that have features, in order."""
        known = (info.id, cell)
        if known not in self._feature_keys:
            self._feature_keys[known] = sorted(self.features(info, cell))
        return self._feature_keys[known]

    def replicates(self, info: MetricInfo, cell: Cell, keys: Sequence[Key] | None = None) -> Replicates | None:
        """A set metric with each group of prompts left out, on the images of these keys (all sound ones unless given).

        None where features, the reference that the score is of, or a statistic are missing. What was computed in this
        process is not computed again: it is found by the content of features and reference.
        """
        keys = self.feature_keys(info, cell) if keys is None else keys
        known = (info.id, cell, tuple(keys))
        if known not in self._known_replicates:
            row, has_all = self.set_score(info.id, cell), set(self.feature_keys(info, cell)).issuperset(keys)
            reference = self._reference(info, cell, row.reference) if row and keys and has_all else None
            self._known_replicates[known] = (
                _replicates(info, self.features(info, cell), keys, reference) if reference else None
            )
        return self._known_replicates[known]

    def kept_reference(self, info: MetricInfo, cell: Cell) -> Reference | None:
        """The reference that the configuration's run keeps for a set metric; None where there is none."""
        store, _ = self.origin(cell)
        row = self.set_score(info.id, cell)
        fingerprint = str(store.manifest.get("extractors", {}).get(info.features, ""))
        return read_reference(store.folder, info.features, row.reference, fingerprint) if row else None

    def _reference(self, info: MetricInfo, cell: Cell, reference_id: str) -> PreparedReference | None:
        known = (info.features, reference_id)
        if known not in self._references:
            kept = self.kept_reference(info, cell)
            if kept is None or kept.id != reference_id:
                return None
            self._references[known] = PreparedReference(kept.values)
        reference = self._references[known]
        return None if reference.moments is not None and info.statistic != "frechet" else reference

    def _scored(self, metric: str, cell: Cell) -> list[tuple[ImageRow, float | None, str]]:
        scores = self._scores[self._origin[cell]].get(metric, {})
        found = ((row, scores.get(row.id or 0)) for row in self.images[cell])
        return [(row, score.value, score.reason) if score else (row, None, row.defect) for row, score in found]

    def _read_images(self, i: int, store: RunStore, steps: Collection[int]) -> None:
        found: dict[Cell, list[ImageRow]] = defaultdict(list)
        for row in store.images():
            if row.model not in self._labels[i]:
                raise InputError(
                    f"{store.folder} has images of {row.model!r}, a model that run.json does not name; put back the "
                    "run.json that they were made with, or run into another folder"
                )
            if not steps or row.steps in steps:
                found[self._labels[i][row.model], row.steps].append(row)
        self.images |= found
        self._origin |= dict.fromkeys(found, i)

    def _ordered(self) -> list[Cell]:
        order = {label: n for n, label in enumerate(label for labels in self._labels for label in labels.values())}
        return sorted(self.images, key=lambda cell: (order[cell[0]], cell[1]))


def _view(of: RunStore | View) -> View:
    return of if isinstance(of, View) else View([of])


def _run_names(stores: Sequence[RunStore]) -> list[str]:
    """What the runs are called: their folders' names, their paths where two have one name."""
    folders = [store.folder.resolve() for store in stores]
    if len(set(folders)) < len(folders):
        raise InputError("a run is named twice; name each once")
    short = [folder.name for folder in folders]
    return [name if short.count(name) == 1 else str(store.folder) for name, store in zip(short, stores, strict=True)]


def _labels(stores: Sequence[RunStore], run_names: Sequence[str]) -> list[dict[str, str]]:
    """What the models of each run are called among all."""
    names = [[str(model["name"]) for model in store.manifest["models"]] for store in stores]
    counts = Counter(name for of_run in names for name in set(of_run))
    return [
        {name: name if counts[name] == 1 else f"{run}:{name}" for name in of_run}
        for run, of_run in zip(run_names, names, strict=True)
    ]


def _require_pairing(view: View) -> None:
    """Raise InputError where values of two runs can't be set side by side."""
    first, *others = view.stores
    for other in others:
        seeds = [store.manifest["spec"].get("seed") for store in (first, other)]
        if seeds[0] != seeds[1]:
            raise InputError(
                f"{first.folder} is of seed {seeds[0]}, {other.folder} of {seeds[1]}: other noise doesn't pair; "
                "compare each alone, or run one again with the other's seed"
            )
    for info in view.infos:
        for runs in combinations(range(len(view.stores)), 2):  # any two: the first may lack the metric
            _require_same_protocol(view, info, runs)
    _require_same_prompts(view)


def _require_same_prompts(view: View) -> None:
    known: dict[str, ImageRow] = {}
    seeds: dict[Key, int] = {}
    for cell in view.cells:
        folder = view.origin(cell)[0].folder
        for row in view.images[cell]:
            before = known.setdefault(row.prompt_id, row)
            if before.prompt != row.prompt:
                raise InputError(
                    f"{row.prompt_id} is {row.prompt!r} in {folder} and {before.prompt!r} in another run: images of "
                    "other prompts don't pair; give runs of one prompt set"
                )
            if seeds.setdefault((row.prompt_id, row.replicate), row.seed) != row.seed:
                raise InputError(
                    f"{row.prompt_id} has other noise in {folder} than in another run: such images don't pair; run one "
                    "again with the other's seed"
                )


def _require_same_protocol(view: View, info: MetricInfo, runs: tuple[int, int]) -> None:
    """Raise InputError where two runs are scored by one metric in two ways."""
    if not all(info.id in view.asked[run] for run in runs):
        return
    weights = [str(view.stores[run].manifest.get("extractors", {}).get(info.features, "")) for run in runs]
    references = {
        row.reference
        for run in runs
        for row in view.set_scores[run].values()
        if row.metric == info.id and row.value is not None
    }
    of_two = {
        "version": {view.version(run, info.id) for run in runs},
        "weights": set(weights) if all(weights) else set(),
        "reference": references,
    }
    for what, found in of_two.items():
        if len(found) > 1:
            raise InputError(
                f"{info.id}: {_listed(view.stores[run].folder for run in runs)} are scored with another {what} "
                f"({_listed(one[:40] for one in sorted(found))}): such numbers are never compared; score both again "
                "with hypersd-bench score, or leave the metric out with --metrics"
            )


def _summary(view: View, info: MetricInfo, cell: Cell) -> Summary:
    num_images = len(view.images[cell])
    if info.per_image:
        values = view.values(info.id, cell)
        mean = clustered_rate if info.unit == RATE else clustered_mean
        estimate = mean(list(values.values()), [prompt for prompt, _ in values]) if values else None
        return Summary(info.id, info, *cell, estimate, num_images - len(values), view.reasons(info.id, cell))
    row = view.set_score(info.id, cell)
    if row is None or row.value is None:
        reason = (row.reason if row else "") or "not scored"
        return Summary(info.id, info, *cell, None, num_images, reason)
    defects = [image.defect for image in view.images[cell] if image.defect]
    missing = num_images - row.num_images  # images newer than the score are missing too
    reason = _counted(defects + [""] * (missing - len(defects)))
    estimate, why = _set_estimate(view, info, cell, row, row.value)
    return Summary(info.id, info, *cell, estimate, missing, reason or why)


def _set_estimate(view: View, info: MetricInfo, cell: Cell, row: SetScoreRow, value: float) -> tuple[Estimate, str]:
    """The statistic with its jackknife interval; else the recorded value without one, and why."""
    found = view.replicates(info, cell)
    if found is None:
        why = _why_no_replicates(view, info, cell, row)
    elif found.n != row.num_images:
        why = f"features of {found.n} images are kept, the score is of {row.num_images}; score again"
    else:
        estimate = found.estimate()
        return estimate, "no interval: too few prompts" if np.isnan(estimate.low) else ""
    num_prompts = len({image.prompt_id for image in view.images[cell]})
    return Estimate(value, np.nan, np.nan, row.num_images, num_prompts), f"no interval: {why}"


def _why_no_replicates(view: View, info: MetricInfo, cell: Cell, row: SetScoreRow) -> str:
    if not info.features or info.statistic not in STATISTICS:
        return "the metric is no statistic of kept features"
    if not view.feature_keys(info, cell):
        return "the run keeps no features of these images and weights; score again"
    kept = view.kept_reference(info, cell)
    if kept is None:
        return "the run keeps no reference's features of these weights; score again"
    if kept.id != row.reference:
        return "the run keeps another reference's features; score again"
    return "the reference is kept as mean and covariance alone, which this statistic is not computed from"


def _compared(view: View, pairs: Sequence[Pair]) -> list[Comparison]:
    cells = [((model, steps), (baseline, steps)) for model, baseline, steps in pairs]
    found = [
        Comparison(info.id, *cell, baseline, difference, 1.0, "no difference shown")
        for info in view.infos
        for (cell, (baseline, _)), difference in zip(cells, differences(view, info, cells), strict=True)
        if difference is not None
    ]
    return corrected(found, {info.id: info for info in view.infos})


def differences(
    view: View, info: MetricInfo, pairs: Sequence[CellPair], intervals: bool = True
) -> list[Difference | None]:
    """Difference of each pair of configurations, first minus second, on the images that both have a value for.

    None where they share none, or where a set metric has no features, or another reference. intervals: see
    ``paired_differences``.
    """
    known = [pair for pair in pairs if all(cell in view.images for cell in pair)]
    found: dict[CellPair, Difference] = {}
    if info.per_image:
        found = _image_differences(view, info, known, intervals)
    else:
        for pair in known:
            difference = _set_difference(view, info, *pair)
            if difference is not None:
                found[pair] = difference
    return [found.get(pair) for pair in pairs]


def _spread(view: View, info: MetricInfo, found: Sequence[Comparison], num_comparisons: int) -> Spread | None:
    """The median split over a metric's comparisons; None where no prompt has two seeds, or nothing differs."""
    values = {cell: view.values(info.id, cell) for c in found for cell in ((c.model, c.steps), (c.baseline, c.steps))}
    splits = []
    for c in found:
        a, b = values[c.model, c.steps], values[c.baseline, c.steps]
        keys = sorted(a.keys() & b.keys())
        split = variance_split([a[key] - b[key] for key in keys], [prompt for prompt, _ in keys])
        if not np.isnan(split.between):
            splits.append(split)
    if not splits:
        return None
    between, within = median(s.between for s in splits), median(s.within for s in splits)
    if between + within == 0:
        return None
    prompts, seeds = median(s.num_clusters for s in splits), median(s.n / s.num_clusters for s in splits)
    payoff = VarianceSplit(between, within, splits[0].num_clusters, splits[0].n).payoff(prompts, seeds)

    def shown(variance: float) -> float:
        return _detectable(variance**0.5, num_comparisons)

    return Spread(
        info.id, between**0.5, within**0.5,
        now=shown(payoff.now),
        twice_the_prompts=shown(payoff.twice_the_prompts),
        twice_the_seeds=shown(payoff.twice_the_seeds),
        one_seed=shown(payoff.one_seed),
        num_comparisons=len(splits),
    )  # fmt: skip


def _image_differences(
    view: View, info: MetricInfo, pairs: Sequence[CellPair], intervals: bool
) -> dict[CellPair, Difference]:
    """All pairs in one matrix of prompts and pairs, so that they share the resamples."""
    values = {cell: view.values(info.id, cell) for cell in dict.fromkeys(cell for pair in pairs for cell in pair)}
    keys = sorted(set().union(*values.values())) if values else []
    if not keys:
        return {}
    by_image = {cell: np.array([of_cell.get(key, np.nan) for key in keys]) for cell, of_cell in values.items()}
    difference = np.stack([by_image[a] - by_image[b] for a, b in pairs], axis=1)
    known = ~np.isnan(difference)
    starts = [i for i, key in enumerate(keys) if i == 0 or key[0] != keys[i - 1][0]]  # of each prompt's images
    counts = np.add.reduceat(known, starts, axis=0, dtype=np.intp)
    sums = np.add.reduceat(np.where(known, difference, 0.0), starts, axis=0)
    d = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    shared = np.flatnonzero(counts.any(axis=0))
    if not len(shared):
        return {}
    prompts = np.flatnonzero(counts.any(axis=1))
    sizes = counts[:, shared].sum(axis=0).tolist()
    found = paired_differences(d[np.ix_(prompts, shared)], sizes, intervals=intervals)
    return {pairs[c]: one for c, one in zip(shared.tolist(), found, strict=True)}


def _set_difference(view: View, info: MetricInfo, cell: Cell, baseline: Cell) -> Difference | None:
    rows = [view.set_score(info.id, c) for c in (cell, baseline)]
    if any(row is None or row.value is None for row in rows) or len({row.reference for row in rows if row}) > 1:
        return None
    keys = sorted(set(view.feature_keys(info, cell)).intersection(view.feature_keys(info, baseline)))
    if len(keys) < 2:
        return None
    a, b = (view.replicates(info, c, keys) for c in (cell, baseline))
    return (a - b).difference() if a is not None and b is not None else None


def _replicates(
    info: MetricInfo, features: Mapping[Key, NDArray[np.float32]], keys: Sequence[Key], reference: PreparedReference
) -> Replicates:
    x, clusters = np.stack([features[key] for key in keys]), [prompt for prompt, _ in keys]
    content = hashlib.sha256(f"{info.statistic} {info.version}\n{reference.digest}\n{clusters}\n{x.shape}\n".encode())
    content.update(np.ascontiguousarray(x).data)
    return replicates_of(content.hexdigest(), lambda: subset_statistic(info.statistic, x, reference), clusters)


def _detectable(error: float, num_comparisons: int) -> float:
    found = minimum_detectable_difference(error, 1, alpha=ALPHA, comparisons=num_comparisons)
    return found if found > 0 else np.nan


def _counted(reasons: Sequence[str]) -> str:
    counts = Counter(reason or "not scored" for reason in reasons)
    return ", ".join(f"{reason} ({count})" for reason, count in sorted(counts.items()))


def _listed(words: Iterable[Any]) -> str:
    *most, last = map(str, words)
    return f"{', '.join(most)} and {last}" if most else last
