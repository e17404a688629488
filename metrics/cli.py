"""The verb ``compare``: paired differences between the models of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table

    from metrics.comparison import Comparison, Summary


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--against", metavar="MODEL", help="Baseline to compare to; the run's own unless given.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(run: Path, against: str | None, as_json: bool) -> None:
    """Compare the models of RUN to its baseline, paired by prompt and noise, corrected for the number of looks."""
    from hypersd_bench.store import RunStore
    from metrics.comparison import comparisons, summaries

    store = RunStore.open(run)
    found, levels = comparisons(store, against), summaries(store)
    baseline = against or store.manifest["baseline"]
    trained_on = {str(model["name"]): list(model.get("trained_on", ())) for model in store.manifest["models"]}
    if as_json:
        values = {
            "run": str(run), "baseline": baseline, "trained_on": trained_on, "levels": levels, "comparisons": found,
        }  # fmt: skip
        click.echo(json.dumps(_plain(values), indent=2, allow_nan=False))
        return
    _print(found, levels, baseline, trained_on)


def _print(
    found: list[Comparison], levels: list[Summary], baseline: str, trained_on: Mapping[str, Collection[str]]
) -> None:
    from rich.console import Console

    from metrics.comparison import is_trained_on

    marked = {(x.metric, x.model) for x in levels if is_trained_on(trained_on.get(x.model, ()), x.metric)}
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140  # a pipe has no width; rich would wrap at 80
    for metric in dict.fromkeys(level.metric for level in levels):
        rows, differences = [x for x in levels if x.metric == metric], [x for x in found if x.metric == metric]
        console.print(_table(rows, differences, {model for name, model in marked if name == metric}))
    console.print(
        f"Differences are model minus {baseline}, same prompts and noise, 95 % intervals; p is Holm-corrected over "
        f"{len(found)} comparisons."
    )
    if marked:
        console.print("\u2020: the model was trained on this metric.")
    for info in {level.metric: level.info for level in levels}.values():
        if info.note:
            console.print(f"{info.id}: {info.note}.")
    for level in levels:
        if level.missing:
            console.print(f"{level.metric}, {level.model} at {level.steps}: {level.missing} missing: {level.reason}")


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
            f"{level.model}\u2020" if level.model in marked else level.model,
            str(level.steps),
            _interval(e.value, e.low, e.high, digits) if e else "-",
            str(e.n if e else 0),
        ]
        if comparison:
            d = comparison.difference
            row += [_interval(d.value, d.low, d.high, digits, "+"), f"{comparison.p_holm:.3g}", comparison.verdict]
        table.add_row(*row)
    return table


def _digits(levels: list[Summary]) -> int:
    """Decimals for a whole table: two digits of its widest interval."""
    widths = [level.estimate.high - level.estimate.low for level in levels if level.estimate]
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
