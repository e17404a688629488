"""A study in a report: its rates, its galleries, in one file; a study of another run is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hypersd_bench.errors import InputError
from hypersd_bench.store import write_json
from reports import tables
from reports.read import read_report
from reports.study import read_study
from tests.report_pages import write_single_file
from tests.simulated_raters import Tastes, simulate
from tests.synthetic_run import make_run
from tests.tiny_study import make_study
from user_study.analysis import analyse
from user_study.study import Study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    made = make_study(tmp_path_factory.mktemp("study"), ("one", "two"), (4,), 12)
    found = analyse(made.design, *simulate(made.design, Tastes({"one@4": 1.5, "two@4": 0.0}), 12), made.run())
    write_json(made.folder / "analysis.json", found.to_json())
    return made


def test_one_file_says_the_rate_and_carries_its_pictures(study: Study, tmp_path: Path) -> None:
    (row,) = read_study(study.folder).criteria[0].preferences
    page = write_single_file(study.run().folder, tmp_path / "report.html", study.folder).read_text()
    assert row.value > 0.5
    assert f"People prefer one@4 over two@4: {100 * row.value:.0f} %" in page
    assert f"{row.n} votes, {row.num_raters} raters" in page
    sources = re.findall(r'<img[^>]* src="([^"]*)"', page)
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r'href="(?!#)', page), "one file leads to no other"


def test_the_file_is_replaced_and_somebody_else_s_is_not(study: Study, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    first = write_single_file(study.run().folder, file, study.folder).read_bytes()
    assert write_single_file(study.run().folder, file, study.folder).read_bytes() == first
    (tmp_path / "mine.html").write_text("<p>mine")
    with pytest.raises(InputError, match="is no report"):
        write_single_file(study.run().folder, tmp_path / "mine.html", study.folder)
    assert (tmp_path / "mine.html").read_text() == "<p>mine"


def test_a_study_of_another_run_is_refused(study: Study, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", num_prompts=2)
    other.manifest["spec_hash"] = "1" * 64
    with pytest.raises(InputError, match="never mixes"):
        read_report(other, read_study(study.folder))


def test_the_win_matrix_says_each_rate_from_both_sides(study: Study) -> None:
    criterion = read_study(study.folder).criteria[0]
    (one, row), (two, column) = tables.win_matrix(criterion)
    assert (one, two) == ("one@4", "two@4")
    assert row[0] is None, "nobody was asked about one against itself"
    forth, back = row[1], column[0]
    assert forth == criterion.preferences[0]
    assert back is not None
    assert (back.value, back.low, back.high) == pytest.approx((1 - forth.value, 1 - forth.high, 1 - forth.low))
    assert (back.a_preferred, back.b_preferred, back.n) == (forth.b_preferred, forth.a_preferred, forth.n)


def test_without_an_analysis_the_remedy_is_named(study: Study, tmp_path: Path) -> None:
    (tmp_path / "design.json").write_bytes((study.folder / "design.json").read_bytes())
    with pytest.raises(InputError, match="study analyse"):
        read_study(tmp_path)
    with pytest.raises(InputError, match="is no study"):
        read_study(tmp_path / "nowhere")
