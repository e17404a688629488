"""The four methods on a tiny random base: files one can use, and a stopped run that ends as the unstopped one."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from distill import loop
from distill.checkpoint import Position, RunFolder
from distill.cli import distill
from distill.loop import Trainer, train
from distill.settings import Settings
from distill.stages import Losses, Stage
from hypersd_bench import registry
from hypersd_bench.errors import HypersdBenchError, InputError
from hypersd_bench.pipelines import load_base, sample
from hypersd_bench.sampling import read_contract, read_safetensors_metadata
from tests.tiny_base import make_tiny_base
from tests.tiny_runs import BATCH, tiny_settings

State = tuple[Position, dict[str, Tensor], dict[str, Any]]
Runs = Callable[[str], tuple[Settings, Path]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_base(tmp_path_factory.mktemp("tiny") / "base"))


@pytest.fixture(scope="module")
def unstopped(base: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs that nothing stopped, one for each method asked for."""

    @cache
    def run(method: str) -> tuple[Settings, Path]:
        chosen, out = tiny_settings(method, base), tmp_path_factory.mktemp(method) / "run"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "LOG_EVERY", 2)  # so that checkpoints lie within stages
            saved[out] = keep_states(patch)
            train(chosen, out)
        return chosen, out

    return run


saved: dict[Path, list[State]] = {}


def keep_states(patch: pytest.MonkeyPatch) -> list[State]:
    """Copies of everything that a run's checkpoints hold, in order."""
    states: list[State] = []
    save = RunFolder.save

    def kept(self: RunFolder, position: Position, weights: Any, optimizers: Any) -> Path:
        copies = {name: tensor.detach().clone() for name, tensor in weights.items()}
        states.append((replace(position, seconds=0.0), copies, copy.deepcopy(dict(optimizers))))
        return save(self, position, weights, optimizers)

    patch.setattr(RunFolder, "save", kept)
    return states


@pytest.fixture(params=sorted(registry.METHODS))
def finished(request: pytest.FixtureRequest, unstopped: Runs) -> tuple[Settings, Path]:
    """A run of each method that nothing stopped."""
    return unstopped(request.param)


def exported(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {str(path.relative_to(out)): load_file(path) for path in sorted(out.rglob("*.safetensors"))}


def assert_same_files(left: Path, right: Path) -> None:
    a, b = exported(left), exported(right)
    assert a.keys() == b.keys()
    assert a
    for file in a:
        assert a[file].keys() == b[file].keys()
        assert all(torch.equal(a[file][name], b[file][name]) for name in a[file]), file


def test_a_run_leaves_what_it_promises(finished: tuple[Settings, Path]) -> None:
    chosen, out = finished
    manifest = json.loads((out / "distill.json").read_text())
    stages: tuple[Stage, ...] = registry.resolve("method", chosen.method)().stages(chosen.preset)
    assert manifest["state"] == "done"
    assert [stage["name"] for stage in manifest["stages"]] == [stage.name for stage in stages]
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert rows[-1]["images_seen"] == chosen.preset.images
    assert {"method", "stage", "step", "images_seen", "loss", "images_per_s", "seconds"} <= rows[0].keys()
    assert {row["stage"] for row in rows} == {stage.name for stage in stages}
    assert list((out / "tensorboard").rglob("events.*"))
    for stage in stages:
        with Image.open(out / "samples" / f"{stage.name}.png") as grid:
            assert grid.size == (8 * 64, 64 * (1 + len(stage.contract.timesteps)))
    assert chosen.command in (out / "README.md").read_text()
    assert not (out / "checkpoints").exists()


def test_every_lora_loads_and_samples_by_its_own_contract(finished: tuple[Settings, Path]) -> None:
    chosen, out = finished
    pipe = load_base(chosen.base)
    untouched = pipe.unet.state_dict()["conv_in.weight"].clone()
    for file in sorted(out.glob("*.safetensors")):
        contract = read_contract(file)
        card = json.loads(read_safetensors_metadata(file)["hypersd_bench.card"])
        assert card["method"] == chosen.method
        assert card["seed"] == 0
        assert all(tensor.dtype == torch.float16 for tensor in load_file(file).values())
        pipe.load_lora_weights(file.parent, weight_name=file.name)
        for steps in contract.timesteps:
            images = sample(pipe, contract, steps, ["a fox on a green background"], [1])
            assert images.shape == (1, 3, 64, 64)
        pipe.unload_lora_weights()
    assert torch.equal(pipe.unet.state_dict()["conv_in.weight"], untouched)


def test_keys_are_those_diffusers_writes(finished: tuple[Settings, Path], tmp_path: Path) -> None:
    chosen, out = finished
    file = next(iter(sorted(out.glob("*.safetensors"))))
    pipe = load_base(chosen.base)
    pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name="lora")
    from peft import get_peft_model_state_dict

    layers = get_peft_model_state_dict(pipe.unet, adapter_name="lora")
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, weight_name="theirs.safetensors")
    assert load_file(tmp_path / "theirs.safetensors").keys() == load_file(file).keys()


def assert_same_state(left: State, right: State) -> None:
    """Position, every role's weights, the discriminator and both optimizers, to the bit."""
    assert left[0] == right[0]
    assert left[1].keys() == right[1].keys()
    assert all(torch.equal(left[1][name], right[1][name]) for name in left[1])
    assert left[2].keys() == right[2].keys()
    for name in left[2]:
        mine, theirs = left[2][name]["state"], right[2][name]["state"]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[i][key], theirs[i][key]) for i in mine for key in mine[i])


# hyper-sd's steps 0-2 are TSCD, 3-5 feedback, 6-8 adversarial TSCD, 9-11 one-step; lightning's 6-8 and 9-11 adversarial
@pytest.mark.parametrize(
    ("method", "stop_after"),
    [
        ("hyper-sd", 8), ("lightning", 6), ("lcm", 2), ("tcd", 2),
        *(pytest.param("hyper-sd", stop, marks=pytest.mark.nightly) for stop in (1, 3, 5, 6, 9, 11)),
        pytest.param("lightning", 8, marks=pytest.mark.nightly),
    ],
)  # fmt: skip
def test_stopped_and_resumed_equals_unstopped(
    unstopped: Runs, method: str, stop_after: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whatever was in memory is lost after ``stop_after`` steps: within a stage, on its border, and in the next."""
    chosen, out = unstopped(method)
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    steps, step = [0], Trainer._step

    def counted(self: Trainer, stage: Stage, factor: float) -> None:
        if steps[0] == stop_after:
            raise KeyboardInterrupt
        steps[0] += 1
        step(self, stage, factor)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", counted)
        with pytest.raises(KeyboardInterrupt):
            train(chosen, tmp_path / "run")
    torch.manual_seed(99)  # nothing may hang on the global generator
    states = keep_states(monkeypatch)
    train(chosen, tmp_path / "run")
    assert_same_files(out, tmp_path / "run")
    for resumed, unbroken in zip(reversed(states), reversed(saved[out]), strict=False):
        assert_same_state(resumed, unbroken)
    assert losses(tmp_path / "run") == losses(out)


def losses(out: Path) -> list[dict[str, Any]]:
    """The log without what the clock says."""
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("images_per_s", "seconds")} for row in rows]


def test_feedback_leaves_the_student_as_it_found_it(unstopped: Runs) -> None:
    _, out = unstopped("hyper-sd")
    states = saved[out]
    after_tscd, after_feedback = (
        next(weights for position, weights, _ in states if (position.stage, position.stage_images) == (n, 0))
        for n in (1, 2)
    )
    student = [name for name in after_tscd if name.startswith("student.")]
    assert student
    assert all(torch.equal(after_tscd[name], after_feedback[name]) for name in student)
    feedback = [name for name in after_feedback if name.startswith("feedback.")]
    assert any(not torch.equal(after_tscd[name], after_feedback[name]) for name in feedback)
    tscd, merged = (
        load_file(out / f"{name}.safetensors") for name in ("stages/hyper-sd-2steps-tscd", "hyper-sd-2steps")
    )
    assert tscd.keys() == merged.keys()
    assert any(not torch.equal(tscd[name], merged[name]) for name in tscd)


def test_rewards_and_those_only_watched_are_logged(unstopped: Runs) -> None:
    _, out = unstopped("hyper-sd")
    rows = {row["stage"]: row for row in losses(out)}
    for stage in ("2-feedback", "one-step"):
        assert {"reward/aesthetic/pocket", "held_out/clip-score/pocket", "saturation"} <= rows[stage].keys()
    assert {"critic_loss", "matching", "distance"} <= rows["one-step"].keys()
    assert {"discriminator_loss", "p_real", "p_fake"} <= rows["1-segments"].keys()


@pytest.mark.nightly
def test_killed_at_a_random_moment_it_ends_the_same(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "tests.tiny_runs", "hyper-sd", base, str(out), str(BATCH), "0"]
    child = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(out.glob("checkpoints/*")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(3 * random.random())
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (out / "distill.json").exists()
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    chosen = tiny_settings("hyper-sd", base)
    train(chosen, out)
    train(chosen, tmp_path / "whole")
    assert_same_files(tmp_path / "whole", out)
    assert losses(out) == losses(tmp_path / "whole")


@pytest.mark.parametrize("method", ["hyper-sd", pytest.param("lightning", marks=pytest.mark.nightly)])
def test_gradient_checkpointing_changes_nothing(
    unstopped: Runs, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage, its discriminator's backbone and its critic included, to the bit."""
    chosen, out = unstopped(method)
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    train(replace(chosen, preset=replace(chosen.preset, gradient_checkpointing=True)), tmp_path / "run")
    assert losses(tmp_path / "run") == losses(out)
    assert_same_files(out, tmp_path / "run")


def test_ctrl_c_keeps_a_checkpoint_of_the_step_under_way(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = tiny_settings("tcd", base, steps=4)
    patient = replace(chosen, preset=replace(chosen.preset, checkpoint_every_s=1e9))
    step = Trainer._step

    def interrupted(self: Trainer, stage: Stage, factor: float) -> None:
        step(self, stage, factor)
        if len(self.window) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(patient, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["00-000000000006"]


def test_a_loss_that_is_no_number_stops_the_run(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill.methods import tcd

    honest, calls = tcd.trajectory_consistency, [0]

    def poisoned(*args: object, **more: object) -> Losses:
        calls[0] += 1
        losses = honest(*args, **more)  # type: ignore[arg-type]
        return losses if calls[0] < 6 else losses._replace(student=torch.full((), torch.nan, requires_grad=True))

    monkeypatch.setattr(tcd, "trajectory_consistency", poisoned)
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    with pytest.raises(HypersdBenchError, match=r"step 6 \(images scene.*last good checkpoint: .*00-000000000008"):
        train(tiny_settings("tcd", base, steps=8), tmp_path / "run")


def test_the_verb_says_what_is_wrong_in_one_line(base: str, tmp_path: Path) -> None:
    def error(*arguments: str) -> str:
        result = CliRunner().invoke(distill, [*arguments, "--out", str(tmp_path / "run")])
        assert isinstance(result.exception, InputError)
        return str(result.exception)

    assert "did you mean 'lightning'" in error("lightening", "--base", base)
    assert "did you mean 'pocket'" in error("tcd", "--base", base, "--preset", "poket")
    assert "no model_index.json" in error("tcd", "--base", str(tmp_path), "--preset", "tiny", "--data", "scenes")
    assert "8 would be" in error("tcd", "--base", base, "--preset", "tiny", "--data", "scenes", "--images", "6")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox on a green background\n")
    assert "prompts alone" in error("tcd", "--base", base, "--preset", "tiny", "--data", str(prompts))
    assert "which has" in error("tcd", "--base", base, "--preset", "tiny", "--data", "scenes", "--rank", "99")
    assert not (tmp_path / "run").exists()


def test_the_verb_trains_then_says_that_it_is_done(base: str, tmp_path: Path) -> None:
    arguments = ["lcm", "--base", base, "--preset", "tiny", "--data", "scenes", "--images", "8", "--device", "cpu",
                 "--json", "--out", str(tmp_path / "run")]  # fmt: skip
    first = CliRunner().invoke(distill, arguments, catch_exceptions=False)
    written = (tmp_path / "run" / "lcm.safetensors").stat().st_mtime_ns
    second = CliRunner().invoke(distill, arguments, catch_exceptions=False)
    assert json.loads(first.stdout) == json.loads(second.stdout)
    assert json.loads(first.stdout)["state"] == "done"
    assert (tmp_path / "run" / "lcm.safetensors").stat().st_mtime_ns == written


def test_a_judge_that_is_missing_is_told_before_any_training(base: str, tmp_path: Path) -> None:
    arguments = ["hyper-sd", "--base", base, "--preset", "tiny", "--data", "scenes", "--images", "32",
                 "--set", "hyper_sd.rewards=[hps/v2.1]", "--out", str(tmp_path / "run")]  # fmt: skip
    result = CliRunner().invoke(distill, arguments)
    assert isinstance(result.exception, InputError)
    assert "HPSv2.1: HPS_v2.1_compressed.pt of xswu/HPSv2 is not" in str(result.exception)
    assert not (tmp_path / "run").exists()
