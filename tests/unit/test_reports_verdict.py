"""The verdict's sentences, on made-up runs whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hypersd_bench.store import RunStore, ScoreRow, write_json
from reports import verdict
from reports.caveats import caveats
from reports.read import read_report
from tests.report_pages import write_report
from tests.synthetic_run import AESTHETIC, CLIP, make_run


def scored(folder: Path, gap: float, models: tuple[str, ...] = ("a", "b", "c")) -> RunStore:
    """A run with one metric in which the first model leads by ``gap`` standard deviations and the rest are equal."""
    run = make_run(folder, models=models, steps=(1, 2), num_prompts=12)
    manifest = json.loads((folder / "run.json").read_text())
    manifest["metrics"] = [entry for entry in manifest["metrics"] if entry["id"] == CLIP.id]
    write_json(folder / "run.json", manifest)
    rng = np.random.default_rng(5)
    rows = run.images()
    noise = rng.normal(0, 1, len(rows))
    run.record_scores(
        [ScoreRow(CLIP.id, row.id or 0, 20 + gap * (row.model == models[0]) + float(x))
         for row, x in zip(rows, noise, strict=True)]
    )  # fmt: skip
    return RunStore.open(folder)


def test_a_clear_lead_is_named(tmp_path: Path) -> None:
    data = read_report(scored(tmp_path / "run", gap=5))
    judged = verdict.budgets(data)
    assert [budget.headline for budget in judged] == [
        "At 1 step, take a: it is the best on the one metric.",
        "At 2 steps, take a: it is the best on the one metric.",
    ]
    assert all(finding.level == () for budget in judged for finding in budget.findings)
    assert verdict.overall(data, judged) == "a is the only model at the front of every metric at every step count."


def test_equal_models_are_not_ranked(tmp_path: Path) -> None:
    data = read_report(scored(tmp_path / "run", gap=0))
    judged = verdict.budgets(data)
    assert judged[0].headline == (
        "At 1 step, nothing tells the 3 models apart: with this n no metric shows one to be worse."
    )
    assert len(judged[0].findings[0].level) == 2
    assert "too small to choose" in verdict.overall(data, judged)


def test_metrics_that_disagree(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", models=("a", "b"), steps=(4,), num_prompts=12)
    rows = run.images()
    rng = np.random.default_rng(0)
    run.record_scores([ScoreRow(CLIP.id, r.id or 0, 20 + 5 * (r.model == "a") + rng.normal()) for r in rows])
    run.record_scores([ScoreRow(AESTHETIC.id, r.id or 0, 5 + 5 * (r.model == "b") + rng.normal()) for r in rows])
    headline = verdict.budgets(read_report(run))[0].headline
    assert headline.startswith(
        "At 4 steps, the metrics disagree: CLIP score favours a; Aesthetic and FID (lite0) favour b."
    )


def test_one_model_has_no_rival(tmp_path: Path) -> None:
    data = read_report(make_run(tmp_path / "run", models=("a",), steps=(1, 2), num_prompts=3))
    assert verdict.budgets(data) == []
    assert verdict.summary(data).startswith("1 model at 1 and 2 steps, 12 images")
    assert data.differences == ()


def changed(folder: Path, **changes: object) -> RunStore:
    manifest = json.loads((folder / "run.json").read_text())
    write_json(folder / "run.json", manifest | changes)
    return RunStore.open(folder)


def test_caveats_say_what_spoils_the_reading(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", models=("a", "b"), steps=(1,), num_prompts=4)
    models = run.manifest["models"]
    models[0]["trained_on"] = ["clip-score"]
    prompts = run.manifest["prompts"] | {"count": 8}
    run.record_scores([ScoreRow(CLIP.id, run.images()[0].id or 0, None, "black")])
    run = changed(run.folder, models=models, prompts=prompts, notes=["b is a short run."])
    said = caveats(read_report(run))
    assert any("16 of 32 images" in line for line in said), "a run not finished"
    assert any("a was trained on CLIP score" in line for line in said)
    assert "b is a short run." in said
    assert any(line.startswith("1 image of a at 1 step without CLIP score: black") for line in said)
    assert any("says nothing" in line or "say nothing about SDXL" in line for line in said), "the miniature"


@pytest.mark.parametrize("trained_on", ["clip-score/pocket", "clip-score"])
def test_trained_on_matches_id_or_family(tmp_path: Path, trained_on: str) -> None:
    run = make_run(tmp_path / "run", models=("a", "b"), steps=(1,), num_prompts=2)
    run.manifest["models"][0]["trained_on"] = [trained_on]
    model = read_report(run).model("a")
    assert model.was_trained_on("clip-score/pocket")
    assert not model.was_trained_on("aesthetic/pocket")


def test_a_student_alone_with_its_teacher_is_no_reference(tmp_path: Path) -> None:
    """Nobody shares a step count, so there is no verdict, but there is a page with the teacher beside the student."""
    whole = make_run(tmp_path / "run", models=("a", "teacher"), steps=(1, 25), num_prompts=2)
    apart = RunStore.create(tmp_path / "apart", whole.manifest)
    apart.record_images([row for row in whole.images() if (row.model == "teacher") == (row.steps == 25)])
    kept = {row.id for row in apart.images()}
    apart.record_scores([row for row in whole.scores(CLIP.id).values() if row.image_id in kept])
    data = read_report(apart)
    assert [(model.name, model.is_reference) for model in data.models] == [("a", False), ("teacher", True)]
    assert verdict.budgets(data) == []
    page = write_report(apart.folder, tmp_path / "page").read_text()
    assert "There is nothing to compare" in page
    assert "teacher, 25 steps" in page


def test_a_model_without_rivals_is_a_reference(tmp_path: Path) -> None:
    """The teacher at 25 steps shares no step count: it is neither best nor level, and it keeps no method's colour."""
    run = make_run(tmp_path / "run", models=("a", "b", "teacher"), steps=(1, 25), num_prompts=2)
    kept = [row for row in run.images() if (row.model == "teacher") == (row.steps == 25)]
    folder = tmp_path / "apart"
    apart = RunStore.create(folder, run.manifest)
    apart.record_images(kept)
    apart.record_scores([row for row in run.scores(CLIP.id).values() if row.image_id in {k.id for k in kept}])
    data = read_report(apart)
    assert [model.is_reference for model in data.models] == [False, False, True]
    assert all(c.mark == "" for c in data.cells if c.model == "teacher")
    assert len({model.colour for model in data.models}) == 3
