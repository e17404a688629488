"""The tables of a report and their twins: CSV for programs, Markdown and LaTeX (booktabs) for papers."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from hypersd_bench.contracts import MetricInfo
from reports.data import Cell, Contrast, Difference, Mark, Model, ReportData
from reports.numbers import MINUS, decimals, fixed, gibibytes, interval, milliseconds
from reports.strings import Said, joined, say
from reports.study import Criterion, Preference, StudyData

ARROWS = {"higher": "\u2191", "lower": "\u2193"}
DAGGER = "\u2020"  # the model was trained on this metric
KINDS = {"lora": "LoRA", "unet": "UNet", "base": "base"}


@dataclass(frozen=True, slots=True)
class Entry:
    """What one cell of a table says; detail is its interval or, where there is no value, the reason."""

    text: str
    detail: str = ""
    mark: Mark = ""
    trained_on: bool = False


@dataclass(frozen=True, slots=True)
class Heading:
    """What a column is of: a metric, or where that is none, what ``text`` says; small: more on it."""

    text: str
    small: str
    metric: MetricInfo | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table: which model at how many steps, and its entries, one for each heading."""

    steps: int
    model: str
    label: str
    kind: str
    entries: tuple[Entry, ...]
    num_images: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table as a reader sees it. headings exclude the steps, the model, its type and n."""

    caption: Said
    headings: tuple[Heading, ...]
    rows: tuple[Row, ...]
    note: Said

    @property
    def has_types(self) -> bool:
        """Whether the run says what the weights are; old ones don't."""
        return any(row.kind for row in self.rows)

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
            missing = say("table.not_timed")
            entries.append(Entry(milliseconds(latency.median_ms)) if latency else Entry("", missing))
        if data.memories:
            memory = data.memory(model.name, steps)
            missing = say("table.not_measured")
            entries.append(Entry(gibibytes(memory.peak_bytes)) if memory else Entry("", missing))
        rows.append(Row(steps, model.name, model.label, _kind(model, steps), tuple(entries), _sizes(cells)))
    headings = [_metric_heading(metric) for metric in data.metrics]
    headings += [Heading(say("table.ms_per_image"), say("table.median"))] if timed else []
    headings += [Heading(say("table.peak_gib"), say("table.smallest_batch"))] if data.memories else []
    return Table(say("table.results_caption", title=data.title), tuple(headings), tuple(rows), _results_note(data))


def _metric_heading(metric: MetricInfo) -> Heading:
    return Heading(f"{metric.label} {ARROWS[metric.direction]}", metric.id, metric)


def _kind(model: Model, steps: int) -> str:
    """What its weights at this step count are; empty where the run does not say."""
    kinds = [checkpoint.kind for checkpoint in model.checkpoints if steps in checkpoint.steps]
    return KINDS.get(kinds[0], "") if kinds else ""


def _result_entry(cell: Cell | None, places: int, trained_on: bool) -> Entry:
    if cell is None or cell.value is None:
        return Entry("", cell.reason if cell else say("table.not_scored"))
    return Entry(fixed(cell.value, places), interval(cell.low, cell.high, places), cell.mark, trained_on)


def _sizes(cells: Iterable[Cell | None]) -> str:
    """The number of images behind a row's values: one number, or the range over its metrics."""
    sizes = sorted({cell.n for cell in cells if cell and cell.value is not None})
    if not sizes:
        return "0"
    return f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,}-{sizes[-1]:,}"


def _results_note(data: ReportData) -> Said:
    notes = [say("table.results_note")]
    if any(model.was_trained_on(metric.id) for model in data.models for metric in data.metrics):
        notes.append(say("table.results_dagger", dagger=DAGGER))
    return joined(notes)


def differences(data: ReportData) -> Table:
    """Lay out the differences to the baseline: model minus baseline, one column for each metric."""
    baseline = data.model(data.baseline).label
    caption = say("table.differences_caption", baseline=baseline)
    return _differences(data, data.differences, caption, say("table.differences_note", baseline=baseline), baseline)


def contrast(data: ReportData, found: Contrast, num_comparisons: int) -> Table:
    """Lay out a contrast as the differences, corrected over all comparisons of all contrasts."""
    against = data.model(found.against).label
    note = say("table.contrast_note", model=data.model(found.model).label, against=against, n=f"{num_comparisons:,}")
    return _differences(data, found.differences, say("table.contrast_caption", name=found.name), note, against)


def _differences(data: ReportData, shown: Sequence[Difference], caption: Said, note: Said, baseline: str) -> Table:
    metrics = [m for m in data.metrics if any(d.metric == m.id for d in shown)]
    found = {(d.metric, d.model, d.steps): d for d in shown}
    places = {m.id: decimals(d for d in shown if d.metric == m.id) for m in metrics}
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
            rows.append(Row(steps, model.name, model.label, _kind(model, steps), entries, size))
    if any(entry.trained_on for row in rows for entry in row.entries):
        note = joined([note, say("table.differences_dagger", dagger=DAGGER, baseline=baseline)])
    return Table(caption, tuple(map(_metric_heading, metrics)), tuple(rows), note)


def _is_biased(data: ReportData, difference: Difference) -> bool:
    """Whether one of the two was trained on what they are compared by."""
    return any(data.model(name).was_trained_on(difference.metric) for name in (difference.model, difference.baseline))


def _difference_entry(difference: Difference | None, places: int, trained_on: bool) -> Entry:
    if difference is None:
        return Entry("", say("table.not_comparable"))
    shown = difference.verdict != "no difference shown"
    detail = interval(difference.low, difference.high, places, signed=True)
    return Entry(fixed(difference.value, places, signed=True), detail, "best" if shown else "", trained_on)


def to_markdown(table: Table) -> str:
    """Write a table as Markdown; best is bold, level with the best is underlined."""
    header = _header(table)
    lines = [
        _pipes(map(markdown_escape, header)),
        _pipes(["--:", ":--", *_kinds(table, ":--"), *["--:"] * (len(table.headings) + 1)]),
    ]
    for row in table.rows:
        entries = [_marked(entry, markdown_escape, "**{}**", "<u>{}</u>", DAGGER) for entry in row.entries]
        named = [str(row.steps), markdown_escape(row.label), *_kinds(table, row.kind)]
        lines.append(_pipes([*named, *entries, row.num_images]))
    return "\n".join([*lines, "", markdown_escape(table.note), ""])


def to_latex(table: Table, label: str) -> str:
    """Write a table as LaTeX for booktabs; best is bold, level with the best is underlined."""
    columns = "".join(["rl", *_kinds(table, "l"), "r" * (len(table.headings) + 1)])
    header = " & ".join(map(latex_escape, _header(table)))
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
        named = [str(row.steps) if opens else "", latex_escape(row.label), *_kinds(table, row.kind)]
        lines.append(f"    {' & '.join([*named, *entries, row.num_images])} \\\\")
    lines += ["    \\bottomrule", "  \\end{tabular}", "\\end{table}", ""]
    return "\n".join(lines)


def _header(table: Table) -> list[str]:
    return ["Steps", "Model", *_kinds(table, "Type"), *(heading.text for heading in table.headings), "n"]


def _kinds(table: Table, text: str) -> list[str]:
    """A cell of the column of types, where the table has one."""
    return [text] if table.has_types else []


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
    "|": r"\textbar{}", '"': "''",
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
    rows = []
    for c in data.cells:
        model, metric = data.model(c.model), data.metric(c.metric)
        rows.append([c.model, model.label, c.steps, _kind(model, c.steps), c.metric, metric.direction, c.value, c.low,
                     c.high, c.n, c.num_prompts, c.missing, c.reason, c.mark,
                     int(model.was_trained_on(c.metric))])  # fmt: skip
    names = ["model", "label", "steps", "type", "metric", "direction", "value", "low", "high", "n", "num_prompts",
             "missing", "reason", "mark", "trained_on"]  # fmt: skip
    return _csv(names, rows)


def differences_csv(data: ReportData) -> str:
    """Write every paired difference as CSV, numbers unrounded."""
    return _differences_csv(data, data.differences)


def _differences_csv(data: ReportData, shown: Iterable[Difference]) -> str:
    return _csv(
        ["model", "baseline", "steps", "metric", "difference", "low", "high", "n", "num_prompts", "p_value", "p_holm",
         "verdict", "trained_on"],
        [[d.model, d.baseline, d.steps, d.metric, d.value, d.low, d.high, d.n, d.num_prompts, d.p_value, d.p_holm,
          d.verdict, int(_is_biased(data, d))] for d in shown],
    )  # fmt: skip


def latency_csv(data: ReportData) -> str:
    """Write the latency of every stage as CSV, in milliseconds per image."""
    return _csv(
        ["model", "steps", "stage", "median_ms", "q1_ms", "q3_ms", "p90_ms", "n", "batch_size", "device"],
        [[x.model, x.steps, x.stage, x.median_ms, x.q1_ms, x.q3_ms, x.p90_ms, x.n, x.batch_size, x.device]
         for x in data.latencies],
    )  # fmt: skip


def memory_csv(data: ReportData) -> str:
    """Write peak memory as CSV, in bytes."""
    rows = [[x.model, x.steps, x.peak_bytes, x.batch_size, x.device] for x in data.memories]
    return _csv(["model", "steps", "peak_bytes", "batch_size", "device"], rows)


def published_csv(data: ReportData) -> str:
    """Write what is published of these models at these step counts as CSV, in the tables' own columns."""
    return _csv(
        ["model", "steps", "source", "column", "value", "protocol"],
        [[model.name, row.steps, row.source, column, value, row.protocol]
         for model in data.models for row in model.published for column, value in row.values.items()],
    )  # fmt: skip


def training_csv(data: ReportData) -> str:
    """Write how the weights were made as CSV: what each file says of itself."""
    keys = ("method", "stage", "rank", "seed", "images_seen", "seconds", "command")
    rows = [[one.label, one.file, one.sha256, " ".join(map(str, one.steps)), *(one.card.get(key) for key in keys)]
            for one in data.made]  # fmt: skip
    return _csv(["model", "file", "sha256", "steps", *keys], rows)


def accords_csv(data: ReportData) -> str:
    """Write how often metrics order two models' images alike as CSV."""
    rows = [[x.metric_a, x.metric_b, x.value, x.low, x.high, x.num_prompts] for x in data.accords]
    return _csv(["metric_a", "metric_b", "alike", "low", "high", "num_prompts"], rows)


def win_matrix(criterion: Criterion) -> list[tuple[str, list[Preference | None]]]:
    """Each configuration's row against all columns, itself as the first of the comparison; None where nobody voted."""
    names = list(dict.fromkeys(name for p in criterion.preferences for name in (p.a, p.b)))
    known = {(p.a, p.b): p for p in criterion.preferences}
    turned = {(p.b, p.a): _turned(p) for p in criterion.preferences}
    return [(a, [known.get((a, b)) or turned.get((a, b)) for b in names]) for a in names]


def _turned(p: Preference) -> Preference:
    """The same comparison, said of b."""
    return replace(
        p, a=p.b, b=p.a, a_preferred=p.b_preferred, b_preferred=p.a_preferred,
        value=1 - p.value, low=1 - p.high, high=1 - p.low,
    )  # fmt: skip


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
    written: dict[str, str] = {}
    if data.runs:
        written |= _written("results", results(data), results_csv(data)) | {"latency.csv": latency_csv(data)}
    if data.differences:
        written |= _written("differences", differences(data), differences_csv(data))
    for i, found in enumerate(data.contrasts, start=1):
        if found.differences:
            table = contrast(data, found, num_contrasted(data))
            written |= _written(f"contrast-{i}", table, _differences_csv(data, found.differences))
    if data.memories:
        written["memory.csv"] = memory_csv(data)
    if data.accords:
        written["metric-agreement.csv"] = accords_csv(data)
    if any(model.published for model in data.models):
        written["published.csv"] = published_csv(data)
    if data.made:
        written["training.csv"] = training_csv(data)
    if data.study is not None:
        written["preferences.csv"] = preferences_csv(data.study)
        written["votes-by-pair.csv"] = pairs_csv(data.study)
    return written


def num_contrasted(data: ReportData) -> int:
    """How many comparisons the contrasts are corrected over; one that is in two contrasts counts once."""
    return len({(d.metric, d.model, d.baseline, d.steps) for c in data.contrasts for d in c.differences})


def _written(name: str, table: Table, values: str) -> dict[str, str]:
    return {f"{name}.csv": values, f"{name}.md": to_markdown(table), f"{name}.tex": to_latex(table, name)}


def protocol(metric: MetricInfo) -> str:
    """Name a metric's protocol: its id, version and unit."""
    return f"{metric.id}, version {metric.version}, {metric.unit}"
