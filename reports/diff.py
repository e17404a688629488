"""Two runs of the same prompts and noise set side by side, and a gate that fails where the second got worse."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from hypersd_bench.contracts import MetricInfo
from hypersd_bench.errors import InputError, unknown_name
from hypersd_bench.store import RunStore
from metrics.comparison import View, contrasts, summaries
from metrics.tradeoff import step_curves
from reports.numbers import decimals, fixed, interval
from reports.tables import ARROWS, markdown_escape

LATENCY = "latency"
_GATE = re.compile(r"(?P<name>[^:]+):(?P<sign>[+-])(?P<size>\d+(?:\.\d+)?)(?P<percent>%?)")


@dataclass(frozen=True, slots=True)
class Change:
    """What one metric of one configuration changed by, from the first run to the second.

    difference: second minus first, with a paired 95 % interval (None for latency, and where there is none). p_holm:
    corrected over all changes of the two runs. verdict: of the second run.
    """

    metric: str
    model: str
    steps: int
    before: float
    difference: float
    low: float | None
    high: float | None
    n: int
    p_holm: float | None
    verdict: str


@dataclass(frozen=True, slots=True)
class Gate:
    """A limit that a change must not pass, as ``clip-score:-0.2``, ``fid/clean:+1`` or ``latency:+10%``.

    name: a metric's id, its family, or latency. limit: signed, in the metric's unit or in percent of the first run.
    """

    name: str
    limit: float
    percent: bool

    def fits(self, metric: str) -> bool:
        """Whether the gate is about this metric."""
        return self.name in (metric, metric.partition("/")[0])

    def broken_by(self, change: Change) -> bool:
        """Whether the change goes beyond the limit, by its point estimate."""
        size = 100 * change.difference / abs(change.before) if self.percent and change.before else change.difference
        return size < self.limit if self.limit < 0 else size > self.limit

    def __str__(self) -> str:
        return f"{self.name}:{self.limit:+g}{'%' if self.percent else ''}"


@dataclass(frozen=True, slots=True)
class Diff:
    """Two runs and what changed. only_first, only_second: configurations that the other lacks, as ``name@steps``."""

    first: str
    second: str
    metrics: tuple[MetricInfo, ...]
    changes: tuple[Change, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    def broken(self, gates: Sequence[Gate]) -> list[tuple[Gate, Change]]:
        """Every gate with every change that breaks it."""
        return [(g, c) for g in gates for c in self.changes if g.fits(c.metric) and g.broken_by(c)]

    def to_json(self, gates: Sequence[Gate]) -> dict[str, Any]:
        """Plain values."""
        broken = [{"gate": str(gate), **asdict(change)} for gate, change in self.broken(gates)]
        return {
            "first": self.first,
            "second": self.second,
            "changes": [asdict(change) for change in self.changes],
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
            "broken": broken,
        }


def parse_gate(text: str) -> Gate:
    """Read a gate; raises InputError that shows how one is written."""
    match = _GATE.fullmatch(text.strip())
    if match is None:
        raise InputError(
            f"--fail-on {text}: write a metric and how far it may go, with its sign, as clip-score:-0.2, fid:+1 or "
            f"{LATENCY}:+10%"
        )
    return Gate(match["name"], float(match["sign"] + match["size"]), bool(match["percent"]))


def diff_runs(first: RunStore, second: RunStore) -> Diff:
    """Compare the configurations that two runs share, paired by prompt and noise.

    Raises InputError where their prompts, noise or protocols differ, and where they share no configuration.
    """
    view = View([first, second])
    of_run = [
        {(view.origin(cell)[1], cell[1]): cell[0] for cell in view.cells if view.origin(cell)[0] is store}
        for store in (first, second)
    ]
    shared = [key for key in of_run[0] if key in of_run[1]]
    if not shared:
        raise InputError(f"{first.folder} and {second.folder} share no model at the same step count")
    names = {(of_run[1][key], key[1]): key[0] for key in shared}
    found = contrasts(view, [(of_run[1][key], of_run[0][key], key[1]) for key in shared])
    levels = {(s.metric, s.model, s.steps): s.estimate.value for s in summaries(view) if s.estimate}
    changes = [
        Change(
            metric=c.metric,
            model=names[c.model, c.steps],
            steps=c.steps,
            before=levels[c.metric, c.baseline, c.steps],
            difference=c.difference.value,
            low=c.difference.low if isfinite(c.difference.low) else None,
            high=c.difference.high if isfinite(c.difference.high) else None,
            n=c.difference.n,
            p_holm=c.p_holm,
            verdict=c.verdict,
        )
        for c in found
    ]
    return Diff(
        first=str(first.folder),
        second=str(second.folder),
        metrics=tuple(info for info in view.infos if any(c.metric == info.id for c in changes)),
        changes=(*changes, *_latency_changes(view, [(key, of_run[0][key], of_run[1][key]) for key in shared])),
        only_first=tuple(f"{model}@{steps}" for model, steps in of_run[0] if (model, steps) not in of_run[1]),
        only_second=tuple(f"{model}@{steps}" for model, steps in of_run[1] if (model, steps) not in of_run[0]),
    )


def require_known(gates: Sequence[Gate], found: Diff) -> None:
    """Raise InputError for a gate about nothing that was compared: it would pass whatever happened."""
    known = sorted({name for c in found.changes for name in (c.metric, c.metric.partition("/")[0])})
    for gate in gates:
        if not any(gate.fits(change.metric) for change in found.changes):
            raise unknown_name("metric", gate.name, known, "--fail-on")


def _latency_changes(view: View, shared: Sequence[tuple[tuple[str, int], str, str]]) -> list[Change]:
    """Milliseconds per image, where both were timed on one device at one batch size."""
    if not view.infos:
        return []
    timed = {point.cell: point.latency for info in view.infos for point in step_curves(view, info)}
    changes = []
    for (model, steps), first, second in shared:
        before, after = timed.get((first, steps)), timed.get((second, steps))
        if before and after and (before.device, before.batch_size) == (after.device, after.batch_size):
            change = after.value - before.value
            changes.append(Change(LATENCY, model, steps, before.value, change, None, None, 0, None, ""))
    return changes


def to_markdown(found: Diff) -> str:
    """The changes as Markdown: one row for each configuration, one column for each metric."""
    metrics = [*((info.id, f"{info.label} {ARROWS[info.direction]}") for info in found.metrics)]
    if any(change.metric == LATENCY for change in found.changes):
        metrics.append((LATENCY, "ms per image"))
    by_key = {(c.metric, c.model, c.steps): c for c in found.changes}
    places = {name: decimals(c for c in found.changes if c.metric == name) for name, _ in metrics}
    rows = list(dict.fromkeys((c.steps, c.model) for c in sorted(found.changes, key=lambda c: c.steps)))
    lines = [
        f"{markdown_escape(found.second)} minus {markdown_escape(found.first)}, same prompts and noise, 95 % "
        "intervals; bold: the difference holds after Holm's correction.",
        "",
        f"| Steps | Model | {' | '.join(markdown_escape(label) for _, label in metrics)} |",
        f"| --: | :-- |{' --: |' * len(metrics)}",
    ]
    for steps, model in rows:
        cells = [_cell(by_key.get((name, model, steps)), places[name]) for name, _ in metrics]
        lines.append(f"| {steps} | {markdown_escape(model)} | {' | '.join(cells)} |")
    for which, lone in ((found.first, found.only_first), (found.second, found.only_second)):
        if lone:
            lines += ["", f"Only in {markdown_escape(which)}: {markdown_escape(', '.join(lone))}."]
    return "\n".join(lines)


def _cell(change: Change | None, places: int) -> str:
    if change is None:
        return "\u2013"
    text = fixed(change.difference, places, signed=True)
    text = f"**{text}**" if change.verdict in ("better", "worse") else text
    return f"{text} {markdown_escape(interval(change.low, change.high, places, signed=True))}".rstrip()


def gate_lines(found: Diff, gates: Sequence[Gate]) -> list[str]:
    """What the gates say, in words: each change beyond its limit, and whether its interval reaches back over it."""
    lines = []
    for gate, change in found.broken(gates):
        places = decimals(c for c in found.changes if c.metric == change.metric)
        said = (
            f"{fixed(change.difference, places, signed=True)} {interval(change.low, change.high, places, signed=True)}"
        )
        doubt = ", though no difference is shown" if change.verdict == "no difference shown" else ""
        lines.append(f"fails {gate}: {change.model} at {change.steps}, {change.metric} {said.rstrip()}{doubt}")
    return lines or [f"no gate fails ({', '.join(map(str, gates))})"]
