"""What a report says first: sentences computed from the statistics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from hypersd_bench.contracts import MetricInfo
from reports.data import Cell, Contrast, Model, ReportData
from reports.numbers import decimals, fixed, interval, milliseconds, percent
from reports.strings import Said, counted, joined, listed, say, semicolons
from reports.study import Preference, StudyData


@dataclass(frozen=True, slots=True)
class Finding:
    """What one metric says at one step count. level: the models not told apart from the best."""

    metric: MetricInfo
    best: Model
    cell: Cell
    level: tuple[Model, ...]
    text: Said


@dataclass(frozen=True, slots=True)
class Budget:
    """The verdict at one step count: a sentence to act on, the findings it sums up, and what it costs."""

    steps: int
    headline: Said
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
    winner = data.model(best.model)
    text = say(
        "verdict.finding",
        metric=metric.label,
        winner=winner.label,
        value=f"{fixed(best.value, places)} {interval(best.low, best.high, places)}".rstrip(),
        n=f"{best.n:,}",
        level=say("verdict.level", models=listed(model.label for model in level)) if level else "",
        trained=say("verdict.winner_trained", winner=winner.label) if winner.was_trained_on(metric.id) else "",
    )
    return Finding(metric, winner, best, level, text)


def _headline(data: ReportData, steps: int, findings: Sequence[Finding]) -> Said:
    """Name the models that are best or level with the best on every metric, or say that the metrics disagree."""
    standing = [{finding.best.name} | {model.name for model in finding.level} for finding in findings]
    everywhere = [model.label for model in data.models if all(model.name in names for names in standing)]
    num_rivals = len({c.model for c in data.cells if c.steps == steps and c.value is not None})
    at = counted(steps, "step")
    if not everywhere:
        return say("verdict.disagree", at=at, leaders=semicolons(_leaders(findings)))
    if len(everywhere) == 1:
        scope = say("verdict.one_metric") if len(findings) == 1 else say("verdict.all_metrics", n=len(findings))
        hedged = any(finding.level for finding in findings)
        return say("verdict.take_level" if hedged else "verdict.take", at=at, who=everywhere[0], scope=scope)
    if len(everywhere) == num_rivals:
        return say("verdict.nothing_tells", at=at, n=num_rivals)
    return say("verdict.between_two" if len(everywhere) == 2 else "verdict.between", at=at, who=listed(everywhere))


def _leaders(findings: Sequence[Finding]) -> list[Said]:
    """Say whom the metrics favour, the metrics of one model together."""
    metrics: dict[str, list[str]] = defaultdict(list)
    for finding in findings:
        metrics[finding.best.label].append(finding.metric.label)
    return [
        say("verdict.favours" if len(mine) == 1 else "verdict.favour", metrics=listed(mine), winner=winner)
        for winner, mine in metrics.items()
    ]


def _cost(data: ReportData, steps: int) -> str:
    timed = [x for x in data.latencies if x.steps == steps and x.stage == "total"]
    if not timed:
        return ""
    low, high = min(x.median_ms for x in timed), max(x.median_ms for x in timed)
    span = milliseconds(low) if milliseconds(low) == milliseconds(high) else f"{milliseconds(low)}-{milliseconds(high)}"
    return say("verdict.cost", span=span, device=timed[0].device)


def cheapest(data: ReportData) -> str:
    """Say which configuration is the cheapest that is nearly the best; empty where that can't be asked."""
    found = data.cheapest
    if found is None:
        return ""
    metric = data.metric(found.metric)
    places = decimals(c for c in data.cells if c.metric == found.metric)
    delta = fixed(found.delta, max(places, 1)) if found.is_usual else f"{found.delta:g}"
    within = say("verdict.within_usual" if found.is_usual else "verdict.within", delta=delta, metric=metric.label)
    if not found.model:
        return say("verdict.none_within", within=within)
    latency = data.latency(found.model, found.steps) if found.cost == "latency" else None
    return say(
        "verdict.cheapest",
        cost=say(f"cost.{found.cost}"),
        within=within,
        model=data.model(found.model).label,
        at=counted(found.steps, "step"),
        price=say("verdict.price", ms=milliseconds(latency.median_ms)) if latency else "",
        others=say("verdict.others_within", n=found.num_within - 1)
        if found.num_within > 1
        else say("verdict.only_one_within"),
    )


def resolution(data: ReportData) -> list[Said]:
    """Say of each metric what this n could show: smaller differences than that stay hidden."""
    said = []
    for metric in data.metrics:
        known = [d.detectable for d in data.differences if d.metric == metric.id and d.detectable is not None]
        if known:
            places = decimals(d for d in data.differences if d.metric == metric.id)
            low, high = fixed(min(known), places), fixed(max(known), places)
            span = low if low == high else say("verdict.span", low=low, high=high)
            said.append(say("verdict.resolution", metric=metric.label, span=span))
    return said


def preferences(study: StudyData) -> list[Said]:
    """Say each comparison of a study in a sentence, on its first question."""
    return [_preference(row) for row in study.criteria[0].preferences]


def _preference(row: Preference) -> Said:
    winner, loser, value, low, high = (
        (row.a, row.b, row.value, row.low, row.high)
        if row.value >= 0.5
        else (row.b, row.a, 1 - row.value, 1 - row.high, 1 - row.low)
    )
    figures = say(
        "people.figures",
        rate=f"{percent(value)} [{percent(low)}, {percent(high)}]",
        votes=counted(row.n, "vote"),
        raters=counted(row.num_raters, "rater"),
    )
    if row.verdict:
        return say("people.prefer", winner=winner, loser=loser, figures=figures)
    return say("people.no_preference", a=row.a, b=row.b, winner=winner, figures=figures)


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
        return say("verdict.nobody_everywhere")
    if len(everywhere) == len(data.rivals):
        return say("verdict.too_small")
    return say("verdict.only_model" if len(everywhere) == 1 else "verdict.only_models", who=listed(everywhere))


def summary(data: ReportData) -> Said:
    """Say in one sentence what was compared, with how many images."""
    if not data.runs:
        return say("summary.training", n=counted(len({curve.model for curve in data.curves}), "training"))
    sizes = sorted({(cell.n, cell.num_prompts) for cell in data.cells if cell.value is not None})
    mean: str = ""
    if sizes:
        smallest, prompts = sizes[0]
        key = "summary.mean_at_least" if len(sizes) > 1 else "summary.mean"
        mean = say(key, images=counted(smallest, "image"), prompts=counted(prompts, "prompt"))
    return say(
        "summary.run",
        models=counted(len(data.rivals), "model"),
        steps=listed(map(str, data.shared_steps)),
        images=counted(data.num_images, "image"),
        mean=mean,
    )


def contrast_outcome(data: ReportData, contrast: Contrast) -> Said:
    """Say where a contrast's difference holds, and which way."""
    if not contrast.differences:
        steps = listed(map(str, contrast.steps))
        return say("contrast.not_yet", model=contrast.model, against=contrast.against, steps=steps)
    label = data.model(contrast.model).label
    said = []
    for count in contrast.steps:
        ways = []
        for way in ("better", "worse"):
            here = [d for d in contrast.differences if (d.steps, d.verdict) == (count, way)]
            if here:
                ways.append(say(f"contrast.{way}", metrics=listed(data.metric(d.metric).label for d in here)))
        if ways:
            said.append(say("contrast.at", at=counted(count, "step"), model=label, ways=listed(ways)))
    return joined(said) if said else say("contrast.none")
