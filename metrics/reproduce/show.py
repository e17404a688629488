"""A reproduction as tables and as plain values."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from metrics.reproduce.preset import Column, Preset, Study, load_preset, preset_ids
from metrics.reproduce.window import CROSS_STACK

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from metrics.preference import Rate
    from metrics.reproduce.table import Cell, Outcome
    from metrics.reproduce.votes import StudyCell
    from metrics.stats import Estimate

WIDTH = 140  # columns, where there is no terminal
DAGGER = "\u2020"
UNCONFIRMED = "?"


def open_console() -> Console:
    """A console of standard output, 140 columns wide where that is no terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    return console


def print_list(console: Console) -> None:
    """Every preset with its source."""
    table = _table("", ("preset", "what it is", "numbers", "source"), left=(0, 1, 3))
    for entry in listing():
        table.add_row(entry["name"], entry["title"], str(entry["numbers"]), entry["source"])
    console.print(table)


def listing() -> list[dict[str, Any]]:
    """Every preset's name, title, count of published numbers and source."""
    found = []
    for name in preset_ids():
        preset = load_preset(name)
        count = sum(len(row.values) for row in preset.rows) if isinstance(preset, Preset) else len(preset.rows)
        found.append({"name": name, "title": preset.title, "numbers": count, "source": str(preset.source)})
    return found


def print_table(console: Console, preset: Preset, cells: Sequence[Cell], outcome: Outcome) -> None:
    """The protocol, a table for each column of the published one, and what the numbers rest on."""
    _print_protocol(console, preset)
    notes = _Notes()
    for name, column in preset.columns.items():
        mine = [cell for cell in cells if cell.column == name]
        if mine:
            console.print(_column_table(name, column, mine, notes))
            if column.metric and column.assumption:
                _say(console, f"Assumed: {column.assumption}.")
    for number, text in notes.numbered():
        _say(console, f"[{number}] {text}")
    for label, why in _grouped(outcome.absent):
        _say(console, f"not run: {label}: {notes.cited(why)}")
    for metric, why in outcome.not_scored.items():
        _say(console, f"not scored: {metric}: {notes.cited(why)}")
    _print_legend(console, cells)


def print_study(console: Console, study: Study, cells: Sequence[StudyCell], unmatched: int) -> None:
    """The published preferences beside those of one's own votes."""
    _say(console, f"{study.title} ({study.source})")
    _say(console, f"Unstated: {', '.join(study.unstated)}; so there is no interval of theirs.")
    if study.note:
        _say(console, f"{study.note}." if study.confirmed else f"{UNCONFIRMED}: not confirmed: {study.note}.")
    headings = ("preferred", "over", "published", "ours", "votes", "ties", "raters", "votes needed", "verdict")
    table, notes = _table("", headings, left=(0, 1, 8)), _Notes()
    for cell in cells:
        row, ours = cell.row, cell.ours
        mark = "" if study.confirmed else UNCONFIRMED
        table.add_row(
            f"{row.model_a}@{row.steps_a}",
            f"{row.model_b}@{row.steps_b}" + (f" ({row.base_b})" if row.base_b else ""),
            f"{row.preferred:.{study.digits}f} %{mark}",
            _percent(ours) if ours else "-",
            str(ours.n) if ours else "-",
            str(cell.ties) if ours else "-",
            str(ours.num_raters) if ours else "-",
            str(cell.votes_needed),
            cell.verdict + notes.mark(cell.reason),
        )
    console.print(table)
    for number, text in notes.numbered():
        _say(console, f"[{number}] {text}")
    if unmatched:
        _say(console, f"{unmatched} votes are on pairs that the study does not have.")
    _say(console, "Ours: votes for the first model, a tie half of one, with a 95 % interval over raters. inside: the "
         "published rate is in it. votes needed: for Wilson's interval at the published rate to be at most 5 points to "
         "each side.")  # fmt: skip


def as_json(preset: Preset, cells: Sequence[Cell], outcome: Outcome, run: str) -> dict[str, Any]:
    """Everything as plain values."""
    return {
        **_header(preset),
        "protocol": preset.protocol.model_dump(mode="json"),
        "columns": {name: column.model_dump(mode="json") for name, column in preset.columns.items()},
        "cross_stack": CROSS_STACK,
        "run": run if outcome.store else None,
        "numbers": [plain(asdict(cell)) for cell in cells],
        "not_run": dict(outcome.absent),
        "not_scored": dict(outcome.not_scored),
        "blocked": outcome.blocked,
    }


def study_as_json(study: Study, cells: Sequence[StudyCell], unmatched: int) -> dict[str, Any]:
    """Everything as plain values."""
    rows = [
        {**cell.row.model_dump(), "verdict": cell.verdict, "reason": cell.reason, "ties": cell.ties,
         "votes_needed": cell.votes_needed, "ours": plain(asdict(cell.ours)) if cell.ours else None}
        for cell in cells
    ]  # fmt: skip
    return {
        **_header(study), "base": study.base, "confirmed": study.confirmed, "note": study.note,
        "unstated": list(study.unstated), "numbers": rows, "votes_on_other_pairs": unmatched,
    }  # fmt: skip


def plain(value: Any) -> Any:
    """JSON-printable values: NaN (no interval) as null."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Notes:
    """Footnotes, each text once."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def mark(self, text: str) -> str:
        """`` [1]`` for a text, nothing for none."""
        if not text:
            return ""
        if text not in self._texts:
            self._texts.append(text)
        return f" \\[{self._texts.index(text) + 1}]"

    def cited(self, text: str) -> str:
        """``[1]`` for a text that is a footnote already, else the text."""
        return f"[{self._texts.index(text) + 1}]" if text in self._texts else text

    def numbered(self) -> Iterator[tuple[int, str]]:
        """All texts, from 1."""
        return enumerate(self._texts, start=1)


def _header(preset: Preset | Study) -> dict[str, Any]:
    return {"preset": preset.id, "title": preset.title, "source": preset.source.model_dump(mode="json")}


def _print_protocol(console: Console, preset: Preset) -> None:
    protocol = preset.protocol
    _say(console, f"{preset.title} ({preset.source})")
    count = f"{protocol.count:,} images of each model" if protocol.count else "number of images unknown"
    for name, text in (
        ("prompts", f"{protocol.prompts}; {count}"), ("size", protocol.resolution), ("sampler", protocol.sampler),
        ("guidance", protocol.guidance), ("reference", protocol.reference),
        ("unstated", "; ".join(protocol.unstated)), ("not as there", "; ".join(protocol.differs)),
    ):  # fmt: skip
        if text:
            _say(console, f"  {name}: {text}")


def _column_table(name: str, column: Column, cells: Sequence[Cell], notes: _Notes) -> Table:
    scale = "" if column.scale == 1 else f", printed values x{column.scale:g}"
    title = f"{name}: {column.metric}{scale}" if column.metric else f"{name}: no protocol of ours"
    table = _table(title, ("model", "steps", "published", "ours", "n", "window", "verdict"), left=(0, 6))
    digits = max(0, column.digits - round(math.log10(column.scale)))
    for cell in cells:
        ours, window = cell.ours, cell.window
        table.add_row(
            cell.model + (DAGGER if cell.trained_on else ""),
            str(cell.steps),
            f"{cell.published:.{column.digits}f}{'' if cell.confirmed else UNCONFIRMED}",
            _interval(ours, digits) if ours else "-",
            f"{ours.n:,}" if ours else "-",
            f"{window.low:.{digits}f} to {window.high:.{digits}f}{'' if window.published else ' *'}" if window else "-",
            cell.verdict + notes.mark(cell.reason) + notes.mark(_causes(cell)),
        )
    return table


def _causes(cell: Cell) -> str:
    """The likely causes in a line: those that hold, then those to check; nothing for a number that is not outside."""
    if cell.verdict == "outside" and not cell.causes:
        return "no known cause applies"
    certain = [cause.text for cause in cell.causes if cause.certain]
    others = [cause.text for cause in cell.causes if not cause.certain]
    parts = ["likely: " + "; ".join(certain)] if certain else []
    return ". ".join(parts + (["to check: " + "; ".join(others)] if others else []))


def _print_legend(console: Console, cells: Sequence[Cell]) -> None:
    if any(cell.window and not cell.window.published for cell in cells):
        allowed = ", ".join(f"{family} {share:.1%}" for family, share in CROSS_STACK.items())
        _say(console, "* computed: the published value, give or take half its last digit, 1.96 standard errors of both "
             "sides (theirs scaled from ours by the number of prompts), and what MLPerf allows between stacks "
             f"({allowed}).")  # fmt: skip
    if any(cell.trained_on for cell in cells):
        _say(console, f"{DAGGER}: the model was trained on this metric.")
    if any(not cell.confirmed for cell in cells):
        _say(console, f"{UNCONFIRMED}: this published number is not confirmed in a primary source.")
    counts: dict[str, int] = defaultdict(int)
    for cell in cells:
        counts[cell.verdict] += 1
    _say(console, ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + ".")


def _grouped(reasons: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Reasons with all that they hold for, in the order given."""
    found: dict[str, list[str]] = {}
    for name, why in reasons.items():
        found.setdefault(why, []).append(name)
    return ((", ".join(names), why) for why, names in found.items())


def _table(title: str, headings: Sequence[str], left: Collection[int]) -> Table:
    from rich.table import Table

    table = Table(title=title or None, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number in left else "right", overflow="fold")
    return table


def _interval(estimate: Estimate, digits: int) -> str:
    text = f"{estimate.value:.{digits}f}"
    if not math.isfinite(estimate.low):
        return text
    return f"{text} \\[{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def _percent(rate: Rate) -> str:
    return f"{100 * rate.value:.1f} % \\[{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False)
