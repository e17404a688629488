"""What the figures of a report show, as Vega-Lite charts; ``reports.figures`` renders them.

Ink is ``currentColor``: inside the page it follows the theme, in a file of its own it is black.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any

import altair as alt

from hypersd_bench.contracts import MetricInfo
from metrics.tradeoff import CostName
from reports.data import Model, ReportData
from reports.strings import counted, say
from reports.study import Criterion
from reports.training import Curve

WIDTH, HEIGHT = 260, 190
FOREST_WIDTH = 300
INK = "currentColor"
FAINT = 0.16
LONE_COLOUR = "#0072B2"  # of what is drawn beside no model
PX_PER_LETTER = 6  # at font size 10
MAX_LABELLED = 12  # points that can bear a number each
MAX_PAIRED = 4  # metrics that are drawn against each other
DODGE = 1.035  # neighbours on a log axis, so that their intervals don't hide each other

Chart = alt.LayerChart | alt.FacetChart  # what alt.layer says it returns


@dataclass(frozen=True, slots=True)
class Drawing:
    """A chart with the name of its files and its title."""

    name: str
    title: str
    chart: Chart


def step_curves(data: ReportData) -> list[Drawing]:
    """Draw each metric against the number of steps, with intervals."""
    return [
        Drawing(f"steps-{slug(metric.id)}", metric.label, _step_curve(data, metric))
        for metric in data.metrics
        if any(cell.metric == metric.id and cell.value is not None for cell in data.cells)
    ]


def quality_latency(data: ReportData) -> list[Drawing]:
    """Draw each metric against the latency, with intervals and the front; each point is labelled with its steps."""
    drawn = [(metric, rows) for metric in data.metrics if (rows := _cost_rows(data, metric, "latency"))]
    return [
        Drawing(f"latency-{slug(metric.id)}", metric.label, _cost_plot(data, metric, rows, say("figure.ms_per_image")))
        for metric, rows in drawn
    ]


def quality_memory(data: ReportData) -> list[Drawing]:
    """Draw each metric against the peak memory, as against the latency."""
    drawn = [(metric, rows) for metric in data.metrics if (rows := _cost_rows(data, metric, "memory"))]
    return [
        Drawing(f"memory-{slug(metric.id)}", metric.label, _cost_plot(data, metric, rows, say("figure.peak_gib")))
        for metric, rows in drawn
    ]


def metric_pairs(data: ReportData) -> list[Drawing]:
    """Draw the first metrics against each other, a point for each configuration, with both intervals."""
    scored = {cell.metric for cell in data.cells if cell.value is not None}
    drawn = [metric for metric in data.metrics if metric.id in scored]
    return [
        Drawing(f"metrics-{slug(a.id)}-{slug(b.id)}", f"{a.label} : {b.label}", _metric_pair(data, a, b))
        for a, b in combinations(drawn[:MAX_PAIRED], 2)
    ]


def forests(data: ReportData) -> list[Drawing]:
    """Draw each metric's differences to the baseline; a filled point holds after Holm's correction."""
    drawn = [(metric, rows) for metric in data.metrics if (rows := _forest_rows(data, metric))]
    return [
        Drawing(f"differences-{slug(metric.id)}", metric.label, _forest(data, metric, rows)) for metric, rows in drawn
    ]


def training_curves(data: ReportData) -> list[Drawing]:
    """Draw the loss of each trained model, and of each training folder, over its stages."""
    known = {model.name: model for model in data.models}
    plain = dict.fromkeys(curve.model for curve in data.curves)
    return [
        Drawing(
            f"training-{slug(name)}",
            known[name].label if name in known else name,
            _loss_plot([curve for curve in data.curves if curve.model == name], known.get(name)),
        )
        for name in plain
    ]


def study_figures(data: ReportData) -> list[Drawing]:
    """Draw each question of a study: votes by comparison with the rate and its interval, and the ranking."""
    if data.study is None:
        return []
    drawn = []
    for criterion in data.study.criteria:
        if criterion.preferences:
            drawn.append(Drawing(f"votes-{criterion.name}", criterion.question, _vote_bars(criterion)))
        if criterion.rankings:
            drawn.append(Drawing(f"ranking-{criterion.name}", say("figure.ranking"), _ranking(criterion)))
    return drawn


def slug(name: str) -> str:
    """Make a name fit for a file: lower case, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _step_curve(data: ReportData, metric: MetricInfo) -> Chart:
    competing = [model for model in data.models if not model.is_reference]
    rows = []
    for i, model in enumerate(competing):
        dodge = DODGE ** (i - (len(competing) - 1) / 2)
        for steps in model.steps:
            cell = data.cell(metric.id, model.name, steps)
            if cell and cell.value is not None:
                rows.append({"model": model.label, "x": steps * dodge, "value": cell.value, **_ends(cell)})
    ticks = sorted({steps for model in competing for steps in model.steps})
    x = alt.X("x:Q", title=say("figure.steps"), scale=_log2(ticks), axis=alt.Axis(values=ticks, format="d", grid=False))
    return alt.layer(*_reference_lines(data, metric), *_series(rows, x, _metric_axis(metric), data))


def _reference_lines(data: ReportData, metric: MetricInfo) -> list[alt.Chart]:
    """A dashed level for each model that competes with nobody, named at the line."""
    rows = [
        {"value": cell.value, "text": say("figure.reference", model=model.label, at=counted(steps, "step"))}
        for model in data.models
        if model.is_reference
        for steps in model.steps
        if (cell := data.cell(metric.id, model.name, steps)) and cell.value is not None
    ]
    if not rows:
        return []
    base = _chart(rows).encode(y=alt.Y("value:Q"))
    text = base.mark_text(align="left", dx=4, dy=-6, fontSize=10, color=INK, opacity=0.7).encode(
        text="text:N", x=alt.value(0)
    )
    return [base.mark_rule(strokeDash=[4, 4], color=INK, opacity=0.6), text]


def _cost_rows(data: ReportData, metric: MetricInfo, cost: CostName) -> list[dict[str, Any]]:
    rows = []
    for steps, model in data.configurations():
        cell, latency, memory = (
            data.cell(metric.id, model.name, steps),
            data.latency(model.name, steps),
            data.memory(model.name, steps),
        )
        if cost == "latency":
            x = latency.median_ms if latency else None
        else:
            x = memory.peak_bytes / 2**30 if memory else None
        if cell and cell.value is not None and x:
            place = {"model": model.label, "x": x, "steps": str(steps), "value": cell.value}
            rows.append({**place, "front": data.on_front(metric.id, cost, model.name, steps), **_ends(cell)})
    return rows


def _cost_plot(data: ReportData, metric: MetricInfo, rows: list[dict[str, Any]], title: str) -> Chart:
    costs = [row["x"] for row in rows]
    scale = alt.Scale(type="log", domain=[min(costs) / 1.3, max(costs) * 1.3], nice=False)
    x = alt.X("x:Q", title=title, scale=scale, axis=alt.Axis(grid=False, tickCount=5, format="~s"))
    y = _metric_axis(metric)
    labels = _chart(_highest_of_each_step(rows)).mark_text(dy=-8, fontSize=10, color=INK)
    layers = [*_series(rows, x, y, data), labels.encode(x=x, y=y, text="steps:N")]
    if front := [row for row in rows if row["front"]]:
        ring = _chart(front).mark_point(
            filled=False, size=150, strokeWidth=1.2, color=INK, opacity=0.75, shape="circle"
        )
        layers.append(ring.encode(x=x, y=y))
    return alt.layer(*layers)


def _highest_of_each_step(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where a step count is written: once, above everything that belongs to it."""
    tops: dict[str, dict[str, Any]] = {}
    for row in rows:
        top = {"x": row["x"], "value": row.get("high", row["value"]), "steps": row["steps"]}
        if row["steps"] not in tops or top["value"] > tops[row["steps"]]["value"]:
            tops[row["steps"]] = top
    return list(tops.values())


def _series(rows: list[dict[str, Any]], x: alt.X, y: alt.Y, data: ReportData) -> list[alt.Chart]:
    """Lines, interval whiskers and points, one colour and shape for each model."""
    base = _chart(rows).encode(x=x, color=_colour(data))
    whiskers = [row for row in rows if "low" in row]
    layers = [base.mark_line(strokeWidth=1.6, opacity=0.8).encode(y=y)]
    if whiskers:
        rule = _chart(whiskers).mark_rule(strokeWidth=1.4, opacity=0.75)
        layers.append(rule.encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=_colour(data)))
    return [*layers, base.mark_point(filled=True, size=46, opacity=1).encode(y=y, shape=_shape(data))]


def _metric_pair(data: ReportData, a: MetricInfo, b: MetricInfo) -> Chart:
    rows = []
    for steps, model in data.configurations():
        of_a, of_b = data.cell(a.id, model.name, steps), data.cell(b.id, model.name, steps)
        if of_a and of_b and of_a.value is not None and of_b.value is not None:
            ends = {f"x_{end}": value for end, value in _ends(of_a).items()}
            place = {"model": model.label, "steps": str(steps), "x": of_a.value, "value": of_b.value}
            rows.append({**place, **ends, **_ends(of_b)})
    x = alt.X("x:Q", title=say(f"figure.{a.direction}_is_better", unit=a.label), scale=alt.Scale(zero=False),
              axis=alt.Axis(grid=False, tickCount=4))  # fmt: skip
    y = _metric_axis(replace(b, unit=b.label))
    base = _chart(rows).encode(x=x, color=_colour(data))
    across = _chart([row for row in rows if "x_low" in row]).mark_rule(strokeWidth=1.2, opacity=0.6)
    upright = _chart([row for row in rows if "low" in row]).mark_rule(strokeWidth=1.2, opacity=0.6)
    layers = [
        across.encode(x=alt.X("x_low:Q"), x2="x_high:Q", y=y, color=_colour(data)),
        upright.encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=_colour(data)),
        base.mark_point(filled=True, size=46, opacity=1).encode(y=y, shape=_shape(data)),
    ]
    if len(rows) <= MAX_LABELLED:
        steps = _chart(rows).mark_text(dx=8, dy=-7, fontSize=9, color=INK, opacity=0.8)
        layers.append(steps.encode(x=x, y=y, text="steps:N"))
    return alt.layer(*layers)


def _forest_rows(data: ReportData, metric: MetricInfo) -> list[dict[str, Any]]:
    order = [model.name for model in data.models]
    found = sorted(
        (d for d in data.differences if d.metric == metric.id), key=lambda d: (d.steps, order.index(d.model))
    )
    return [
        {"row": f"{i:03d}", "model": data.model(d.model).label, "steps": d.steps, "value": d.value, **_ends(d),
         "shown": d.verdict != "no difference shown"}
        for i, d in enumerate(found)
    ]  # fmt: skip


def _forest(data: ReportData, metric: MetricInfo, rows: list[dict[str, Any]]) -> Chart:
    names = {row["row"]: f"{row['model']} \u00b7 {row['steps']}" for row in rows}
    labels = f"{_lookup(names)}[datum.value]"
    y = alt.Y("row:N", title=None, sort=list(names),
              axis=alt.Axis(labelExpr=labels, domain=False, ticks=False, labelLimit=190))  # fmt: skip
    side = "right" if metric.direction == "higher" else "left"
    baseline = data.model(data.baseline).label
    title = say(f"figure.minus_{side}", baseline=baseline, unit=metric.unit)
    x = alt.X("value:Q", title=title, scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=4))
    base = _chart(rows).encode(y=y)
    zero = _chart([{"zero": 0}]).mark_rule(color=INK, opacity=0.5).encode(x="zero:Q")
    breaks = [after["row"] for before, after in pairwise(rows) if before["steps"] != after["steps"]]
    bands = _chart([{"row": row} for row in breaks]).mark_rule(
        color=INK, opacity=FAINT, yOffset=-9
    ).encode(y=alt.Y("row:N", sort=list(names)))  # fmt: skip
    whiskers = _chart([row for row in rows if "low" in row]).mark_rule(strokeWidth=1.6)
    points = base.mark_point(size=52, strokeWidth=1.6, opacity=1).encode(
        x=x, color=_colour(data), shape=_shape(data),
        fill=alt.condition("datum.shown", _colour(data), alt.value("none")),
    )  # fmt: skip
    layers = [bands] if breaks else []
    layers += [zero, whiskers.encode(y=y, x=alt.X("low:Q"), x2="high:Q", color=_colour(data)), points]
    return alt.layer(*layers).properties(width=FOREST_WIDTH, height=alt.Step(18))


VOTES = {
    "first": "#0072B2",
    "tie": "#9a9a9a",
    "both bad": "#c9c9c9",
    "second": "#E69F00",
}  # told apart by lightness too


def _vote_bars(criterion: Criterion) -> Chart:
    """Shares of a, ties, both bad and b for each comparison; the dot is the rate with ties half, on its interval."""
    names = [f"{p.a} : {p.b}" for p in criterion.preferences]
    rows, dots = [], []
    for name, p in zip(names, criterion.preferences, strict=True):
        start = 0.0
        for kind, count in (
            ("first", p.a_preferred),
            ("tie", p.ties),
            ("both bad", p.both_bad),
            ("second", p.b_preferred),
        ):
            rows.append({"row": name, "kind": kind, "from": start, "to": start + count / p.n})
            start += count / p.n
        dots.append({"row": name, "value": p.value, "low": p.low, "high": p.high, "n": f"n = {p.n}"})
    y = alt.Y("row:N", title=None, sort=names, axis=alt.Axis(domain=False, ticks=False, labelLimit=320))
    whole = alt.Scale(domain=[0, 1], nice=False)
    x = alt.X("from:Q", title=say("figure.shares"), scale=whole, axis=alt.Axis(format="%", tickCount=5, grid=False))
    colour = alt.Color("kind:N", scale=alt.Scale(domain=list(VOTES), range=list(VOTES.values())), title=None)
    bars = _chart(rows).mark_bar(height=16, opacity=0.85).encode(y=y, x=x, x2="to:Q", color=colour)
    half = _chart([{"half": 0.5}]).mark_rule(color=INK, strokeDash=[3, 3]).encode(x="half:Q")
    base = _chart(dots).encode(y=y)
    rule = base.mark_rule(color=INK, strokeWidth=2).encode(x="low:Q", x2="high:Q")
    dot = base.mark_point(filled=True, size=46, color=INK, opacity=1).encode(x="value:Q")
    text = base.mark_text(align="left", dx=6, fontSize=10, color=INK).encode(x=alt.datum(1), text="n:N")
    return alt.layer(bars, half, rule, dot, text).properties(width=FOREST_WIDTH, height=alt.Step(30))


def _ranking(criterion: Criterion) -> Chart:
    """Log-strengths with intervals; in brackets the ranks a configuration may have. Unconnected groups stand apart."""
    rows: list[dict[str, Any]] = []
    for group, ranking in enumerate(criterion.rankings, start=1):
        for s in ranking:
            ranks = str(s.rank_low) if s.rank_low == s.rank_high else f"{s.rank_low}-{s.rank_high}"
            key = "figure.group_rank" if len(criterion.rankings) > 1 else "figure.rank"
            row = say(key, name=s.name, group=group, ranks=ranks)
            rows.append({"row": row, "value": s.value, "low": s.low, "high": s.high})
    y = alt.Y("row:N", title=None, sort=[row["row"] for row in rows],
              axis=alt.Axis(domain=False, ticks=False, labelLimit=320))  # fmt: skip
    base = _chart(rows).encode(y=y)
    zero = _chart([{"zero": 0}]).mark_rule(color=INK, opacity=0.4).encode(x="zero:Q")
    rule = base.mark_rule(color=INK, strokeWidth=1.6).encode(x=alt.X("low:Q"), x2="high:Q")
    dot = base.mark_point(filled=True, size=52, color=INK, opacity=1).encode(
        x=alt.X("value:Q", title=say("figure.strength"), axis=alt.Axis(tickCount=4))
    )
    return alt.layer(zero, rule, dot).properties(width=FOREST_WIDTH, height=alt.Step(22))


def _chart(rows: Sequence[dict[str, Any]]) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=list(rows)))


def _lookup(names: dict[str, str]) -> str:
    pairs = ", ".join(f"{_quoted(key)}: {_quoted(value)}" for key, value in names.items())
    return f"{{{pairs}}}"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _loss_plot(curves: Sequence[Curve], model: Model | None) -> Chart:
    rows = [{"x": x, "loss": loss, "stage": curve.stage} for curve in curves for x, loss in curve.points]
    starts = [{"x": curve.points[0][0], "stage": curve.stage if _is_wide(curve, curves) else ""} for curve in curves]
    positive = all(loss > 0 for curve in curves for _, loss in curve.points)
    scale = alt.Scale(type="log" if positive else "linear", zero=False, nice=False)
    y = alt.Y("loss:Q", title=say("figure.loss"), scale=scale, axis=alt.Axis(tickCount=4, grid=False))
    x = alt.X("x:Q", title=say("figure.images_seen"), axis=alt.Axis(grid=False, tickCount=5, format="~s"))
    lines = _chart(rows).mark_line(strokeWidth=1.3, color=model.colour if model else LONE_COLOUR)
    borders = _chart(starts).encode(x=x)
    names = borders.mark_text(align="left", baseline="top", dx=3, fontSize=10, color=INK, opacity=0.75)
    return alt.layer(
        borders.mark_rule(color=INK, opacity=FAINT),
        lines.encode(x=x, y=y, detail="stage:N"),
        names.encode(text="stage:N", y=alt.value(0)),
    )


def _is_wide(curve: Curve, curves: Sequence[Curve]) -> bool:
    """Whether a stage takes enough of the plot's width for its name to stand there."""
    images = [points[-1][0] - points[0][0] for points in (curve.points, curves[0].points + curves[-1].points)]
    return images[0] * WIDTH >= PX_PER_LETTER * len(curve.stage) * images[1]


def _ends(interval: Any) -> dict[str, float]:
    """The ends of an interval, where it has them."""
    return {} if interval.low is None or interval.high is None else {"low": interval.low, "high": interval.high}


def _log2(ticks: Sequence[int]) -> alt.Scale:
    return alt.Scale(type="log", base=2, domain=[min(ticks) / 1.25, max(ticks) * 1.25], nice=False)


def _metric_axis(metric: MetricInfo) -> alt.Y:
    title = say(f"figure.{metric.direction}_is_better", unit=metric.unit)
    return alt.Y("value:Q", title=title, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5))


def _colour(data: ReportData) -> alt.Color:
    return alt.Color("model:N", scale=_scale(data, lambda model: model.colour), title=None)


def _shape(data: ReportData) -> alt.Shape:
    return alt.Shape("model:N", scale=_scale(data, lambda model: model.shape), title=None)


def _scale(data: ReportData, value: Callable[[Model], str]) -> alt.Scale:
    return alt.Scale(domain=[model.label for model in data.models], range=[value(model) for model in data.models])
