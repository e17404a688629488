"""What a report says first: sentences computed from the statistics, and what would spoil the reading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypersd_bench.contracts import MetricInfo
from reports.data import Cell, Model, ReportData
from reports.numbers import counted, decimals, fixed, interval, listed, milliseconds, percent
from reports.study import Preference, StudyData


@dataclass(frozen=True, slots=True)
class Finding:
    """What one metric says at one step count. level: the labels of those not told apart from the best."""

    metric: MetricInfo
    best: Model
    cell: Cell
    level: tuple[Model, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Budget:
    """The verdict at one step count: a sentence to act on, the findings it sums up, and what it costs."""

    steps: int
    headline: str
    findings: tuple[Finding, ...]
    cost: str


def budgets(data: ReportData) -> list[Budget]:
    """Judge every step count at which at least two models were scored."""
    return [budget for steps in data.steps if (budget := _budget(data, steps))]


def _budget(data: ReportData, steps: int) -> Budget | None:
    findings = tuple(finding for metric in data.metrics if (finding := _finding(data, metric, steps)))
    if not findings:
        return None
    return Budget(steps, _headline(data, steps, findings), findings, _cost(data, steps))


def _finding(data: ReportData, metric: MetricInfo, steps: int) -> Finding | None:
    marked = [c for c in data.cells if c.metric == metric.id and c.steps == steps and c.mark]
    best = next((cell for cell in marked if cell.mark == "best"), None)
    if best is None or best.value is None:
        return None
    level = tuple(data.model(cell.model) for cell in marked if cell.mark == "level")
    places = decimals(cell for cell in data.cells if cell.metric == metric.id)
    value = f"{fixed(best.value, places)} {interval(best.low, best.high, places)}".rstrip()
    winner = data.model(best.model)
    text = f"{metric.label}: {winner.label} {value}, n = {best.n:,}"
    if level:
        text += f"; not told apart from it: {listed(model.label for model in level)}"
    if winner.was_trained_on(metric.id):
        text += f"; {winner.label} was trained on this metric"
    return Finding(metric, winner, best, level, f"{text}.")


def _headline(data: ReportData, steps: int, findings: Sequence[Finding]) -> str:
    """Name the models that are best or level with the best on every metric, or say that the metrics disagree."""
    standing = [{finding.best.name} | {model.name for model in finding.level} for finding in findings]
    everywhere = [model.label for model in data.models if all(model.name in names for names in standing)]
    num_rivals = len({c.model for c in data.cells if c.steps == steps and c.value is not None})
    at = f"At {counted(steps, 'step')}"
    scope = "the one metric" if len(findings) == 1 else f"all {len(findings)} metrics"
    if not everywhere:
        leaders = "; ".join(f"{finding.metric.label} favours {finding.best.label}" for finding in findings)
        return f"{at}, the metrics disagree: {leaders}."
    if len(everywhere) == 1:
        hedge = ", or not told apart from the best," if any(finding.level for finding in findings) else ""
        return f"{at}, take {everywhere[0]}: it is the best{hedge} on {scope}."
    if len(everywhere) == num_rivals:
        return f"{at}, nothing tells the {num_rivals} models apart: with this n no metric shows one to be worse."
    either = "either" if len(everywhere) == 2 else "any of them"
    return f"{at}, it is between {listed(everywhere)}: no metric shows {either} to be worse than the best."


def _cost(data: ReportData, steps: int) -> str:
    timed = [x for x in data.latencies if x.steps == steps and x.stage == "total"]
    if not timed:
        return ""
    low, high = min(x.median_ms for x in timed), max(x.median_ms for x in timed)
    span = milliseconds(low) if milliseconds(low) == milliseconds(high) else f"{milliseconds(low)}-{milliseconds(high)}"
    return f"{span} ms per image on {timed[0].device}"


def cheapest(data: ReportData) -> str:
    """Say which configuration is the cheapest that is nearly the best; empty where that can't be asked."""
    found = data.cheapest
    if found is None:
        return ""
    metric = data.metric(found.metric)
    places = decimals(c for c in data.cells if c.metric == found.metric)
    within = f"within {fixed(found.delta, max(places, 1))} of the best {metric.label} (1 %)"
    if not found.model:
        return f"No configuration is shown to be {within} at 95 %, not even the best: more prompts would tell."
    model = data.model(found.model).label
    others = f"; {found.num_within - 1} more are" if found.num_within > 1 else "; it is the only one"
    latency = data.latency(found.model, found.steps) if found.cost == "latency" else None
    price = f", {milliseconds(latency.median_ms)} ms per image" if latency else ""
    at = counted(found.steps, "step")
    return f"The cheapest by {found.cost} shown to be {within} is {model} at {at}{price}{others}."


def resolution(data: ReportData) -> list[str]:
    """Say of each metric what this n could show: smaller differences than that stay hidden."""
    said = []
    for metric in data.metrics:
        known = [d.detectable for d in data.differences if d.metric == metric.id and d.detectable is not None]
        if known:
            places = decimals(d for d in data.differences if d.metric == metric.id)
            low, high = fixed(min(known), places), fixed(max(known), places)
            span = low if low == high else f"{low} to {high}"
            said.append(f"{metric.label}: a true difference of {span} would be shown with 80 % power.")
    return said


def preferences(study: StudyData) -> list[str]:
    """Say each comparison of a study in a sentence, on its first question."""
    return [_preference(row) for row in study.criteria[0].preferences]


def _preference(row: Preference) -> str:
    winner, loser, value, low, high = (
        (row.a, row.b, row.value, row.low, row.high)
        if row.value >= 0.5
        else (row.b, row.a, 1 - row.value, 1 - row.high, 1 - row.low)
    )
    figures = f"{percent(value)} [{percent(low)}, {percent(high)}], {counted(row.n, 'vote')}, {row.num_raters} raters"
    if row.verdict:
        return f"People prefer {winner} over {loser}: {figures}."
    return f"People show no preference between {row.a} and {row.b}: {winner} {figures}."


def overall(data: ReportData, judged: Sequence[Budget]) -> str:
    """Say who is nowhere shown to be worse than the best; empty when fewer than two step counts were judged."""
    if len(judged) < 2:
        return ""
    standing = [
        {finding.best.name} | {model.name for model in finding.level}
        for budget in judged
        for finding in budget.findings
    ]
    rivals = [model for model in data.models if any(model.name in names for names in standing)]
    everywhere = [model.label for model in rivals if all(model.name in names for names in standing)]
    if not everywhere:
        return "No model is at the front everywhere: which to take depends on the number of steps and on the metric."
    if len(everywhere) == len([model for model in data.models if not model.is_reference]):
        return "No model is shown to be worse than the best anywhere: this run is too small to choose by."
    only = "is the only model" if len(everywhere) == 1 else "are the only models"
    return f"{listed(everywhere)} {only} at the front of every metric at every step count."


def summary(data: ReportData) -> str:
    """Say in one sentence what was compared, with how many images."""
    competing = [model for model in data.models if not model.is_reference]
    shared = sorted({steps for model in competing for steps in model.steps})
    sizes = sorted({(cell.n, cell.num_prompts) for cell in data.cells if cell.value is not None})
    text = (
        f"{counted(len(competing), 'model')} at {listed(map(str, shared))} steps, {counted(data.num_images, 'image')}"
    )
    if sizes:
        smallest, prompts = sizes[0]
        text += f"; each figure is a mean over {'at least ' if len(sizes) > 1 else ''}{counted(smallest, 'image')} "
        text += f"of {counted(prompts, 'prompt')}"
    return f"{text}. All models got the same prompts and the same noise."


def caveats(data: ReportData) -> list[str]:
    """Say what would spoil the reading: a run not finished, missing scores, metrics trained on, proxies."""
    found = []
    if data.num_images < data.num_expected:
        found.append(
            f"The run is not finished: {data.num_images:,} of {data.num_expected:,} images are there. "
            "The figures will change."
        )
    if data.base == "pocket":
        found.append("This is the pocket miniature: its figures say nothing about SDXL or Stable Diffusion 1.5.")
    if not data.cells:
        found.append("Nothing has been scored yet: hypersd-bench score adds the metrics.")
    found += data.notes
    if data.study is not None:
        found += [f"The study: {deviation}." for deviation in data.study.deviations]
    found += _missing(data)
    for metric in data.metrics:
        trained = [model.label for model in data.models if model.was_trained_on(metric.id)]
        if trained:
            verb = "was" if len(trained) == 1 else "were"
            found.append(f"{listed(trained)} {verb} trained on {metric.label}: a lead there is no evidence of quality.")
    found += [f"{metric.label} ({metric.id}): {metric.note}." for metric in data.metrics if metric.note]
    return found


def _missing(data: ReportData) -> list[str]:
    """Count the images without a score, by model, step count and reason, with the metrics that lack them."""
    groups: dict[tuple[str, int, int, str], list[str]] = {}
    for cell in data.cells:
        if cell.missing:
            key = (cell.model, cell.steps, cell.missing, cell.reason)
            groups.setdefault(key, []).append(data.metric(cell.metric).label)
    return [
        f"{counted(missing, 'image')} of {data.model(model).label} at {counted(steps, 'step')} without "
        f"{listed(metrics)}{f': {reason}' if reason else ''}. Missing is not counted as zero."
        for (model, steps, missing, reason), metrics in groups.items()
    ]
