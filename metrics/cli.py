"""The verb ``compare``: paired differences between the models of one or several runs, and quality against cost."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hypersd_bench.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from hypersd_bench.contracts import MetricInfo
    from metrics.comparison import Comparison, Spread, Summary, View
    from metrics.stats import Difference
    from metrics.tradeoff import Cheapest, CostName, FrontRow, Point, Tradeoff

DAGGER = "\u2020"
WIDTH = 140  # of a pipe, which has none; rich would wrap at 80


@click.command()
@click.argument("runs", metavar="RUN [RUN...]", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--against", metavar="MODEL", help="Baseline to compare to; the first run's own unless given.")
@click.option("--metrics", metavar="ID,ID", help="Only these metrics.")
@click.option("--steps", metavar="N,N", help="Only these step counts.")
@click.option(
    "--within", type=float, metavar="DELTA",
    help="Instead: quality against steps, latency and memory, and the cheapest within DELTA of the best at 95 %.",
)  # fmt: skip
@click.option("--metric", metavar="ID", help="With --within: by this metric; the run's first unless given.")
@click.option("--cost", metavar="COST", help="With --within: latency, memory or steps; latency unless given.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(
    runs: tuple[Path, ...],
    against: str | None,
    metrics: str | None,
    steps: str | None,
    within: float | None,
    metric: str | None,
    cost: str | None,
    as_json: bool,
) -> None:
    """Compare the models of RUNs to a baseline, paired by prompt and noise, corrected for the number of looks."""
    from hypersd_bench.store import RunStore
    from metrics.comparison import View

    if within is None and (metric or cost):
        raise InputError("--metric and --cost go with --within DELTA; to choose metrics to compare, use --metrics")
    chosen = names(metric or metrics)
    view = View([RunStore.open(run) for run in runs], chosen, step_counts(steps))
    if not view.infos:
        raise InputError(f"{runs[0]} has no metrics to compare by: hypersd-bench score {runs[0]} --metrics ID,ID")
    if within is None:
        _compare(view, against, as_json)
    else:
        _weigh(view, within, cost, as_json)


def names(text: str | None) -> list[str]:
    """The names in a list like ``a,b``."""
    return [name for name in (text or "").split(",") if name]


def step_counts(text: str | None) -> list[int]:
    """The numbers in ``--steps 1,4``; InputError for anything else."""
    try:
        return [int(count) for count in names(text)]
    except ValueError:
        raise InputError(f"--steps {text}: give step counts, as 1,4") from None


def _heading(view: View) -> dict[str, Any]:
    folders = [str(store.folder) for store in view.stores]
    return {"run": folders[0], "runs": folders, "trained_on": view.trained_on}


def _echo_json(values: Mapping[str, Any]) -> None:
    click.echo(json.dumps(_plain(values), indent=2, allow_nan=False))


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    return console


# differences


def _compare(view: View, against: str | None, as_json: bool) -> None:
    from metrics.comparison import comparisons, spreads, summaries

    found, levels = comparisons(view, against), summaries(view)
    spread, baseline = spreads(view, found), against or view.baseline
    if as_json:
        _echo_json(_heading(view) | {"baseline": baseline, "levels": levels, "comparisons": found, "spreads": spread})
        return
    _print(found, levels, spread, baseline, view.trained_on)


def _print(
    found: list[Comparison],
    levels: list[Summary],
    spreads: list[Spread],
    baseline: str,
    trained_on: Mapping[str, Collection[str]],
) -> None:
    from metrics.comparison import is_trained_on

    marked = {(x.metric, x.model) for x in levels if is_trained_on(trained_on.get(x.model, ()), x.metric)}
    console = _console()
    for metric in dict.fromkeys(level.metric for level in levels):
        rows, differences = [x for x in levels if x.metric == metric], [x for x in found if x.metric == metric]
        console.print(_table(rows, differences, {model for name, model in marked if name == metric}))
        if resolution := _resolution(differences, _digits(rows)):
            console.print(resolution)
        for spread in spreads:
            if spread.metric == metric:
                console.print(_spread_line(spread, _digits(rows)))
    console.print(
        f"Differences are model minus {baseline}, same prompts and noise, 95 % intervals; p is Holm-corrected over "
        f"{len(found)} comparisons."
    )
    if marked:
        console.print(f"{DAGGER}: the model was trained on this metric.")
    for info in {level.metric: level.info for level in levels}.values():
        if info.note:
            console.print(f"{info.id}: {info.note}.")
    for level in levels:
        if level.missing or level.reason:
            missing = f"{level.missing} missing: " if level.missing else ""
            console.print(f"{level.metric}, {level.model} at {level.steps}: {missing}{level.reason}")


def _table(levels: list[Summary], found: list[Comparison], marked: Collection[str]) -> Table:
    from rich.table import Table

    info = levels[0].info
    table = Table(title=f"{info.label} ({info.id}, {info.unit}, {info.direction} is better)", title_justify="left")
    for heading in ("model", "steps", "level", "n", "difference", "p", "verdict"):
        table.add_column(heading, justify="left" if heading in ("model", "verdict") else "right", no_wrap=True)
    by_cell, digits = {(x.model, x.steps): x for x in found}, _digits(levels)
    for level in levels:
        e, comparison = level.estimate, by_cell.get((level.model, level.steps))
        row = [
            f"{level.model}{DAGGER}" if level.model in marked else level.model,
            str(level.steps),
            _interval(e.value, e.low, e.high, digits) if e else "-",
            str(e.n if e else 0),
        ]
        if comparison:
            d = comparison.difference
            row += [_interval(d.value, d.low, d.high, digits, "+"), f"{comparison.p_holm:.3g}", comparison.verdict]
        table.add_row(*row)
    return table


def _resolution(found: Sequence[Comparison], digits: int) -> str:
    """What these n could have shown; empty where nothing tells."""
    known = sorted(c.detectable for c in found if not math.isnan(c.detectable))
    if not known:
        return ""
    sizes = sorted({(c.difference.num_clusters, c.difference.n) for c in found})
    prompts = _span([str(prompts) for prompts, _ in sizes])
    images = _span([str(n) for _, n in sizes])
    smallest = _span([f"{value:.{digits}f}" for value in known])
    return f"{images} images of {prompts} prompts: a true difference of {smallest} would be shown with 80 % power."


def _spread_line(spread: Spread, digits: int) -> str:
    """What more prompts or more seeds would buy."""
    return (
        f"Spread of differences: {spread.between:.{digits}f} between prompts, {spread.within:.{digits}f} between seeds "
        f"of one; twice the prompts would show {spread.twice_the_prompts:.{digits}f}, twice the seeds "
        f"{spread.twice_the_seeds:.{digits}f}."
    )


def _span(sorted_words: Sequence[str]) -> str:
    first, last = sorted_words[0], sorted_words[-1]
    return first if first == last else f"{first} to {last}"


# quality against cost


def _weigh(view: View, delta: float, cost: str | None, as_json: bool) -> None:
    from metrics.tradeoff import cheapest_within, cost_named, default_cost, tradeoff

    if not view.infos:
        raise InputError(f"{view.name} is not scored by any metric; score it first")
    info = view.infos[0]
    found = tradeoff(view, info)
    answer = cheapest_within(view, info, delta, cost_named(cost) if cost else default_cost(found.points))
    if as_json:
        _echo_json(_heading(view) | {"tradeoff": found, "cheapest": answer})
        return
    console = _console()
    console.print(_cost_table(info, found, answer))
    if found.gains:
        console.print(_gain_table(info, found))
    console.print(_answer(info, answer, found.points))
    console.print(
        "On the front: none that costs no more is shown to be better (paired, Holm-corrected, 5 %); in doubt: one is "
        "better by the figures alone. Behind the best: how much worse, and at most at 95 %, each resample having its "
        f"own best; *: not shown to be within {delta:g}, Holm-corrected."
    )
    for why in found.lacking.values():
        console.print(f"{why}.")
    if any(point.trained_on for point in found.points):
        console.print(f"{DAGGER}: the model was trained on this metric.")
    if info.note:
        console.print(f"{info.id}: {info.note}.")


def _cost_table(info: MetricInfo, found: Tradeoff, answer: Cheapest) -> Table:
    from rich.table import Table

    table = Table(title=f"{info.label} ({info.id}, {info.unit}, {info.direction} is better)", title_justify="left")
    headings = ("model", "steps", "level", "behind the best", "ms/image", "GiB", f"front by {answer.cost}")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in headings[1:6] else "left", no_wrap=True)
    digits = _digits([point.summary for point in found.points])
    losses = {(loss.model, loss.steps): loss for loss in answer.losses}
    places = {(row.model, row.steps): row for row in found.fronts[answer.cost]}
    for point in found.points:
        e, loss = point.summary.estimate, losses[point.cell]
        table.add_row(
            _named(point),
            str(point.steps),
            _interval(e.value, e.low, e.high, digits) if e else "-",
            f"{loss.value:.{digits}f} (< {loss.upper:.{digits}f}){'' if loss.within else ' *'}",
            f"{point.latency.value:.1f}" if point.latency else "-",
            f"{point.memory.value / 2**30:.2f}" if point.memory else "-",
            _place(places.get(point.cell)),
        )
    return table


def _place(row: FrontRow | None) -> str:
    if row is None:
        return "-"
    if row.beaten_by is None:
        return "on" if row.nominal else "in doubt"
    return f"behind {row.beaten_by[0]}@{row.beaten_by[1]}"


def _gain_table(info: MetricInfo, found: Tradeoff) -> Table:
    from rich.table import Table

    table = Table(title=f"Gain for each extra step ({info.unit})", title_justify="left")
    for heading in ("model", "steps", "gain", "p"):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    marked = {point.model for point in found.points if point.trained_on}
    widths = [gain.per_step.high - gain.per_step.low for gain in found.gains]
    digits = _decimals(widths)
    for gain in found.gains:
        d: Difference = gain.per_step
        name = f"{gain.model}{DAGGER}" if gain.model in marked else gain.model
        steps = f"{gain.from_steps} to {gain.to_steps}"
        table.add_row(name, steps, _interval(d.value, d.low, d.high, digits, "+"), f"{gain.p_holm:.3g}")
    return table


def _answer(info: MetricInfo, answer: Cheapest, points: Sequence[Point]) -> str:
    """The cheapest configuration in a sentence, or what is missing for one."""
    within = f"within {answer.delta:g} ({info.unit}) of the best at 95 %"
    based = f"{answer.n} images of {answer.num_prompts} prompts"
    if answer.choice is None:
        nearest = min(answer.losses, key=lambda loss: loss.upper)
        return (
            f"No configuration is shown to be {within} ({based}); nearest: {nearest.model} at {nearest.steps}, within "
            f"{nearest.upper:.3g}. More prompts, or a larger --within."
        )
    point = next(point for point in points if point.cell == answer.choice)
    chosen = f"{_named(point)} at {point.steps} {'step' if point.steps == 1 else 'steps'}"
    return f"Cheapest by {answer.cost} {within}: {chosen}{_costing(point, answer.cost)} ({based})."


def _costing(point: Point, cost: CostName) -> str:
    if cost == "latency" and point.latency:
        return f", {point.latency.value:.1f} ms per image on {point.latency.device}"
    if cost == "memory" and point.memory:
        return f", {point.memory.value / 2**30:.2f} GiB on {point.memory.device}"
    return ""


def _named(point: Point) -> str:
    return f"{point.model}{DAGGER}" if point.trained_on else point.model


# numbers


def _digits(levels: Sequence[Summary]) -> int:
    """Decimals for a whole table: two digits of its widest interval."""
    return _decimals([level.estimate.high - level.estimate.low for level in levels if level.estimate])


def _decimals(widths: Sequence[float]) -> int:
    widest = max((width for width in widths if width > 0), default=0.1)  # NaN is no width
    return max(0, 1 - math.floor(math.log10(widest)))


def _interval(value: float, low: float, high: float, digits: int, sign: str = "") -> str:
    text = f"{value:{sign}.{digits}f}"
    return text if math.isnan(low) else f"{text} \\[{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def _plain(value: Any) -> Any:
    """JSON-printable values: dataclasses as objects, NaN (no interval) as null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return _plain(asdict(value)) if hasattr(value, "__dataclass_fields__") else value
