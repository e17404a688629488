"""Quality against what it costs: step curves, Pareto fronts, and the cheapest configuration that is good enough.

A configuration is a model at a step count; its cost is steps, latency or memory. Costs are taken as measured, quality
with its uncertainty: nothing is called worse that isn't shown to be. No torch: reports call this.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from hypersd_bench.contracts import MetricInfo
from hypersd_bench.errors import InputError, unknown_name
from hypersd_bench.store import CostRow, TimingRow
from metrics.comparison import ALPHA, Cell, Key, Summary, View, differences, is_trained_on, summaries
from metrics.stats import (
    MIN_CLUSTERS,
    NUM_RESAMPLES,
    RESAMPLING_SEED,
    Difference,
    bootstrap_means,
    holm,
)

CostName = Literal["latency", "memory", "steps"]
COSTS: tuple[CostName, ...] = get_args(CostName)
Row = TypeVar("Row", TimingRow, CostRow)


@dataclass(frozen=True, slots=True)
class Measured:
    """A cost as it was measured; only what was measured on one device at one batch size is compared."""

    value: float
    device: str
    batch_size: int


@dataclass(frozen=True, slots=True)
class Point:
    """A configuration: quality, and what it costs; None where it was not measured.

    latency: median milliseconds per image, end to end, at the smallest batch that was timed. memory: peak, bytes.
    trained_on: whether the model was optimised for this metric.
    """

    model: str
    steps: int
    summary: Summary
    latency: Measured | None
    memory: Measured | None
    trained_on: bool

    @property
    def cell(self) -> Cell:
        """What it is called elsewhere."""
        return self.model, self.steps

    def cost(self, name: CostName) -> float | None:
        """Its cost of this kind."""
        if name == "steps":
            return float(self.steps)
        measured = self.latency if name == "latency" else self.memory
        return measured.value if measured else None


@dataclass(frozen=True, slots=True)
class Gain:
    """What a model gains for each step from one of its step counts to the next; above zero is better.

    p_holm: corrected over all gains of the metric. per_step: difference, interval and error over the added steps.
    """

    model: str
    from_steps: int
    to_steps: int
    per_step: Difference
    p_holm: float


@dataclass(frozen=True, slots=True)
class FrontRow:
    """A configuration's place: beaten_by names one that costs no more and is shown to be better, None on the front.

    nominal: on the front of the point estimates alone, as it is usually drawn.
    """

    model: str
    steps: int
    cost: float
    beaten_by: Cell | None
    nominal: bool

    @property
    def on_front(self) -> bool:
        """Whether nothing beats it."""
        return self.beaten_by is None


@dataclass(frozen=True, slots=True)
class Loss:
    """How much worse a configuration is than the best of all, whichever that is; never below zero.

    cost: None where it was not measured. value: of the point estimates. upper: one-sided 95 % bound of this one alone.
    p_holm: of "worse by more than delta", corrected over all configurations. within: whether that is ruled out.
    """

    model: str
    steps: int
    cost: float | None
    value: float
    upper: float
    p_holm: float
    within: bool


@dataclass(frozen=True, slots=True)
class Cheapest:
    """The answer to "what is the cheapest that is within delta of the best at 95 %?"; choice None where nothing is."""

    metric: str
    delta: float
    cost: CostName
    n: int
    num_prompts: int
    choice: Cell | None
    losses: tuple[Loss, ...]


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """All of it for one metric.

    fronts: by cost, of the configurations it was measured for. lacking: why a cost can't be compared, and has no front.
    """

    metric: str
    points: tuple[Point, ...]
    gains: tuple[Gain, ...]
    fronts: Mapping[CostName, tuple[FrontRow, ...]]
    lacking: Mapping[CostName, str]


def step_curves(view: View, info: MetricInfo) -> list[Point]:
    """Every configuration that has a value under the metric, by model and step count, with what it costs."""
    latencies, memories = _latencies(view), _memories(view)
    return [
        Point(
            *cell,
            summary,
            latencies.get(cell),
            memories.get(cell),
            is_trained_on(view.trained_on.get(summary.model, ()), info.id),
        )
        for summary in summaries(view)
        if summary.metric == info.id and summary.estimate is not None
        for cell in [(summary.model, summary.steps)]
    ]


def tradeoff(view: View, info: MetricInfo) -> Tradeoff:
    """Step curves, gains and Pareto fronts under one metric."""
    points = step_curves(view, info)
    lacking = {name: why for name in COSTS if (why := _incomparable(points, name))}
    return Tradeoff(
        info.id, tuple(points), tuple(_gains(view, info, points)), pareto_fronts(view, info, points), lacking
    )


def cheapest_within(view: View, info: MetricInfo, delta: float, cost: CostName = "latency") -> Cheapest:
    """The cheapest configuration that is shown to be at most ``delta`` worse than the best of all, at 95 %.

    Prompts are resampled for all configurations together, and each resample has its own best: that the best, and the
    cheapest, are found by looking is in the answer (Holm's correction over the configurations). On the images that all
    configurations have a value for. Set metrics, and means over fewer than 10 prompts, by draws of Student's t from the
    joint covariance (the jackknife's). Raises InputError for a delta that is not
    positive, where the cost was not measured alike, and where fewer than two configurations share two prompts.
    """
    if not 0 < delta < np.inf:
        raise InputError(f"--within {delta:g}: give a difference above 0 in the unit of {info.id} ({info.unit})")
    points = step_curves(view, info)
    if why := _incomparable(points, cost):
        raise InputError(f"{why}; choose another --cost")
    values, draws, n, num_prompts = _joint(view, info, points)
    costs = [(point.cell, point.cost(cost)) for point in points]
    losses = judge_losses(costs, _sign(info) * values, _sign(info) * draws, delta)
    return Cheapest(info.id, delta, cost, n, num_prompts, cheapest_of(losses), losses)


def judge_losses(
    costs: Sequence[tuple[Cell, float | None]], values: NDArray[np.float64], draws: NDArray[np.float64], delta: float
) -> tuple[Loss, ...]:
    """Judge how far configurations are below the best: values (C,), draws of them (B, C), both larger is better."""
    loss, drawn = values.max() - values, draws.max(axis=1, keepdims=True) - draws
    p = holm(((1 + (drawn > delta).sum(axis=0)) / (1 + len(draws))).tolist())
    upper = np.quantile(drawn, 1 - ALPHA, axis=0)
    return tuple(
        Loss(*cell, cost, float(loss[c]), float(upper[c]), p[c], p[c] < ALPHA) for c, (cell, cost) in enumerate(costs)
    )


def cheapest_of(losses: Sequence[Loss]) -> Cell | None:
    """The cheapest that is within; of equal cost the one of fewer steps, then the better one."""
    good = [(loss.cost, loss.steps, loss.value, loss.model) for loss in losses if loss.within and loss.cost is not None]
    if not good:
        return None
    _, steps, _, model = min(good)
    return model, steps


def joint_means(means: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means (C,) of values by prompt (P, C), and draws (B, C) of what they might have been, prompts resampled."""
    P = len(means)
    centre = means.mean(axis=0)
    if P < MIN_CLUSTERS:
        return centre, _draws(centre, np.cov(means.T) / P, P - 1)
    return centre, centre + (bootstrap_means(means) - centre) * np.sqrt(P / (P - 1))


def default_cost(points: Sequence[Point]) -> CostName:
    """Latency where it was measured alike, else steps."""
    return "steps" if _incomparable(points, "latency") else "latency"


def cost_named(name: str) -> CostName:
    """The cost of this name; InputError for an unknown one."""
    for known in COSTS:
        if name == known:
            return known
    raise unknown_name("cost", name, COSTS)


def _latencies(view: View) -> dict[Cell, Measured]:
    """Median milliseconds per image at the smallest batch size that was timed."""
    found: dict[Cell, Measured] = {}
    for cell, rows in _rows_by_cell(
        view, [[r for r in s.timings() if r.stage == "total"] for s in view.stores]
    ).items():
        size = min(row.batch_size for row in rows)
        timed = [row for row in rows if row.batch_size == size]
        found[cell] = Measured(1000 * median(row.seconds / size for row in timed), timed[0].device, size)
    return found


def _memories(view: View) -> dict[Cell, Measured]:
    """Peak bytes at the smallest batch size that was measured."""
    of_runs = [[row for row in store.costs() if row.name == "peak-memory"] for store in view.stores]
    rows = _rows_by_cell(view, of_runs)
    smallest = {cell: min(mine, key=lambda row: row.batch_size) for cell, mine in rows.items()}
    return {cell: Measured(row.value, row.device, row.batch_size) for cell, row in smallest.items()}


def _rows_by_cell(view: View, rows: Sequence[Sequence[Row]]) -> dict[Cell, list[Row]]:
    """Rows of each run's ledger by configuration, as the view calls it."""
    found: dict[Cell, list[Row]] = {}
    for cell in view.cells:
        store, name = view.origin(cell)
        mine = [row for row in rows[view.stores.index(store)] if (row.model, row.steps) == (name, cell[1])]
        if mine:
            found[cell] = mine
    return found


def _incomparable(points: Sequence[Point], cost: CostName) -> str:
    """Why configurations can't be told apart by this cost; empty where they can."""
    if cost == "steps":
        return ""
    measured = [found for p in points if (found := p.latency if cost == "latency" else p.memory)]
    if not measured:
        return f"{cost} was not measured"
    where = sorted({(one.device, one.batch_size) for one in measured})
    if len(where) == 1:
        return ""
    listed = ", ".join(f"{device} (batch {size})" for device, size in where)
    return f"{cost} was measured on several devices or batch sizes, {listed}"


def _gains(view: View, info: MetricInfo, points: Sequence[Point]) -> list[Gain]:
    counts: dict[str, list[int]] = {}
    for point in points:
        counts.setdefault(point.model, []).append(point.steps)
    spans = [(model, few, many) for model, steps in counts.items() for few, many in pairwise(sorted(steps))]
    found = differences(view, info, [((model, many), (model, few)) for model, few, many in spans])
    known = [(span, difference) for span, difference in zip(spans, found, strict=True) if difference is not None]
    adjusted = holm([difference.p_value for _, difference in known])
    return [
        Gain(model, few, many, _scaled(difference, _sign(info) / (many - few)), p)
        for ((model, few, many), difference), p in zip(known, adjusted, strict=True)
    ]


def _scaled(d: Difference, by: float) -> Difference:
    low, high = sorted((by * d.low, by * d.high)) if d.low == d.low else (d.low, d.high)
    return Difference(by * d.value, low, high, d.n, d.num_clusters, d.p_value, abs(by) * d.error)


def pareto_fronts(view: View, info: MetricInfo, points: Sequence[Point]) -> dict[CostName, tuple[FrontRow, ...]]:
    """Fronts of quality against each cost that was measured alike for all that were measured.

    One Holm family over all pairs that could beat each other in any.
    """
    names = [name for name in COSTS if not _incomparable(points, name)]
    rivals = {name: _rivals(points, name) for name in names}
    better = _shown_better(view, info, [pair for of_cost in rivals.values() for pair in of_cost])
    by_cell, sign = {point.cell: point for point in points}, _sign(info)
    fronts: dict[CostName, tuple[FrontRow, ...]] = {}
    for name, pairs in rivals.items():
        rows = []
        for point in points:
            cost = point.cost(name)
            if cost is None:
                continue
            others = [other for other, loser in pairs if loser == point.cell]
            beating = [other for other in others if (other, point.cell) in better]
            beaten_by = max(beating, key=lambda other: better[other, point.cell], default=None)
            nominal = not any(_dominates(by_cell[other], point, name, sign) for other in others)
            rows.append(FrontRow(*point.cell, cost, beaten_by, nominal))
        fronts[name] = tuple(rows)
    return fronts


def _rivals(points: Sequence[Point], cost: CostName) -> list[tuple[Cell, Cell]]:
    """Pairs of which the first costs no more than the second."""
    costs = {point.cell: found for point in points if (found := point.cost(cost)) is not None}
    return [(a, b) for b in costs for a in costs if a != b and costs[a] <= costs[b]]


def _shown_better(view: View, info: MetricInfo, pairs: Sequence[tuple[Cell, Cell]]) -> dict[tuple[Cell, Cell], float]:
    """By how much, for each (winner, loser) that a difference is shown for, corrected over all these pairs."""
    unordered = list(dict.fromkeys((min(pair), max(pair)) for pair in pairs))
    found = zip(unordered, differences(view, info, unordered, intervals=False), strict=True)
    known = [(pair, difference) for pair, difference in found if difference is not None]
    adjusted = holm([difference.p_value for _, difference in known])
    return {
        ((a, b) if _sign(info) * d.value > 0 else (b, a)): abs(d.value)
        for ((a, b), d), p in zip(known, adjusted, strict=True)
        if p < ALPHA and d.value != 0
    }


def _dominates(other: Point, point: Point, cost: CostName, sign: float) -> bool:
    """Whether one that costs no more is as good or better by the point estimates, and not equal in both."""
    values = [one.summary.estimate.value if one.summary.estimate else np.nan for one in (other, point)]
    gain = sign * (values[0] - values[1])
    return gain > 0 or (gain == 0 and other.cost(cost) != point.cost(cost))


def _sign(info: MetricInfo) -> float:
    return 1.0 if info.direction == "higher" else -1.0


def _joint(
    view: View, info: MetricInfo, points: Sequence[Point]
) -> tuple[NDArray[np.float64], NDArray[np.float64], int, int]:
    """Values (C,) on the images that all share, draws (B, C) of what they might have been, images and prompts."""
    if len(points) < 2:
        raise InputError(f"{info.id} has values for {len(points)} configurations; the best of one says nothing")
    if not info.per_image:
        return _joint_of_sets(view, info, points)
    values = [view.values(info.id, point.cell) for point in points]
    keys = _shared(info, values)
    prompts = sorted({prompt for prompt, _ in keys})
    row = {prompt: i for i, prompt in enumerate(prompts)}
    sums, counts = np.zeros((len(prompts), len(points))), np.zeros((len(prompts), 1))
    for key in keys:
        sums[row[key[0]]] += [of_cell[key] for of_cell in values]
        counts[row[key[0]]] += 1
    return *joint_means(sums / counts), len(keys), len(prompts)


def _joint_of_sets(
    view: View, info: MetricInfo, points: Sequence[Point]
) -> tuple[NDArray[np.float64], NDArray[np.float64], int, int]:
    images = [view.feature_keys(info, point.cell) for point in points]
    references = {row.reference for point in points if (row := view.set_score(info.id, point.cell))}
    if not all(images) or len(references) > 1:
        raise InputError(f"{info.id}: not all configurations have features and one reference; score the run again")
    keys = _shared(info, images)
    found = [view.replicates(info, point.cell, keys) for point in points]
    replicates = [one for one in found if one is not None]
    if len(replicates) < len(found) or np.isnan([one.error for one in replicates]).any():
        raise InputError(f"{info.id}: {len(keys)} images beside the kept reference give no interval; score more")
    left_out = np.stack([one.left_out for one in replicates], axis=1)
    g = len(left_out)
    centred = left_out - left_out.mean(axis=0)
    values = np.array([one.value for one in replicates])
    covariance = (g - 1) / g * centred.T @ centred
    return values, _draws(values, covariance, g - 1), replicates[0].n, replicates[0].num_clusters


def _shared(info: MetricInfo, values: Sequence[Collection[Key]]) -> list[Key]:
    keys = sorted(set.intersection(*(set(of_cell) for of_cell in values)))
    num_prompts = len({prompt for prompt, _ in keys})
    if num_prompts < 2:
        raise InputError(f"{info.id}: all configurations share images of {num_prompts} prompts; it takes two or more")
    return keys


def _draws(values: NDArray[np.float64], covariance: NDArray[np.float64], degrees: int) -> NDArray[np.float64]:
    """Draws (B, C) of multivariate Student's t about values (C,)."""
    rng = np.random.default_rng(RESAMPLING_SEED)
    eigenvalues, Q = np.linalg.eigh(np.atleast_2d(covariance))
    normal = rng.normal(size=(NUM_RESAMPLES, len(values))) * np.sqrt(eigenvalues.clip(min=0))
    spread = np.sqrt(degrees / rng.chisquare(degrees, (NUM_RESAMPLES, 1)))
    draws: NDArray[np.float64] = values + spread * (normal @ Q.T)
    return draws
