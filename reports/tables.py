"""The tables of a report and their twins: CSV for programs, Markdown and LaTeX (booktabs) for papers."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hypersd_bench.contracts import MetricInfo
from reports.data import Cell, Difference, Mark, ReportData
from reports.numbers import MINUS, decimals, fixed, gibibytes, interval, milliseconds
from reports.study import StudyData

ARROWS = {"higher": "\u2191", "lower": "\u2193"}
DAGGER = "\u2020"  # the model was trained on this metric


@dataclass(frozen=True, slots=True)
class Entry:
    """What one cell of a table says; detail is its interval or, where there is no value, the reason."""

    text: str
    detail: str = ""
    mark: Mark = ""
    trained_on: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table: which model at how many steps, and its entries, one for each heading."""

    steps: int
    model: str
    label: str
    entries: tuple[Entry, ...]
    num_images: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table as a reader sees it. headings exclude the steps, the model and n; first: the row opens a new block."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str

    def opens_block(self, index: int) -> bool:
        """Whether this row is the first of its step count."""
        return index == 0 or self.rows[index].steps != self.rows[index - 1].steps


def results(data: ReportData) -> Table:
    """Lay out the main table: model and steps down, metrics and latency across."""
    places = {m.id: decimals(c for c in data.cells if c.metric == m.id) for m in data.metrics}
    timed = any(x.stage == "total" for x in data.latencies)
    rows = []
    for steps, model in data.configurations():
        cells = [data.cell(metric.id, model.name, steps) for metric in data.metrics]
        entries = [
            _result_entry(cell, places[metric.id], model.was_trained_on(metric.id))
            for metric, cell in zip(data.metrics, cells, strict=True)
        ]
        if timed:
            latency = data.latency(model.name, steps)
            entries.append(Entry(milliseconds(latency.median_ms) if latency else "", "" if latency else "not timed"))
        if data.memories:
            memory = data.memory(model.name, steps)
            entries.append(Entry(gibibytes(memory.peak_bytes) if memory else "", "" if memory else "not measured"))
        rows.append(Row(steps, model.name, model.label, tuple(entries), _sizes(cells)))
    headings = [f"{metric.label} {ARROWS[metric.direction]}" for metric in data.metrics]
    return Table(
        caption=f"Results of {data.title} by step count, with 95 % intervals.",
        headings=(*headings, *(["ms per image"] if timed else []), *(["peak GiB"] if data.memories else [])),
        rows=tuple(rows),
        note=_results_note(data),
    )


def _result_entry(cell: Cell | None, places: int, trained_on: bool) -> Entry:
    if cell is None or cell.value is None:
        return Entry("", cell.reason if cell else "not scored")
    return Entry(fixed(cell.value, places), interval(cell.low, cell.high, places), cell.mark, trained_on)


def _sizes(cells: Iterable[Cell | None]) -> str:
    """The number of images behind a row's values: one number, or the range over its metrics."""
    sizes = sorted({cell.n for cell in cells if cell and cell.value is not None})
    if not sizes:
        return "0"
    return f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,}-{sizes[-1]:,}"


def _results_note(data: ReportData) -> str:
    note = (
        "Bold: best of its step count. Underlined: no difference from the best shown (paired by prompt and noise, "
        "Holm's correction over all pairs of models, 5 %). Intervals are 95 %, clustered by prompt."
    )
    if any(model.was_trained_on(metric.id) for model in data.models for metric in data.metrics):
        note += f" {DAGGER}: the model was trained on this metric."
    return note


def differences(data: ReportData) -> Table:
    """Lay out the differences to the baseline: model minus baseline, one column for each metric."""
    metrics = [m for m in data.metrics if any(d.metric == m.id for d in data.differences)]
    found = {(d.metric, d.model, d.steps): d for d in data.differences}
    places = {m.id: decimals(d for d in data.differences if d.metric == m.id) for m in metrics}
    rows = []
    for steps, model in data.configurations():
        here = [found.get((metric.id, model.name, steps)) for metric in metrics]
        if any(here):
            entries = tuple(
                _difference_entry(d, places[m.id], d is not None and _is_biased(data, d))
                for m, d in zip(metrics, here, strict=True)
            )
            sizes = sorted({d.n for d in here if d})
            size = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,}-{sizes[-1]:,}"
            rows.append(Row(steps, model.name, model.label, entries, size))
    baseline = data.model(data.baseline).label if data.baseline else ""
    return Table(
        caption=f"Differences to {baseline} at the same step count, paired by prompt and noise, with 95 % intervals.",
        headings=tuple(f"{metric.label} {ARROWS[metric.direction]}" for metric in metrics),
        rows=tuple(rows),
        note=_differences_note(data, baseline),
    )


def _is_biased(data: ReportData, difference: Difference) -> bool:
    """Whether one of the two was trained on what they are compared by."""
    return any(data.model(name).was_trained_on(difference.metric) for name in (difference.model, difference.baseline))


def _differences_note(data: ReportData, baseline: str) -> str:
    note = f"Model minus {baseline}. Bold: the difference holds after Holm's correction over all comparisons (5 %)."
    if any(_is_biased(data, difference) for difference in data.differences):
        note += f" {DAGGER}: the model or {baseline} was trained on this metric."
    return note


def _difference_entry(difference: Difference | None, places: int, trained_on: bool) -> Entry:
    if difference is None:
        return Entry("", "not comparable")
    shown = difference.verdict != "no difference shown"
    detail = interval(difference.low, difference.high, places, signed=True)
    return Entry(fixed(difference.value, places, signed=True), detail, "best" if shown else "", trained_on)


def to_markdown(table: Table) -> str:
    """Write a table as Markdown; best is bold, level with the best is underlined."""
    header = ["Steps", "Model", *table.headings, "n"]
    lines = [_pipes(map(markdown_escape, header)), _pipes(["--:", ":--", *["--:"] * (len(header) - 2)])]
    for row in table.rows:
        entries = [_marked(entry, markdown_escape, "**{}**", "<u>{}</u>", DAGGER) for entry in row.entries]
        lines.append(_pipes([str(row.steps), markdown_escape(row.label), *entries, row.num_images]))
    return "\n".join([*lines, "", markdown_escape(table.note), ""])


def to_latex(table: Table, label: str) -> str:
    """Write a table as LaTeX for booktabs; best is bold, level with the best is underlined."""
    columns = "rl" + "r" * (len(table.headings) + 1)
    header = " & ".join(map(latex_escape, ["Steps", "Model", *table.headings, "n"]))
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}[t]",
        "  \\centering\\small",
        f"  \\caption{{{latex_escape(table.caption)} {latex_escape(table.note)}}}",
        f"  \\label{{tab:{label}}}",
        f"  \\begin{{tabular}}{{{columns}}}",
        "    \\toprule",
        f"    {header} \\\\",
    ]
    for index, row in enumerate(table.rows):
        opens = table.opens_block(index)
        lines += ["    \\midrule"] if opens else []
        entries = [_marked(entry, latex_escape, "\\textbf{{{}}}", "\\underline{{{}}}", "$^\\dagger$", _small)
                   for entry in row.entries]  # fmt: skip
        cells = [str(row.steps) if opens else "", latex_escape(row.label), *entries, row.num_images]
        lines.append(f"    {' & '.join(cells)} \\\\")
    lines += ["    \\bottomrule", "  \\end{tabular}", "\\end{table}", ""]
    return "\n".join(lines)


def _marked(
    entry: Entry,
    escape: Callable[[str], str],
    best: str,
    level: str,
    dagger: str,
    small: Callable[[str], str] = str,
) -> str:
    if not entry.text:
        return escape("\u2013")
    text = {"best": best, "level": level, "": "{}"}[entry.mark].format(escape(entry.text))
    detail = small(escape(entry.detail)) if entry.detail else ""
    return f"{text}{dagger if entry.trained_on else ''} {detail}".rstrip()


def _small(text: str) -> str:
    return f"{{\\scriptsize {text}}}"


def _pipes(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}",
    MINUS: "$-$", ARROWS["higher"]: r"$\uparrow$", ARROWS["lower"]: r"$\downarrow$", DAGGER: r"$^\dagger$",
    "\u2013": "--",
}  # fmt: skip
_LATEX_SPECIAL = re.compile("|".join(map(re.escape, _LATEX)))
_MARKDOWN_SPECIAL = re.compile(r"[\\`*_\[\]<>|~#]")


def latex_escape(text: str) -> str:
    """Escape text for LaTeX in one pass, so that no escape is escaped again; line breaks become spaces."""
    return _LATEX_SPECIAL.sub(lambda match: _LATEX[match[0]], " ".join(text.split()))


def markdown_escape(text: str) -> str:
    """Escape text for a Markdown table cell; line breaks become spaces."""
    return _MARKDOWN_SPECIAL.sub(lambda match: f"\\{match[0]}", " ".join(text.split()))


def results_csv(data: ReportData) -> str:
    """Write every score as CSV, one row for each model, step count and metric, numbers unrounded."""
    return _csv(
        ["model", "label", "steps", "metric", "direction", "value", "low", "high", "n", "num_prompts", "missing",
         "reason", "mark", "trained_on"],
        [[c.model, data.model(c.model).label, c.steps, c.metric, data.metric(c.metric).direction, c.value, c.low,
          c.high, c.n, c.num_prompts, c.missing, c.reason, c.mark, int(data.model(c.model).was_trained_on(c.metric))]
         for c in data.cells],
    )  # fmt: skip


def differences_csv(data: ReportData) -> str:
    """Write every paired difference as CSV, numbers unrounded."""
    return _csv(
        ["model", "baseline", "steps", "metric", "difference", "low", "high", "n", "num_prompts", "p_value", "p_holm",
         "verdict", "trained_on"],
        [[d.model, d.baseline, d.steps, d.metric, d.value, d.low, d.high, d.n, d.num_prompts, d.p_value, d.p_holm,
          d.verdict, int(_is_biased(data, d))] for d in data.differences],
    )  # fmt: skip


def latency_csv(data: ReportData) -> str:
    """Write the latency of every stage as CSV, in milliseconds per image."""
    return _csv(
        ["model", "steps", "stage", "median_ms", "q1_ms", "q3_ms", "n", "batch_size", "device"],
        [[x.model, x.steps, x.stage, x.median_ms, x.q1_ms, x.q3_ms, x.n, x.batch_size, x.device]
         for x in data.latencies],
    )  # fmt: skip


def memory_csv(data: ReportData) -> str:
    """Write peak memory as CSV, in bytes."""
    rows = [[x.model, x.steps, x.peak_bytes, x.batch_size, x.device] for x in data.memories]
    return _csv(["model", "steps", "peak_bytes", "batch_size", "device"], rows)


def preferences_csv(study: StudyData) -> str:
    """Write a study's preference rates as CSV, one row for each comparison and question, ties counting half."""
    names = ("a", "b", "a_preferred", "ties", "both_bad", "b_preferred", "value", "low", "high", "n", "num_raters",
             "num_prompts", "p_holm", "verdict")  # fmt: skip
    rows = [[c.name, *(getattr(p, name) for name in names)] for c in study.criteria for p in c.preferences]
    return _csv(["criterion", *names], rows)


def pairs_csv(study: StudyData) -> str:
    """Write the votes on every pair of a study as CSV: the evidence behind its rates."""
    names = ("pair", "comparison", "prompt_id", "prompt", "replicate", "file_a", "file_b", "a", "b", "tie", "both_bad")
    rows = [[c.name, *(getattr(p, name) for name in names)] for c in study.criteria for p in c.pairs]
    return _csv(["criterion", *names], rows)


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


def files(data: ReportData) -> dict[str, str]:
    """All tables of a report by file name."""
    written = {
        "results.csv": results_csv(data),
        "results.md": to_markdown(results(data)),
        "results.tex": to_latex(results(data), "results"),
        "latency.csv": latency_csv(data),
    }
    if data.memories:
        written["memory.csv"] = memory_csv(data)
    if data.study is not None:
        written["preferences.csv"] = preferences_csv(data.study)
        written["votes-by-pair.csv"] = pairs_csv(data.study)
    if data.differences:
        table = differences(data)
        written["differences.csv"] = differences_csv(data)
        written["differences.md"] = to_markdown(table)
        written["differences.tex"] = to_latex(table, "differences")
    return written


def protocol(metric: MetricInfo) -> str:
    """Name a metric's protocol: its id, version and unit."""
    return f"{metric.id}, version {metric.version}, {metric.unit}"
