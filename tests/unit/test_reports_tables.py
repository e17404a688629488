"""What the tables write: decimals, signs, escapes, marks, and the same numbers in every twin."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypersd_bench.store import RunStore, ScoreRow, write_json
from metrics.comparison import comparisons, summaries
from reports import tables
from reports.data import Cell, ReportData
from reports.numbers import decimals, fixed, interval, milliseconds
from reports.read import read_report
from reports.strings import counted, listed
from tests.report_pages import write_report
from tests.synthetic_run import CLIP, make_run


def cell(low: float | None, high: float | None) -> Cell:
    return Cell("m", "a", 1, 0.0, low, high, 8, 4, 0, "", "")


@pytest.mark.parametrize(
    ("half", "places"), [(0.004, 4), (0.04, 3), (0.05, 2), (0.13, 2), (0.49, 2), (0.5, 1), (4.9, 1), (7.0, 0), (900, 0)]
)
def test_decimals_follow_the_half_interval(half: float, places: int) -> None:
    assert decimals([cell(-half, half)]) == places


def test_decimals_without_intervals() -> None:
    assert decimals([]) == decimals([cell(None, None)]) == decimals([cell(1.0, 1.0)]) == 2


def test_numbers_as_written() -> None:
    assert fixed(-1.5, 1) == "\u22121.5"
    assert fixed(-0.004, 2) == "0.00", "no negative zero"
    assert fixed(0.004, 2, signed=True) == "0.00"
    assert fixed(2.5, 1, signed=True) == "+2.5"
    assert interval(-0.25, 0.5, 2, signed=True) == "[\u22120.25, +0.50]"
    assert interval(None, 1.0, 2) == ""
    assert [milliseconds(x) for x in (3.14159, 99.94, 456.4, 7890.0)] == ["3.1", "99.9", "456", "7,890"]
    assert [counted(n, "image") for n in (0, 1, 1024)] == ["0 images", "1 image", "1,024 images"]
    assert [listed(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("50 % & more_of #1", r"50 \% \& more\_of \#1"),
        (r"C:\new {x} $5 ~ ^", r"C:\textbackslash{}new \{x\} \$5 \textasciitilde{} \textasciicircum{}"),
        ("FID \u2193 \u22121 <2>", r"FID $\downarrow$ $-$1 \textless{}2\textgreater{}"),
        ("two\nlines", "two lines"),
    ],
)
def test_latex_escape(text: str, escaped: str) -> None:
    assert tables.latex_escape(text) == escaped


@given(st.text())
def test_latex_escape_leaves_no_active_character(text: str) -> None:
    """Taking our own escapes away must leave none of TeX's special characters."""
    rest = tables.latex_escape(text)
    for escape in sorted(set(tables._LATEX.values()), key=len, reverse=True):
        rest = rest.replace(escape, "")
    assert not set(rest) & set("\\&%$#_{}~^")


def test_markdown_escape() -> None:
    assert tables.markdown_escape("a|b *c* <d> [e]\nf") == r"a\|b \*c\* \<d\> \[e\] f"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return make_run(tmp_path_factory.mktemp("run") / "a_run", num_prompts=16, steps=(1, 4))


@pytest.fixture(scope="module")
def data(run: RunStore) -> ReportData:
    return read_report(run)


def test_csv_holds_what_the_statistics_say(run: RunStore, data: ReportData) -> None:
    rows = {
        (r["metric"], r["model"], int(r["steps"])): r for r in csv.DictReader(io.StringIO(tables.results_csv(data)))
    }
    found = summaries(run)
    assert len(rows) == len(found)
    for summary in found:
        assert summary.estimate is not None
        row = rows[summary.metric, summary.model, summary.steps]
        assert float(row["value"]) == summary.estimate.value
        assert (float(row["low"]), int(row["n"])) == (summary.estimate.low, summary.estimate.n)
    paired = list(csv.DictReader(io.StringIO(tables.differences_csv(data))))
    assert [float(r["difference"]) for r in paired] == [c.difference.value for c in comparisons(run)]
    assert [float(r["p_holm"]) for r in paired] == [c.p_holm for c in comparisons(run)]


def test_twins_agree_and_mark_the_best(data: ReportData) -> None:
    markdown, latex = tables.to_markdown(tables.results(data)), tables.to_latex(tables.results(data), "results")
    places = decimals(c for c in data.cells if c.metric == CLIP.id)
    best = data.cell(CLIP.id, "hyper-sd", 1)
    assert best is not None
    assert best.value is not None
    assert best.mark == "best"
    assert f"**{fixed(best.value, places)}**" in markdown
    assert f"\\textbf{{{fixed(best.value, places)}}}" in latex
    worst = data.cell(CLIP.id, "tcd", 4)
    assert worst is not None
    assert worst.mark == "", "three points below the best can't be level with it"
    assert "CLIP score \u2191" in markdown
    assert "FID (lite0) $\\downarrow$" in latex
    assert latex.count("\\midrule") == 2, "one rule for each step count"
    widths = {line.count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert len(widths) == 1, "every row has every column"


def test_direction_decides_the_best(data: ReportData) -> None:
    """FID: lower is better, so the best is the smallest."""
    values = {c.model: c.value for c in data.cells if c.metric == "fid/lite0" and c.steps == 1 and c.value is not None}
    best = next(c.model for c in data.cells if c.metric == "fid/lite0" and c.steps == 1 and c.mark == "best")
    assert best == min(values, key=lambda name: values[name])


def test_unscored_is_shown_with_its_reason(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", models=("a", "b"), steps=(1,), num_prompts=3)
    lost = [row for row in run.images() if row.model == "b"]
    run.record_scores([ScoreRow(CLIP.id, row.id or 0, None, "no weights") for row in lost])
    data = read_report(run)
    row = next(row for row in tables.results(data).rows if row.model == "b")
    assert row.entries[0].text == ""
    assert "no weights" in row.entries[0].detail
    missing = next(r for r in csv.DictReader(io.StringIO(tables.results_csv(data)))
                   if (r["metric"], r["model"]) == (CLIP.id, "b"))  # fmt: skip
    assert (missing["value"], missing["missing"]) == ("", "6")


def test_metrics_a_model_was_trained_on_are_marked_in_every_twin(tmp_path: Path) -> None:
    """In results where the model was, in differences also where the baseline was; nowhere else."""
    run = make_run(tmp_path / "run", models=("a", "b", "c"), steps=(1, 4), num_prompts=4)
    run.manifest["models"][0]["trained_on"] = [CLIP.id]
    run.manifest["models"][1]["trained_on"] = ["aesthetic"]
    write_json(run.folder / "run.json", run.manifest)
    data = read_report(run)
    results, differences = tables.results(data), tables.differences(data)
    cells = ((row.model, *cell) for row in results.rows for cell in zip(results.headings, row.entries, strict=True))
    marked = {(model, heading.text) for model, heading, entry in cells if entry.trained_on}
    assert marked == {("a", "CLIP score \u2191"), ("b", "Aesthetic \u2191")}
    for table, num_cells in ((results, 4), (differences, 6)):  # differences to a: CLIP of b and c, aesthetic of b
        foot = f"{tables.DAGGER}: the model"
        assert foot in table.note
        markdown, latex = tables.to_markdown(table), tables.to_latex(table, "x")
        assert markdown.count(tables.DAGGER) == num_cells + 1
        assert latex.count("$^\\dagger$") == num_cells + 1
    for text, num_rows in ((tables.results_csv(data), 4), (tables.differences_csv(data), 6)):
        assert sum(row["trained_on"] == "1" for row in csv.DictReader(io.StringIO(text))) == num_rows
    html = write_report(run.folder, tmp_path / "report").read_text()
    assert html.count(f"<sup>{tables.DAGGER}</sup>") == 10
    shown = html.partition('<script type="application/json"')[0]  # the twins to copy come after
    assert shown.count(f"{tables.DAGGER}: the model") == 2


def test_nothing_trained_on_leaves_no_mark(run: RunStore, data: ReportData, tmp_path: Path) -> None:
    assert not any(tables.DAGGER in text or "dagger" in text for text in tables.files(data).values())
    assert tables.DAGGER not in write_report(run.folder, tmp_path / "report").read_text()


def _has_tex() -> bool:
    if not (shutil.which("pdflatex") and shutil.which("kpsewhich")):
        return False
    return subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _has_tex(), reason="no pdflatex with booktabs: apt-get install texlive-latex-recommended")
def test_latex_compiles(tmp_path: Path) -> None:
    """Every table, with names that TeX would take amiss, and an ablation."""
    run = make_run(tmp_path / "run", num_prompts=4, steps=(1, 4))
    for entry, label in zip(
        run.manifest["models"], (r"50% \of_it", "#1 & {co}", "a^b~c", 'é "q" <x> | $y$'), strict=True
    ):
        entry["label"] = label
    run.manifest["models"][0]["trained_on"] = [CLIP.id]
    run.manifest["contrasts"] = [
        {"name": "without_feedback & 100 %", "model": "lcm", "against": "tcd", "steps": [1, 4]}
    ]
    files = tables.files(read_report(run))
    written = [text for name, text in files.items() if name.endswith(".tex")]
    assert len(written) == 3
    body = "\n".join(written)
    source = f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}\n{body}\n\\end{{document}}"
    (tmp_path / "tables.tex").write_text(source)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Missing character" not in done.stdout
