"""Two runs side by side, and the gate: what it lets through is worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from hypersd_bench.errors import InputError
from hypersd_bench.store import RunStore, ScoreRow
from reports.cli import report
from reports.diff import diff_runs, parse_gate
from tests.synthetic_run import CLIP, make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunStore, RunStore]:
    """The second run's CLIP scores are the first's less 0.3, image by image."""
    folder = tmp_path_factory.mktemp("runs")
    first = make_run(folder / "old", models=("a", "b"), steps=(1, 4), num_prompts=12)
    second = make_run(folder / "new", models=("a", "b"), steps=(1, 4), num_prompts=12)
    before = {row.key: first.scores(CLIP.id)[row.key_id].value or 0.0 for row in first.images()}
    second.record_scores([ScoreRow(CLIP.id, row.key_id, before[row.key] - 0.3) for row in second.images()])
    return first, second


def _call(runs: tuple[RunStore, RunStore], *options: str) -> tuple[int, str]:
    done = CliRunner().invoke(report, [*(str(run.folder) for run in runs), "--diff", *options])
    return done.exit_code, done.output


def test_a_shift_of_every_image_is_found(runs: tuple[RunStore, RunStore]) -> None:
    changes = [change for change in diff_runs(*runs).changes if change.metric == CLIP.id]
    assert len(changes) == 4
    for change in changes:
        assert change.difference == pytest.approx(-0.3)
        assert change.low == pytest.approx(-0.3)
        assert change.high == pytest.approx(-0.3)
        assert change.verdict == "worse"


@pytest.mark.parametrize(
    ("gate", "code"),
    [
        ("clip-score:-0.2", 1), ("clip-score:-0.4", 0), ("clip-score/pocket:-0.2", 1), ("clip-score:-1%", 1),
        ("clip-score:-5%", 0), ("clip-score:+0.1", 0), ("latency:+10%", 0),
    ],
)  # fmt: skip
def test_the_gate_by_hand(runs: tuple[RunStore, RunStore], gate: str, code: int) -> None:
    found, said = _call(runs, "--fail-on", gate)
    assert found == code, said
    assert ("\nfails " in said) == bool(code)


def test_json_names_what_failed(runs: tuple[RunStore, RunStore]) -> None:
    code, said = _call(runs, "--fail-on", "clip-score:-0.2", "--json")
    told = json.loads(said)
    assert code == 1
    assert {(row["model"], row["steps"]) for row in told["broken"]} == {(m, s) for m in "ab" for s in (1, 4)}


@pytest.mark.parametrize("text", ["clip-score", "clip-score:0.2", "clip-score:-x", ":-1", "clip-score:-1 %%"])
def test_a_gate_that_is_none(text: str) -> None:
    with pytest.raises(InputError, match="write a metric"):
        parse_gate(text)


def test_a_gate_about_nothing_would_always_pass_and_is_refused(runs: tuple[RunStore, RunStore]) -> None:
    done = CliRunner().invoke(report, [*(str(run.folder) for run in runs), "--diff", "--fail-on", "clip-scor:-1"])
    assert isinstance(done.exception, InputError)
    assert "did you mean 'clip-score'" in str(done.exception)


def test_what_only_one_run_has_is_said(runs: tuple[RunStore, RunStore], tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", models=("a", "c"), steps=(1, 4), num_prompts=12)
    found = diff_runs(runs[0], other)
    assert (found.only_first, found.only_second) == (("b@1", "b@4"), ("c@1", "c@4"))
    alone = make_run(tmp_path / "alone", models=("d",), steps=(1,), num_prompts=12)
    with pytest.raises(InputError, match="share no model"):
        diff_runs(runs[0], alone)


def test_latency_counts_where_it_was_measured_alike(runs: tuple[RunStore, RunStore], tmp_path: Path) -> None:
    slow = make_run(tmp_path / "slow", models=("a", "b"), steps=(1, 4), num_prompts=12)
    slow.record_timings([replace(row, seconds=2 * row.seconds) for row in slow.timings()])
    changes = [c for c in diff_runs(runs[0], slow).changes if c.metric == "latency"]
    assert changes
    assert all(c.difference == pytest.approx(c.before) for c in changes)
