"""The analysis for a terminal: verdicts first, then compact tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from user_study.analysis.result import Analysis, CriterionResult


def lines(found: Analysis) -> list[str]:
    """The analysis in words and tables."""
    counts = found.counts
    said = [
        f"{counts['votes']} votes on {counts['pairs']} pairs by {counts['voted']} raters "
        f"({counts['joined']} joined, {counts['finished']} finished); design {found.study}"
    ]
    if not counts["votes"]:
        return [*said, "nothing to analyse yet"]
    for result in found.criteria:
        if len(found.criteria) > 1:
            said += ["", f"== {result.criterion} =="]
        said += _verdicts(result) + _ranking(result) + _agreement(result) + _sensitivity(result) + _metrics(result)
        said += _axes(result)
    return said + _raters(found) + [f"deviation: {text}" for text in found.deviations]


def percent(rate: dict[str, Any] | None) -> str:
    """A rate with its interval: ``61 % [55, 67]``."""
    if rate is None or rate["value"] is None:
        return "-"
    ends = "" if _missing(rate["low"]) else f" [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]"
    return f"{100 * rate['value']:.0f} %{ends}"


def verdict(row: dict[str, Any]) -> str:
    """What a comparison's votes let one say, in one sentence."""
    rate = row["rate"]
    if rate is None:
        return f"{row['a']} against {row['b']}: no votes"
    evidence = f"{percent(rate)}, {row['n']} votes, {rate['num_raters']} raters, {rate['num_prompts']} prompts"
    if not row["verdict"]:
        return f"{row['a']} and {row['b']} not told apart: {row['a']} preferred {evidence}"
    if row["verdict"] == "a":
        return f"{row['a']} preferred over {row['b']}: {evidence}"
    turned = {**rate, "value": 1 - rate["value"], "low": 1 - rate["high"], "high": 1 - rate["low"]}
    return f"{row['b']} preferred over {row['a']}: {evidence.replace(percent(rate), percent(turned), 1)}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows in columns of equal width, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    return [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(cells)).rstrip()
        for cells in (list(zip(row, widths, strict=True)) for row in [heads, *rows])
    ]


def _verdicts(result: CriterionResult) -> list[str]:
    rows = [
        (
            row["comparison"], str(row["n"]), str(row["a_preferred"]), str(row["ties"]), str(row["both_bad"]),
            str(row["b_preferred"]), percent(row["rate"]), percent(row["rate_decided"]),
            "-" if row["p_holm"] is None else f"{row['p_holm']:.2g}",
            "-" if row["rate"] is None else f"{row['rate']['design_effect']:.1f} ({row['rate']['widest']})",
        )
        for row in result.rates
    ]  # fmt: skip
    heads = ("comparison", "votes", "a", "tie", "bad", "b", "a preferred, ties half", "ties left out", "p (Holm)",
             "design effect")  # fmt: skip
    return ["", *(verdict(row) for row in result.rates), "", *table(heads, rows)]


def _ranking(result: CriterionResult) -> list[str]:
    said = []
    if len(result.rankings) > 1:
        said += ["", f"No votes connect the {len(result.rankings)} groups below: each is ranked within itself."]
    for ranking in result.rankings:
        rows = [
            (
                entry["name"], _ranks(entry), f"{entry['value']:+.2f} [{entry['low']:+.2f}, {entry['high']:+.2f}]",
                str(entry["n"]), ", ".join(entry["flags"]),
            )
            for entry in ranking["strengths"]
        ]  # fmt: skip
        side, left = ranking["side_bias"], 100 * ranking["left_rate"]
        said += ["", *table(("ranking", "rank set", "log-strength", "votes", ""), rows)]
        said.append(
            f"of two equals the left one is preferred {left:.0f} % (log-odds {side['value']:+.2f} "
            f"[{side['low']:+.2f}, {side['high']:+.2f}]); {ranking['method']}"
        )
    return said


def _ranks(entry: dict[str, Any]) -> str:
    low, high = entry["rank_low"], entry["rank_high"]
    return str(low) if low == high else f"{low}-{high}"


def _agreement(result: CriterionResult) -> list[str]:
    alpha, share, again = (result.agreement[name] for name in ("alpha", "percent", "retest"))
    said = ["", f"raters agree on {percent(share)} of pairs; Krippendorff's alpha {_number(alpha)}"]
    if again["n"]:
        said.append(f"asked again with sides swapped: the same answer {percent(again)} of {again['n']}")
    return said


def _number(value: dict[str, Any]) -> str:
    if _missing(value["value"]):
        return "not defined"
    ends = "" if _missing(value["low"]) else f" [{value['low']:.2f}, {value['high']:.2f}]"
    return f"{value['value']:.2f}{ends}"


def _missing(value: float | None) -> bool:
    return value is None or value != value


def _sensitivity(result: CriterionResult) -> list[str]:
    names = list(result.sensitivity[0]["scenarios"]) if result.sensitivity else []
    rows = []
    for row in result.sensitivity:
        ranges = (row["leaving_out_a_rater"], row["leaving_out_a_prompt"])
        ends = ["-" if r is None else f"{100 * r['low']:.0f} to {100 * r['high']:.0f} %" for r in ranges]
        rows.append((row["comparison"], *(percent(row["scenarios"][name]) for name in names), *ends))
    said = ["", "sensitivity, a preferred:"]
    for begin in range(0, len(names) + 2, 3):
        heads = [*names, "leaving out a rater", "leaving out a prompt"][begin : begin + 3]
        cells = [(row[0], *row[1 + begin : 4 + begin]) for row in rows]
        said += table(("comparison", *heads), cells)
    return said


def _metrics(result: CriterionResult) -> list[str]:
    found = result.metrics
    if found["reason"]:
        return ["", f"people against metrics: {found['reason']}"]
    rows = [
        (
            row["label"] + (" *" if row["trained_on_by"] else ""), row["id"], percent(row["agreement"]),
            "-" if row["agreement"] is None else str(row["agreement"]["n"]), row["reason"],
        )
        for row in found["metrics"]
    ]  # fmt: skip
    said = ["", *table(("people against metrics", "protocol", "agree", "votes", ""), rows)]
    if found["ceiling"]:
        said.append(f"a rater agrees with the majority of the others {100 * found['ceiling']['value']:.0f} %")
    if any(row["trained_on_by"] for row in found["metrics"]):
        said.append("* a model in this study was trained on the metric")
    return said


def _axes(result: CriterionResult) -> list[str]:
    timed = [row for row in result.axes if row["latency_ratio"] is not None]
    if not timed:
        return []
    rows = [
        (
            row["comparison"], f"{row['steps_a']} / {row['steps_b']}",
            f"{1000 * row['latency_a']:.0f} / {1000 * row['latency_b']:.0f} ms", f"{row['latency_ratio']:.2f}",
            percent(row["rate"]),
        )
        for row in timed
    ]  # fmt: skip
    return ["", *table(("steps and latency, a / b", "steps", "latency", "ratio", "a preferred"), rows)]


def _raters(found: Analysis) -> list[str]:
    flagged = [row for row in found.raters if row["flags"]]
    said = ["", f"{len(flagged)} of {len(found.raters)} raters flagged"]
    said += [f"  {row['rater'][:8]}: {'; '.join(row['flags'])}" for row in flagged]
    if flagged:
        said.append(
            "they are left out of everything but the sensitivity table"
            if found.excluded
            else "they count; the sensitivity table shows the rates without them"
        )
    if found.sides is not None:
        said.append(f"the left picture was chosen {percent(found.sides)} of {found.sides['n']}")
    return said
