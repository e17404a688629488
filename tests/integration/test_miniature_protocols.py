"""A run of the miniature through every protocol that needs no download, and on to the verdicts: nothing is left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hypersd_bench import registry
from hypersd_bench.cli.main import main
from hypersd_bench.store import RunStore

OFFLINE = [name for name in registry.METRICS if not registry.resolve("metric", name).needs]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("protocols") / "run"
    made = main(
        ["run", "--models", "hyper-sd,lcm,teacher@8", "--steps", "1,2", "--num-prompts", "6",
         "--replicates", "2", "--metrics", ",".join(OFFLINE), "--baseline", "hyper-sd", "--no-timing", "--force",
         "--out", str(folder)]
    )  # fmt: skip
    assert made == 0
    return folder


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_every_offline_protocol_has_a_value_with_n(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    levels = told(capsys, "compare", str(run))["levels"]
    assert {level["metric"] for level in levels} == set(OFFLINE)
    for level in levels:
        if level["metric"].startswith("agreement/") and level["model"] == "teacher":
            assert "the teacher's own" in level["reason"]
            continue
        assert level["estimate"]["n"] == 12, level
        assert level["estimate"]["num_clusters"] == 6


def test_every_difference_has_an_interval_and_a_corrected_p(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "compare", str(run))["comparisons"]
    assert {(one["metric"], one["steps"]) for one in found} == {(name, steps) for name in OFFLINE for steps in (1, 2)}
    for one in found:
        difference = one["difference"]
        assert difference["low"] <= difference["value"] <= difference["high"]
        assert one["p_holm"] >= difference["p_value"]
        assert one["verdict"] == "no difference shown"  # of 6 prompts, after so many looks


@pytest.mark.parametrize("metric", ["clip-score/pocket", "fid/lite0", "recall/lite0"])
def test_step_curves_of_images_and_of_sets(run: Path, metric: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(run), "--within", "1000", "--metric", metric, "--cost", "steps"]) == 0
    assert "of the best at 95 %: " in capsys.readouterr().out


def test_the_run_verifies(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = shutil.copytree(run, tmp_path / "elsewhere")
    found = told(capsys, "verify", str(moved))
    assert found["holds"], found["findings"]
    assert set(found["values"]) == set(OFFLINE)
    assert found["unchecked"] == {}


def test_canaries_of_every_protocol_are_in_the_manifest(run: Path) -> None:
    assert set(RunStore.open(run).manifest["canaries"]) == set(OFFLINE)
