"""A run made elsewhere is checked against what it says: each way it can be wrong is told, and a true one holds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypersd_bench.cli.main import main
from hypersd_bench.features import features_folder, read_features, write_features
from hypersd_bench.store import RunStore, write_json
from tests.integration.test_scoring import make_reference, make_run
from tests.toy_metric import MEAN_COLOUR, Brightness

METRICS = ("toy/colour", "toy/redness", "toy/brightness", "toy/darker")


@pytest.fixture
def run(tmp_path: Path, toy_metrics: None) -> RunStore:
    """A scored run, moved to where its reference and its first folder are no more."""
    store = make_run(tmp_path / "made", {"teacher": 100, "lcm": 90}, metrics=METRICS)
    photographs = make_reference(tmp_path / "photographs", 80)
    assert main(["score", str(store.folder), "--reference", str(photographs)]) == 0
    (tmp_path / "elsewhere").mkdir()
    shutil.move(store.folder, tmp_path / "elsewhere" / "run")
    shutil.rmtree(photographs)
    return RunStore.open(tmp_path / "elsewhere" / "run")


def verified(run: RunStore, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    before = _tree(run.folder)
    code = main(["verify", str(run.folder), "--json", *flags])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert code == (0 if found["holds"] else 1)
    assert _tree(run.folder) == before  # nothing of it is changed
    return found


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_true_run_holds(run: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    found = verified(run, capsys)
    assert found["holds"], found["findings"]
    assert found["images"] == 6
    assert found["values"] == {"toy/colour": 2, "toy/redness": 6, "toy/brightness": 6, "toy/darker": 3}
    assert found["unchecked"] == {}
    assert main(["verify", str(run.folder)]) == 0
    assert f"{run.folder} holds what it says" in capsys.readouterr().out


def test_some_prompts_stand_for_all(run: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    found = verified(run, capsys, "--prompts", "2")
    assert found["holds"], found["findings"]
    assert (found["images"], found["prompts"]) == (6, 2)
    assert found["values"] == {"toy/colour": 2, "toy/redness": 4, "toy/brightness": 4, "toy/darker": 2}


def test_images_changed_missing_and_added_are_named(run: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    images = run.folder / "images" / "lcm" / "4"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(images / "p0_0.png")
    (images / "p1_0.png").unlink()
    Image.new("RGB", (8, 8)).save(images / "p9_0.png")
    found = verified(run, capsys)
    assert {(one["name"], one["found"]) for one in found["findings"] if one["recorded"] != "not in the ledger"} >= {
        ("images/lcm/4/p1_0.png", "missing")
    }
    assert {one["name"] for one in found["findings"]} == {f"images/lcm/4/p{i}_0.png" for i in (0, 1, 9)}
    assert {one["kind"] for one in found["findings"]} == {"file"}
    assert main(["verify", str(run.folder)]) == 1
    assert "DIFFERS: file: images/lcm/4/p1_0.png" in capsys.readouterr().out


def test_a_score_that_the_images_do_not_have_is_told(run: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    row = next(row for row in run.images() if row.model == "lcm")
    run.record_scores([replace(run.scores("toy/brightness")[row.key_id], value=130.0)])
    (one,) = verified(run, capsys)["findings"]
    assert one == {
        "kind": "score",
        "name": "toy/brightness of lcm@4, p0, 0",
        "recorded": "130",
        "found": "90",
        "count": 1,
    }


def test_a_distance_or_features_that_were_changed_are_told(run: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    row = next(row for row in run.set_scores() if row.model == "lcm")
    run.record_set_scores([replace(row, value=1.5)])
    (one,) = verified(run, capsys)["findings"]
    assert (one["kind"], one["name"], one["recorded"]) == ("set score", "toy/colour of lcm@4", "1.5")
    assert float(one["found"]) == pytest.approx(3**0.5 * 10, rel=1e-4)
    run.record_set_scores([row])
    kept = read_features(run.folder, MEAN_COLOUR.id, "lcm", 4)
    write_features(run.folder, MEAN_COLOUR.id, "lcm", 4, "1", {digest: 1.1 * x for digest, x in kept.items()})
    found = verified(run, capsys)["findings"]
    assert {one["kind"] for one in found} == {"features", "set score"}


def test_seeds_that_are_not_the_runs_are_told(run: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    run.manifest["spec"]["seed"] = 7
    write_json(run.folder / "run.json", run.manifest)
    found = verified(run, capsys)["findings"]
    assert [(one["kind"], one["count"]) for one in found] == [("seed", 6)]


def test_a_judge_that_scores_otherwise_there_is_told_by_its_canaries(
    run: RunStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HYPERSD_BENCH_CACHE", str(tmp_path / "another machine"))
    score = Brightness.score
    monkeypatch.setattr(Brightness, "score", lambda self, *given: score(self, *given) + 20)
    found = verified(run, capsys)["findings"]
    assert {(one["kind"], one["name"].split(" ")[0]) for one in found} == {
        ("canaries", "toy/brightness"), ("score", "toy/brightness"),
    }  # fmt: skip


def test_what_can_not_be_checked_is_said(
    run: RunStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Brightness, "info", replace(Brightness.info, version="2"))
    next(features_folder(run.folder, MEAN_COLOUR.id).glob("reference-*.npz")).unlink()
    found = verified(run, capsys)
    assert found["holds"]
    assert found["unchecked"]["toy/brightness"] == "scored by its version 1; installed is 2"
    assert "the reference's toy/mean-colour is not in the run" in found["unchecked"]["toy/colour"]


def test_other_packages_are_named_where_something_differs(run: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    run.manifest["provenance"]["packages"]["pillow"] = "1.0"
    write_json(run.folder / "run.json", run.manifest)
    assert verified(run, capsys)["packages"]["pillow"].startswith("1.0 -> ")


def test_no_run_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err


def test_kept_features_are_what_np_reads(run: RunStore) -> None:
    with np.load(features_folder(run.folder, MEAN_COLOUR.id) / "lcm@4.npz") as saved:
        assert saved["features"].shape == (3, 3)
        assert saved["features"].dtype == np.float32
        assert saved["sha256"].tolist() == [row.sha256 for row in run.images() if row.model == "lcm"]
