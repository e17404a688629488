"""Levels and paired differences of a run, read from its ledger and features. No torch: reports call this.

A difference is always model minus baseline, on the images that both have: same prompt, same noise, same step count.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hypersd_bench.contracts import MetricInfo
from hypersd_bench.errors import unknown_name
from hypersd_bench.store import ImageRow, RunStore, SetScoreRow
from metrics.frechet import subset_distance
from metrics.stats import (
    Difference,
    Estimate,
    clustered_mean,
    clustered_rate,
    grouped_jackknife,
    holm,
    jackknife_difference,
    paired_difference,
)

Verdict = Literal["better", "worse", "no difference shown"]
Cell = tuple[str, int]  # model, steps
Key = tuple[str, int]  # prompt id, replicate: what models share
Pair = tuple[str, str, int]  # model, baseline, steps of both
ALPHA = 0.05
RATE = "rate"  # the unit of values in [0, 1]
FRECHET = "fid/"  # set metrics of this family are Fréchet distances of their features


@dataclass(frozen=True, slots=True)
class Summary:
    """A metric's level for a model at a step count; ``missing`` images are not in it, ``reason`` says why."""

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
    """

    metric: str
    model: str
    steps: int
    baseline: str
    difference: Difference
    p_holm: float
    verdict: Verdict


def summaries(store: RunStore) -> list[Summary]:
    """Every metric's level for every model and step count, in the manifest's order of metrics and models."""
    run = _Run(store)
    return [_summary(run, info, cell) for info in run.infos for cell in run.cells]


def comparisons(store: RunStore, baseline: str | None = None) -> list[Comparison]:
    """Compare every model to the baseline (default: the run's own) wherever both have the step count and scores."""
    run = _Run(store)
    baseline = baseline or str(store.manifest["baseline"])
    models = {model for model, _ in run.cells}
    if baseline not in models:
        raise unknown_name("model", baseline, models, str(store.folder))
    return _compared(run, [(model, baseline, steps) for model, steps in run.cells if model != baseline])


def contrasts(store: RunStore, pairs: Iterable[Pair]) -> list[Comparison]:
    """Compare chosen pairs, (model, baseline, steps), wherever both have scores; one that has none is left out."""
    run = _Run(store)
    return _compared(run, [pair for pair in pairs if (pair[0], pair[2]) in run.images])


def _compared(run: _Run, pairs: Sequence[Pair]) -> list[Comparison]:
    found = [
        Comparison(info.id, model, steps, baseline, difference, 1.0, "no difference shown")
        for info in run.infos
        for model, baseline, steps in pairs
        if (difference := _difference(run, info, (model, steps), (baseline, steps)))
    ]
    return corrected(found, {info.id: info for info in run.infos})


def corrected(found: Sequence[Comparison], infos: Mapping[str, MetricInfo]) -> list[Comparison]:
    """The same comparisons, judged after Holm's correction over all of them."""
    adjusted = holm([comparison.difference.p_value for comparison in found])
    return [
        replace(c, p_holm=p, verdict=verdict(c.difference.value, p, infos[c.metric].direction == "higher"))
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


class _Run:
    """A run's images by model and step count, and its values by image."""

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self.infos = [MetricInfo(**raw) for raw in store.manifest["metrics"]]
        self.images: dict[Cell, list[ImageRow]] = defaultdict(list)
        for row in store.images():
            self.images[row.model, row.steps].append(row)
        order = [str(model["name"]) for model in store.manifest["models"]]
        self.cells = sorted(self.images, key=lambda cell: (order.index(cell[0]), cell[1]))
        self.scores = {info.id: store.scores(info.id) for info in self.infos if info.per_image}
        self.set_scores = {(row.metric, row.model, row.steps): row for row in store.set_scores()}

    def values(self, metric: str, cell: Cell) -> dict[Key, float]:
        """The values there are, by prompt and replicate."""
        scored = ((row, self.scores[metric].get(row.id or 0)) for row in self.images[cell])
        return {(r.prompt_id, r.replicate): s.value for r, s in scored if s is not None and s.value is not None}

    def reasons(self, metric: str, cell: Cell) -> str:
        """Why images have no value: ``black (2), not scored (1)``."""
        scored = ((row, self.scores[metric].get(row.id or 0)) for row in self.images[cell])
        return _counted([s.reason if s else row.defect for row, s in scored if s is None or s.value is None])

    def features(self, metric: str, cell: Cell) -> dict[Key, NDArray[np.float32]] | None:
        """Features by prompt and replicate; None when they are missing or not of the images there are."""
        path = self.store.features_path(metric, *cell)
        rows = [row for row in self.images[cell] if not row.defect]
        if not path.exists():
            return None
        features: NDArray[np.float32] = np.load(path, allow_pickle=False)
        if len(features) != len(rows):
            return None
        return {(row.prompt_id, row.replicate): x for row, x in zip(rows, features, strict=True)}

    def reference(self, metric: str) -> NDArray[np.float32] | None:
        """A set metric's reference features, (M, d)."""
        path = self.store.features_path(metric, "reference", 0).with_name("reference.npy")
        return np.load(path, allow_pickle=False) if path.exists() else None


def _summary(run: _Run, info: MetricInfo, cell: Cell) -> Summary:
    num_images = len(run.images[cell])
    if info.per_image:
        values = run.values(info.id, cell)
        mean = clustered_rate if info.unit == RATE else clustered_mean
        estimate = mean(list(values.values()), [prompt for prompt, _ in values]) if values else None
        return Summary(info.id, info, *cell, estimate, num_images - len(values), run.reasons(info.id, cell))
    row = run.set_scores.get((info.id, *cell))
    if row is None or row.value is None:
        reason = (row.reason if row else "") or "not scored"
        return Summary(info.id, info, *cell, None, num_images, reason)
    defects = [image.defect for image in run.images[cell] if image.defect]
    missing = num_images - row.num_images  # images newer than the score are missing too
    reason = _counted(defects + [""] * (missing - len(defects)))
    return Summary(info.id, info, *cell, _set_estimate(run, info.id, cell, row), missing, reason)


def _set_estimate(run: _Run, metric: str, cell: Cell, row: SetScoreRow) -> Estimate:
    """The distance with its jackknife interval; without features on disk, the recorded value without one."""
    features, reference = run.features(metric, cell), run.reference(metric)
    if features is None or reference is None or not metric.startswith(FRECHET):
        prompts = {image.prompt_id for image in run.images[cell]}
        return Estimate(float(row.value or 0.0), np.nan, np.nan, row.num_images, len(prompts))
    distance = subset_distance(np.stack(list(features.values())), reference)
    return grouped_jackknife(distance, [prompt for prompt, _ in features])


def _difference(run: _Run, info: MetricInfo, cell: Cell, baseline: Cell) -> Difference | None:
    if baseline not in run.images:
        return None
    if not info.per_image:
        return _set_difference(run, info.id, cell, baseline)
    a, b = run.values(info.id, cell), run.values(info.id, baseline)
    keys = _shared(a, b)
    return paired_difference([a[k] for k in keys], [b[k] for k in keys], [k[0] for k in keys]) if keys else None


def _set_difference(run: _Run, metric: str, cell: Cell, baseline: Cell) -> Difference | None:
    a, b, reference = run.features(metric, cell), run.features(metric, baseline), run.reference(metric)
    if a is None or b is None or reference is None or not metric.startswith(FRECHET):
        return None
    keys = _shared(a, b)
    if len(keys) < 2:
        return None
    of_a = subset_distance(np.stack([a[k] for k in keys]), reference)
    of_b = subset_distance(np.stack([b[k] for k in keys]), reference)
    return jackknife_difference(lambda indices: of_a(indices) - of_b(indices), [k[0] for k in keys])


def _counted(reasons: Sequence[str]) -> str:
    counts = Counter(reason or "not scored" for reason in reasons)
    return ", ".join(f"{reason} ({count})" for reason, count in sorted(counts.items()))


def _shared(a: dict[Key, Any], b: dict[Key, Any]) -> Sequence[Key]:
    return sorted(a.keys() & b.keys())
