"""The measurements of a report: levels and their marks, paired differences, latency, memory, fronts, accord."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from math import comb, isfinite
from statistics import quantiles
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from hypersd_bench.contracts import MetricInfo
from hypersd_bench.errors import InputError
from hypersd_bench.store import CostRow, RunStore, TimingRow
from metrics.comparison import ALPHA, Comparison, Summary, View
from metrics.stats import clustered_mean, holm
from metrics.tradeoff import cheapest_within, default_cost, pareto_fronts, step_curves
from reports.data import Accord, Cell, Cheapest, Difference, FrontPoint, Latency, Mark, Memory, Model

DELTA_SHARE = 0.01  # of the best value: what "nearly the best" means where nobody says
MAX_ACCORD = 5  # metrics that are set beside each other

ComparedWith = Callable[[str], Sequence[Comparison]]  # baseline -> everybody's difference to it


class Measured(Protocol):
    """A row of a ledger about a model."""

    @property
    def model(self) -> str:
        """Its name in its run."""


Row = TypeVar("Row", bound=Measured)


def read_cells(view: View, models: Sequence[Model], compared_with: ComparedWith) -> tuple[Cell, ...]:
    """Every metric's level, by metric, step count and model, with its mark."""
    found = view.summaries
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


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def _rows(view: View, read: Callable[[RunStore], Iterable[Row]]) -> Iterator[tuple[str, Row]]:
    """Rows of all ledgers, each with what its model is called in the report."""
    names = {(view.stores.index(store), str(entry["name"])): name for name, store, entry in view.models}
    for i, store in enumerate(view.stores):
        for row in read(store):
            if (i, row.model) in names:
                yield names[i, row.model], row


def read_latencies(view: View) -> tuple[Latency, ...]:
    """Median and quartiles per stage, at the smallest batch size that was timed."""
    groups: dict[tuple[str, int, str], dict[int, list[TimingRow]]] = defaultdict(lambda: defaultdict(list))
    for name, row in _rows(view, RunStore.timings):
        if (name, row.steps) in view.images:
            groups[name, row.steps, row.stage][row.batch_size].append(row)
    latencies = []
    for (model, steps, stage), by_batch in sorted(groups.items()):
        batch_size = min(by_batch)
        timed = by_batch[batch_size]
        times_ms = [1000 * row.seconds / batch_size for row in timed]
        q1, median, q3 = quantiles(times_ms, n=4, method="inclusive") if len(times_ms) > 1 else times_ms * 3
        p90 = float(np.quantile(times_ms, 0.9))
        latencies.append(Latency(model, steps, stage, median, q1, q3, p90, len(timed), batch_size, timed[0].device))
    return tuple(latencies)


def read_memories(view: View) -> tuple[Memory, ...]:
    """Peak memory, at the smallest batch size that was measured."""
    smallest: dict[tuple[str, int], CostRow] = {}
    for name, row in _rows(view, RunStore.costs):
        key = (name, row.steps)
        is_smallest = key not in smallest or row.batch_size < smallest[key].batch_size
        if row.name == "peak-memory" and key in view.images and is_smallest:
            smallest[key] = row
    return tuple(Memory(*key, row.value, row.batch_size, row.device) for key, row in sorted(smallest.items()))


def read_fronts(view: View) -> tuple[FrontPoint, ...]:
    """Who is on the front of each per-image metric and each cost that was measured alike."""
    return tuple(
        FrontPoint(info.id, cost, row.model, row.steps, row.on_front)
        for info in view.infos
        if info.per_image
        for cost, rows in pareto_fronts(view, info, step_curves(view, info)).items()
        if cost != "steps"
        for row in rows
    )


def read_cheapest(view: View, models: Sequence[Model], within: float | None) -> Cheapest | None:
    """The cheapest that is nearly the best, by the first per-image metric that the fewest models were trained on.

    Raises InputError for a ``within`` that can't be asked.
    """
    per_image = [info for info in view.infos if info.per_image]
    if not per_image:
        return None
    info = min(per_image, key=lambda info: sum(model.was_trained_on(info.id) for model in models))
    points = step_curves(view, info)
    values = [point.summary.estimate.value for point in points if point.summary.estimate]
    if len(values) < 2:
        return None
    best = max(values) if info.direction == "higher" else min(values)
    delta, cost = DELTA_SHARE * abs(best) if within is None else within, default_cost(points)
    try:
        found = cheapest_within(view, info, delta, cost)
    except InputError:  # too few prompts shared by all, or a best of zero: then nothing can be said
        if within is not None:
            raise
        return None
    model, steps = found.choice or ("", 0)
    num_within = sum(loss.within for loss in found.losses)
    return Cheapest(info.id, delta, within is None, cost, model, steps, num_within, found.n)


def read_accords(view: View) -> tuple[Accord, ...]:
    """How often each two of the first per-image metrics agree on which of two models' images is better."""
    infos = [info for info in view.infos if info.per_image][:MAX_ACCORD]
    keys = sorted({key for info in infos for cell in view.cells for key in view.values(info.id, cell)})
    by_metric = {info.id: _signed_matrix(view, info, keys) for info in infos}
    rivals = [(i, j) for (i, a), (j, b) in combinations(enumerate(view.cells), 2) if a[1] == b[1]]
    found = []
    for a, b in combinations(by_metric, 2):
        shares = _alike(by_metric[a], by_metric[b], rivals)
        known = np.flatnonzero(~np.isnan(shares))
        if len(known):
            mean = clustered_mean(shares[known], [keys[k][0] for k in known])
            found.append(Accord(a, b, mean.value, _finite(mean.low), _finite(mean.high), mean.num_clusters))
    return tuple(found)


def _signed_matrix(view: View, info: MetricInfo, keys: Sequence[tuple[str, int]]) -> NDArray[np.float64]:
    """Values by image key and configuration, (K, C), larger is better; NaN where there is none."""
    sign = 1.0 if info.direction == "higher" else -1.0
    columns = [view.values(info.id, cell) for cell in view.cells]
    return sign * np.array([[of_cell.get(key, np.nan) for of_cell in columns] for key in keys])


def _alike(a: NDArray[np.float64], b: NDArray[np.float64], rivals: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
    """The share of rival pairs that both order alike, (K,); where one sees a tie it is half."""
    alike, count = np.zeros(len(a)), np.zeros(len(a))
    for i, j in rivals:
        product = np.sign(a[:, i] - a[:, j]) * np.sign(b[:, i] - b[:, j])
        known = ~np.isnan(product)
        alike[known] += (1 + product[known]) / 2
        count += known
    shares: NDArray[np.float64] = np.divide(alike, count, out=np.full(len(a), np.nan), where=count > 0)
    return shares
