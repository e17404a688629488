"""``study serve`` and ``study export`` as a user meets them."""

from __future__ import annotations

import csv
import json
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from hypersd_bench.errors import InputError
from tests.synthetic_run import make_run
from user_study.cli import study
from user_study.study import open_study


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", models=("one", "two"), steps=(4,), num_prompts=3, replicates=1).folder


def _voted(run: Path) -> None:
    opened = open_study(run)
    votes = opened.votes
    for choice in ("left", "tie"):
        rater = votes.rater(votes.join())
        assert rater
        turn = votes.turn(rater)
        while turn.assignment_id:
            turn = votes.vote(rater, turn.assignment_id, choice, 1000)[1]
    votes.close()


def _error(*arguments: str) -> str:
    result = CliRunner().invoke(study, arguments)
    assert isinstance(result.exception, InputError)
    return str(result.exception)


def test_export_writes_every_vote_with_what_it_is_about(run: Path) -> None:
    _voted(run)
    result = CliRunner().invoke(study, ["export", str(run)])
    assert result.exit_code == 0
    assert "6 votes in" in result.output
    with (run / "study" / "votes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["rater"] for row in rows}) == 2
    for row in rows:
        assert (row["model_a"], row["model_b"], row["steps_a"], row["steps_b"]) == ("one", "two", "4", "4")
        assert row["preferred"] == ("tie" if row["choice"] == "tie" else "a" if row["side_a"] == "left" else "b")
        assert row["prompt"].startswith("a fox left of a pizza")


def test_the_summary_counts_ties_half(run: Path) -> None:
    _voted(run)
    rows = json.loads(CliRunner().invoke(study, ["export", str(run), "--json"]).stdout)
    wins = sum(row["preferred"] == "a" for row in rows)
    shown = CliRunner().invoke(study, ["export", str(run)]).output
    assert f"one@4 preferred over two@4: {(wins + 1.5) / 6:.0%} [" in shown
    assert "6 votes (3 ties) of 2 raters" in shown


def test_an_existing_out_file_is_kept(run: Path, tmp_path: Path) -> None:
    _voted(run)
    mine = tmp_path / "mine.csv"
    mine.write_text("precious")
    assert "exists" in _error("export", str(run), "--out", str(mine))
    assert mine.read_text() == "precious"


def test_bad_input_is_one_clear_line(run: Path, tmp_path: Path) -> None:
    assert "no study yet" in _error("export", str(run))
    assert "run.json" in _error("serve", str(tmp_path / "nowhere"), "--port", "0")
    lonely = make_run(tmp_path / "lonely", models=("one",), steps=(4,), num_prompts=1).folder
    assert "needs two" in _error("serve", str(lonely), "--port", "0")
    assert not (lonely / "study").exists()


def test_a_port_in_use_names_another(run: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"try --port {port + 1}" in _error("serve", str(run), "--port", str(port))
