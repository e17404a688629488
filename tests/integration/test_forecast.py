"""What ``plan`` predicts against what a run then does, and ``fetch`` against a stand-in for the hub."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from hypersd_bench.catalog.spec import ModelSpec
from hypersd_bench.cli.main import main
from hypersd_bench.errors import InputError
from hypersd_bench.pocket import WEIGHTS
from hypersd_bench.runner.benchmark import run_benchmark
from hypersd_bench.runner.forecast import Forecast, forecast
from hypersd_bench.runner.needs import Need, at_hand, pixels_of
from hypersd_bench.runner.plan import Configuration, Plan, make_plan
from hypersd_bench.runner.probe import BatchTime, Speed
from hypersd_bench.runner.spec import load_spec
from hypersd_bench.sampling import ddim_trailing
from tests.hub import StandInHub, environment
from tests.tiny_base import make_tiny_base

ROOT = Path(__file__).parents[2]
NUM_PROMPTS = 3
SPEC = """
base: acme/tiny
models: [teacher]
steps: [1, 2]
prompts: prompts.txt
timing: {repeats: 2, warmup: 0, rounds: 1, throughput: false}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Forecast, Forecast]:
    """A spec's folder, the run, what was predicted before it, and what of going on with it under a larger spec."""
    folder = tmp_path_factory.mktemp("run")
    before = forecast(plan_for(base, folder), folder / "run", "cpu")
    run_benchmark(plan_for(base, folder), folder / "run", "cpu")
    larger = plan_for(base, folder, steps=[1, 2, 4], replicates=3)
    return folder, folder / "run", before, forecast(larger, folder / "run", "cpu")


def plan_for(base: Path | str, folder: Path, **changes: object) -> Plan:
    (folder / "prompts.txt").write_text("\n".join(f"a fox and {i} pizzas" for i in range(NUM_PROMPTS)))
    raw: dict[str, object] = {
        "base": str(base), "models": ["teacher"], "steps": [1, 2], "prompts": "prompts.txt", "replicates": 2,
        "timing": {"repeats": 2, "warmup": 0, "rounds": 1, "throughput": False},
    }  # fmt: skip
    return make_plan(load_spec(None, raw | changes), folder)


def by_name(found: Forecast) -> dict[str, Any]:
    return {row.name: row for row in found.configurations}


def phases(found: Forecast) -> dict[str, float | None]:
    return {phase.name: phase.seconds for phase in found.phases}


# before a run


def test_what_a_run_will_take_is_predicted(run: tuple[Path, Path, Forecast, Forecast]) -> None:
    _, out, found, _ = run
    assert (found.images, found.missing, found.ready) == (2 * NUM_PROMPTS * 2, 2 * NUM_PROMPTS * 2, True)
    assert list(phases(found)) == ["start", "load", "images", "timing"]
    assert found.seconds == pytest.approx(sum(seconds or 0.0 for seconds in phases(found).values()))
    for row in found.configurations:
        assert row.source == "probe of teacher@4"
        assert (row.batch_size, row.pixels) == (NUM_PROMPTS * 2, 64)
        assert row.seconds is not None
        assert row.seconds == pytest.approx((row.seconds_per_image or 0) * row.missing)
        assert 50e6 < (row.peak_memory or 0) < 50e9
    real = sum(path.stat().st_size for path in (out / "images").rglob("*.png"))
    assert found.disk.images == pytest.approx(real, rel=0.25)
    assert json.loads(json.dumps(found.to_json()))["seconds"] == found.seconds


def test_planning_leaves_nothing_behind(base: Path, tmp_path: Path) -> None:
    plan = plan_for(base, tmp_path)
    forecast(plan, tmp_path / "a" / "run", "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_no_probe_makes_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypersd_bench.runner.forecast.probe", lambda *_: pytest.fail("it probed"))
    found = forecast(plan_for(base, tmp_path), tmp_path / "run", "cpu", probing=False)
    assert found.seconds is None
    assert {row.source for row in found.configurations} == {"unknown without a probe"}
    assert (found.disk.image, found.disk.source) == (1.5 * 64 * 64, "assumed: 1.5 bytes per pixel")


@pytest.mark.usefixtures("toy_metrics")
def test_scores_are_predicted_and_what_can_not_be_scored_is_named(base: Path, tmp_path: Path) -> None:
    metrics = ["toy/brightness", "toy/spread", "toy/darker", "toy/colour", "toy/absent"]
    found = forecast(plan_for(base, tmp_path, metrics=metrics, timing={"repeats": 1}), tmp_path / "run", "cpu")
    assert found.phases[-1].name == "scores"
    assert (found.phases[-1].seconds or 0) > 0
    assert "toy/absent" in found.phases[-1].note
    assert "toy/absent can't be computed: its weights are not here; put them there" in found.notes


def test_what_does_not_fit_the_disk_is_a_warning(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shutil import disk_usage

    full = disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("hypersd_bench.runner.forecast.shutil.disk_usage", lambda _: full)
    warnings = forecast(plan_for(base, tmp_path), tmp_path / "run", "cpu", probing=False).warnings
    assert ["images take" in warning and "choose another --out" in warning for warning in warnings] == [True]


# a run that is there


def test_going_on_counts_only_what_is_missing(run: tuple[Path, Path, Forecast, Forecast]) -> None:
    _, _, _, found = run
    assert (found.images, found.missing) == (3 * NUM_PROMPTS * 3, NUM_PROMPTS + NUM_PROMPTS + NUM_PROMPTS * 3)
    rows = by_name(found)
    assert [row.missing for row in rows.values()] == [NUM_PROMPTS, NUM_PROMPTS, NUM_PROMPTS * 3]
    assert rows["teacher@1"].source == rows["teacher@2"].source == "the run's own timing at batch size 1"
    assert rows["teacher@4"].source == "probe of teacher@4"
    assert found.disk.source == f"{2 * NUM_PROMPTS * 2} of the run's images"


def test_a_run_that_is_done_takes_no_time(run: tuple[Path, Path, Forecast, Forecast], base: Path) -> None:
    folder, out, _, _ = run
    before = sorted(out.rglob("*"))
    found = forecast(plan_for(base, folder), out, "cpu", probing=False)
    assert (found.missing, phases(found)["images"], found.disk.images) == (0, 0.0, 0)
    assert sorted(out.rglob("*")) == before


# the arithmetic


def speed(*batches: BatchTime) -> Speed:
    return Speed("teacher@4", batches[-1].size, 64, batches, None)


def test_time_grows_with_steps_and_images() -> None:
    one = speed(BatchTime(1, 0.1, 0.05, 0.01), BatchTime(8, 0.8, 0.4, 0.08))
    assert one.batch_seconds(8, 4) == pytest.approx(4 * 0.8 + 0.4 + 0.08)
    assert one.batch_seconds(8, 4, written=False) == pytest.approx(4 * 0.8 + 0.4)
    assert one.batch_seconds(4, 1) == pytest.approx(4 * 0.16)
    assert one.seconds(16, 8, 8) == pytest.approx(2 * one.seconds(8, 8, 8))
    assert one.seconds(20, 8, 8) == pytest.approx(2 * one.batch_seconds(8, 8) + one.batch_seconds(4, 8))
    more = [one.seconds(8, steps, 8) for steps in (1, 2, 3)]
    assert more[2] - more[1] == pytest.approx(more[1] - more[0]) == pytest.approx(0.8)


def test_a_batch_of_a_size_between_lies_between() -> None:
    some = speed(BatchTime(1, 1.0, 0.0, 0.0), BatchTime(9, 3.0, 0.0, 0.0))
    assert [some.batch_seconds(size, 2) for size in (1, 5, 9)] == pytest.approx([2.0, 4.0, 6.0])
    assert speed(BatchTime(2, 1.0, 1.0, 0.0)).batch_seconds(4, 1) == pytest.approx(4.0)


def test_pixels_are_those_that_the_pipeline_makes(base: Path) -> None:
    assert pixels_of(str(base)) == 64


def test_a_configuration_is_fixed_to_the_commit_that_is_here() -> None:
    model = ModelSpec("teacher", "teacher", "acme/tiny", "base", ddim_trailing((1,)))
    configuration = Configuration("teacher", model, 1, "acme/tiny")
    need = Need(name="acme/tiny@main", size=5, lacking=1, commit="c" * 40)
    assert at_hand(configuration, [need]) is None
    assert at_hand(configuration, [replace(need, lacking=None)]) is None
    fixed = at_hand(configuration, [replace(need, lacking=0)])
    assert fixed is not None
    assert fixed.pipeline == f"acme/tiny@{'c' * 40}"


# fetch, and the plan of what is on the hub


VERBS = """
import io, json, sys
from contextlib import redirect_stdout
from hypersd_bench.cli.main import main
for line in json.loads(sys.argv[1]):
    with redirect_stdout(io.StringIO()) as said:
        code = main([*line, "--json"])
    print(json.dumps([code, json.loads(said.getvalue() or "null")]))
"""


def answers(*lines: tuple[str, ...], env: dict[str, str]) -> list[Any]:
    """Exit code and JSON of several commands, in one process."""
    done = subprocess.run(
        [sys.executable, "-c", VERBS, json.dumps(lines)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_plan_downloads_nothing_fetch_all_and_the_run_goes_on_offline(base: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\na pizza")
    (tmp_path / "spec.yaml").write_text(SPEC)
    files = {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()}
    kept = [name for name in files if name.endswith((".json", ".txt", ".safetensors"))]
    weights = sorted(name for name in kept if name.endswith(".safetensors"))
    size = sum(len(files[name]) for name in kept)
    asked = (str(tmp_path / "spec.yaml"), "--out", str(tmp_path / "run"), "--device", "cpu")
    with StandInHub() as hub:
        commit = hub.add("acme/tiny", files | {"one_file.safetensors": b"x" * 1000})
        env = environment(hub, tmp_path / "home", OMP_NUM_THREADS="1")
        plan, again, (code, fetched) = answers(("plan", *asked), ("plan", *asked), ("fetch", *asked), env=env)
        downloads = [
            request.path for request in hub.requests if request.method == "GET" and "/api/" not in request.path
        ]
    assert plan[1]["needs"] == again[1]["needs"]  # nothing was downloaded
    planned = plan[1]
    assert planned["needs"] == [asdict(Need(name="acme/tiny@main", size=size, lacking=size, commit=commit))]
    assert (plan[0], planned["ready"], planned["seconds"], planned["disk"]["weights"]) == (0, False, None, size)
    assert "run: hypersd-bench fetch SPEC" in planned["notes"][0]
    assert code == 0
    assert [(row["commit"], row["size"]) for row in fetched["weights"]] == [(commit, size)]
    assert sorted(fetched["weights"][0]["files"]) == weights
    assert fetched["prompts"]["count"] == 2
    assert len(set(downloads)) == len(kept)

    again, plan, run, other = answers(
        ("fetch", *asked), ("plan", *asked), ("run", *asked), ("fetch", *asked, "--base", "acme/other"),
        env={**env, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert again == [0, fetched]
    assert plan[1]["ready"]
    assert plan[1]["seconds"] > 0
    assert (run[0], run[1]["images"]) == (0, 4)
    assert other == [2, None]


def test_a_plan_for_people(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\na pizza")
    flags = ["--base", str(base), "--models", "teacher", "--steps", "1,2", "--prompts", str(tmp_path / "prompts.txt")]
    assert main(["plan", *flags, "--no-probe", "--out", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 images: 2 configurations x 2 prompts x 1"
    assert lines[2].startswith("weights: 1 of 1 here")
    assert "time: unknown on cpu" in lines
    assert any(line.startswith("disk: 24.6 kB of images") for line in lines)
    for verb in ("plan", "fetch"):
        assert main([verb, *flags, "--metrics", "clip-scor/pocket"]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert "did you mean 'clip-score/pocket'?" in said.err


def test_a_folder_that_can_not_be_written_is_one_line(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("hypersd_bench.runner.forecast.tempfile.TemporaryDirectory", refuse)
    with pytest.raises(InputError, match="Permission denied; choose another --out, or --no-probe"):
        forecast(plan_for(base, tmp_path), tmp_path / "run", "cpu")


# the clock


@pytest.mark.nightly
@pytest.mark.skipif(not (WEIGHTS / "base").is_dir(), reason="the miniature is not built")
def test_the_time_of_a_run_is_predicted_within_a_quarter(tmp_path: Path) -> None:
    spec = load_spec(None, {"models": ["hyper-sd", "lcm"], "steps": [1, 4], "num_prompts": 32})
    plan = make_plan(spec.model_copy(update={"timing": None}))
    run_benchmark(plan, tmp_path / "warm-up", "cpu")
    ratios = []
    for i in range(3):
        predicted = forecast(plan, tmp_path / f"run-{i}", "cpu").seconds
        started = time.perf_counter()
        run_benchmark(plan, tmp_path / f"run-{i}", "cpu")
        assert predicted is not None
        ratios.append(predicted / (time.perf_counter() - started))
    assert sorted(ratios)[1] == pytest.approx(1, abs=0.25), ratios


def test_a_plan_for_a_machine_with_a_gpu_can_be_made_on_one_without(base: Path, tmp_path: Path) -> None:
    found = forecast(plan_for(base, tmp_path, dtype="float16"), tmp_path / "run", "cpu")
    assert found.seconds is None
    assert found.disk.images
    assert any(warning.startswith("float16 needs a GPU") for warning in found.warnings)
