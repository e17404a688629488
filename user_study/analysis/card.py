"""The human-evaluation card: what reviewers ask of a study, filled with its own figures (Otani et al., CVPR 2023)."""

from __future__ import annotations

from typing import Any

from user_study.analysis.result import Analysis
from user_study.analysis.text import percent, verdict


def card_markdown(found: Analysis) -> str:
    """The card as Markdown, to go into a paper's appendix."""
    counts, session = found.counts, found.session
    rows = [
        ("Study, design hash", f"{found.study}, {found.design_hash}"),
        ("Configurations", ", ".join(counts["configurations"])),
        ("Pairs, prompts", f"{counts['pairs']}, {counts['prompts']}; both images of a pair from the same noise"),
        ("Images", "PNG, both sides of one size, metadata removed, opaque names"),
        ("Assignment", _assignment(session)),
        ("Sides", f"counterbalanced within rater and pair type; left chosen {percent(found.sides)}"),
        ("Raters", f"{counts['joined']} joined, {counts['consented']} consented, {counts['voted']} voted, "
                   f"{counts['finished']} finished"),
        ("Excluded", f"{len(found.excluded)} ({_flagged(found)} flagged by rules fixed before the data)"),
        ("Rules", ", ".join(f"{name} {value}" for name, value in found.rules.items())),
        ("Votes", f"{counts['votes']}, {counts['surplus']} beyond their quota"),
        ("Time", "no votes" if counts["median_ms"] is None else f"median {counts['median_ms'] / 1000:.1f} s a pair"),
        ("Gold", f"{counts['gold_right']} of {counts['gold']} right" if counts["gold"] else "none asked"),
        ("Stopping rule", f"{session['votes_per_pair']} votes on each pair" if session["votes_per_pair"] else "none"),
        ("Planned for", f"a preference of {found.planned_rate:.0%}"),
        ("Languages", ", ".join(f"{name} {n}" for name, n in counts["languages"].items())),
        ("Input", ", ".join(f"{name} {n}" for name, n in counts["inputs"].items())),
        ("Pay, recruitment, ethics approval", "not recorded by the program: fill in"),
        ("Deviations", "; ".join(found.deviations) or "none"),
    ]  # fmt: skip
    text = ["# Human-evaluation card", "", "| | |", "| --- | --- |", *(f"| {name} | {_cell(v)} |" for name, v in rows)]
    for result in found.criteria:
        text += ["", f"## {result.criterion}", "", *(f"- {verdict(row)}" for row in result.rates)]
        text += ["", *_tie_table(result.rates)]
        alpha, again = result.agreement["alpha"], result.agreement["retest"]
        text += ["", f"Krippendorff's alpha {_number(alpha)} ({alpha['n']} labels, interval over prompts)."]
        again_text = f"same answer {percent(again)} of {again['n']}" if again["n"] else "not asked"
        text += [f"Asked again with sides swapped: {again_text}."]
    for language, words in found.wording.items():
        text += ["", f"## Wording ({language})", "", f"Title: {words['title']}", ""]
        text += [*words["consent"], "", *words["instructions"], ""]
        text += [f"{criterion}: {question}" for criterion, question in words["questions"].items()]
    return "\n".join([*text, ""])


def _assignment(session: dict[str, Any]) -> str:
    return (
        f"{session['policy']}, each rater at most {session['pairs_per_rater']} pairs and none twice; "
        f"{session['practice']} practice pairs, one item of {session['gold_every'] or 'none'} gold, "
        f"one of {session['repeat_every'] or 'none'} repeated; lease {session['lease_minutes']} min"
    )


def _flagged(found: Analysis) -> int:
    return sum(bool(row["flags"]) for row in found.raters)


def _tie_table(rates: list[dict[str, Any]]) -> list[str]:
    heads = "| comparison | votes | ties | both bad | ties half | ties left out |"
    rows = [
        f"| {row['comparison']} | {row['n']} | {row['ties']} | {row['both_bad']} | {percent(row['rate'])} | "
        f"{percent(row['rate_decided'])} |"
        for row in rates
    ]
    return [heads, "| --- | --- | --- | --- | --- | --- |", *rows]


def _number(value: dict[str, Any]) -> str:
    if value["value"] is None or value["value"] != value["value"]:
        return "not defined"
    ends = "" if value["low"] != value["low"] else f" [{value['low']:.2f}, {value['high']:.2f}]"
    return f"{value['value']:.2f}{ends}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
