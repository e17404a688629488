"""The product end to end on a tiny random base: distil, run, report, vote; through the program, offline."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml
from fastapi.testclient import TestClient

from hypersd_bench.cli.main import main
from hypersd_bench.store import RunStore
from tests.tiny_base import make_tiny_base
from user_study.service import create_service
from user_study.study import load_study, serve_study


@pytest.mark.usefixtures("toy_metrics")
def test_distil_run_report_vote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, student, run = make_tiny_base(tmp_path / "base"), tmp_path / "student", tmp_path / "run"

    for _ in range(2):  # the second time it says that it is done
        assert main(["distill", "hyper-sd", "--base", str(base), "--data", "scenes", "--preset", "tiny",
                     "--out", str(student)]) == 0  # fmt: skip
    exported = {path.stem for path in student.glob("*.safetensors")}
    assert exported == {"hyper-sd-8steps", "hyper-sd-4steps", "hyper-sd-2steps", "hyper-sd-unified"}

    spec = {
        "base": str(base), "models": [{"name": "mine", "path": "student"}, "teacher"], "steps": [1, 4],
        "num_prompts": 4, "replicates": 2, "metrics": ["toy/brightness", "toy/colour", "toy/absent"],
        "timing": {"repeats": 2},
    }  # fmt: skip
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    capsys.readouterr()
    for _ in range(2):
        assert main(["run", str(tmp_path / "spec.yaml"), "--out", str(run), "--json"]) == 2  # one has no value
        said = json.loads(capsys.readouterr().out)
        assert said["images"] == 2 * 2 * 4 * 2
        assert list(said["not_scored"]) == ["toy/absent"]
    store = RunStore.open(run)
    assert {row.checkpoint for row in store.images()} == {"hyper-sd-unified", "hyper-sd-4steps", "teacher"}
    assert any("preset tiny" in note for note in store.manifest["notes"])

    assert main(["compare", str(run), "--json"]) == 0
    assert "toy/brightness" in capsys.readouterr().out
    assert main(["export", str(run)]) == 0
    assert (run / "export" / "images.csv").exists()
    assert main(["report", str(run)]) == 0
    page = (run / "report" / "index.html").read_text()
    assert "Brightness" in page
    assert "its weights are not here" in page  # unscored is not zero, and says why

    folder = tmp_path / "study"
    assert main(["study", "new", str(run), "--pairs", "mine@1:teacher@1", "--pairs-each", "4", "--practice", "0",
                 "--out", str(folder)]) == 0  # fmt: skip
    study = serve_study(load_study(folder))
    shown = {"input": "key", "viewport": "800x600", "pixel_ratio": 1.0, "language": "en"}
    with TestClient(create_service(study)) as client:
        client.post("/api/join").raise_for_status()
        client.post("/api/consent", json={"language": "en"}).raise_for_status()
        turn = client.post("/api/begin").json()
        while turn["items"]:
            name = turn["items"][0]["assignment_id"]
            vote = {"key": name, "assignment_id": name, "choices": {"overall": "left"}, "response_ms": 900, **shown}
            turn = client.post("/api/vote", json=vote).json()["turn"]
    study.votes.close()
    assert main(["study", "export", str(folder), "--out", str(tmp_path / "votes.csv")]) == 0
    with (tmp_path / "votes.csv").open() as file:
        assert sum(row["kind"] == "main" for row in csv.DictReader(file)) == 4
    assert main(["study", "analyse", str(folder)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "absent.yaml"], "can't read spec"),
        (["run", "--models", "techer"], "did you mean 'teacher'"),
        (["run"], "no models"),
        (["report", "absent"], "not a run directory"),
        (["compare", "absent"], "not a run directory"),
        (["study", "serve", "absent"], "is no study"),
        (["export", "absent"], "not a run directory"),
        (["distill", "hyper-ds"], "did you mean 'hyper-sd'"),
        (["distill", "lcm", "--preset", "poket"], "did you mean 'pocket'"),
        (["distill", "lcm", "--base", "nowhere"], "--preset: say how large"),
        (["distill", "lcm", "--base", "nowhere", "--preset", "tiny"], "--data: name what to train on"),
        (["distill", "lcm", "--base", "nowhere", "--preset", "tiny", "--data", "scenes"], "not a diffusers pipeline"),
        (["distill", "plan", "hyper-ds"], "did you mean 'hyper-sd'"),
        (["distill", "export", "absent"], "absent"),
        (["pocket", "check", "--weights", "nowhere"], "no miniature in nowhere"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert list(tmp_path.iterdir()) == []  # nothing half-written
