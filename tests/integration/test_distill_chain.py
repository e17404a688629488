"""The four methods on a tiny random base: files one can use, and a stopped run that ends as the unstopped one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from distill import loop
from distill.checkpoint import Settings
from distill.cli import distill
from distill.loop import Trainer, train
from distill.presets import find_preset
from distill.stages import Losses, Stage
from hypersd_bench import registry
from hypersd_bench.errors import HypersdBenchError, InputError
from hypersd_bench.pipelines import load_base, sample
from hypersd_bench.sampling import read_contract, read_safetensors_metadata
from tests.tiny_base import make_tiny_base

STEPS_PER_STAGE = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_base(tmp_path_factory.mktemp("tiny") / "base"))


def settings(method: str, base: str) -> Settings:
    """Two batches a stage at least, checkpoints whenever the loop may write one."""
    stages = len(registry.resolve("method", method)().stages(find_preset("tiny")))
    images = 2 * STEPS_PER_STAGE * max(stages, 2)
    preset = replace(find_preset("tiny"), images=images, batch_size=2, checkpoint_every_s=0.0)
    return Settings(method, base, preset)


@pytest.fixture(scope="module", params=sorted(registry.METHODS))
def finished(
    request: pytest.FixtureRequest, base: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Settings, Path]:
    """A run that nothing stopped."""
    chosen, out = settings(request.param, base), tmp_path_factory.mktemp(request.param) / "run"
    train(chosen, out)
    return chosen, out


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


@pytest.mark.parametrize("stop_after", [3, STEPS_PER_STAGE, 2 * STEPS_PER_STAGE - 1])
def test_stopped_and_resumed_equals_unstopped(
    finished: tuple[Settings, Path], stop_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was in memory is lost after ``stop_after`` steps: within a stage, on its border, and in the next."""
    chosen, out = finished
    monkeypatch.setattr(loop, "LOG_EVERY", 2)  # so that checkpoints lie within stages
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
    train(chosen, tmp_path / "run")
    assert_same_files(out, tmp_path / "run")
    seen = [json.loads(line)["images_seen"] for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert seen == sorted(set(seen))


def test_killed_at_a_random_moment_it_ends_the_same(base: str, tmp_path: Path) -> None:
    chosen = settings("hyper-sd", base)
    program = (
        "import sys; from pathlib import Path; from dataclasses import replace; from distill import loop\n"
        "from distill.checkpoint import Settings; from distill.presets import find_preset\n"
        "loop.LOG_EVERY = 1\n"
        f"preset = replace(find_preset('tiny'), images={chosen.preset.images}, batch_size=2, checkpoint_every_s=0.0)\n"
        "loop.train(Settings('hyper-sd', sys.argv[1], preset), Path(sys.argv[2]))\n"
    )
    out = tmp_path / "killed"
    root = Path(__file__).parents[2]
    child = subprocess.Popen([sys.executable, "-c", program, base, str(out)], cwd=root, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(out.glob("checkpoints/*")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(random.random())
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (out / "distill.json").exists()
    train(chosen, out)
    train(chosen, tmp_path / "whole")
    assert_same_files(tmp_path / "whole", out)


def test_ctrl_c_keeps_a_checkpoint_of_the_step_under_way(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings("tcd", base)
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
        return losses if calls[0] < 6 else losses._replace(student=losses.student * float("nan"))

    monkeypatch.setattr(tcd, "trajectory_consistency", poisoned)
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    with pytest.raises(HypersdBenchError, match=r"not finite at step 6; last good checkpoint: .*00-000000000008"):
        train(settings("tcd", base), tmp_path / "run")


def test_the_verb_says_what_is_wrong_in_one_line(base: str, tmp_path: Path) -> None:
    def error(*arguments: str) -> str:
        result = CliRunner().invoke(distill, [*arguments, "--out", str(tmp_path / "run")])
        assert isinstance(result.exception, InputError)
        return str(result.exception)

    assert "did you mean 'lightning'" in error("lightening", "--base", base)
    assert "did you mean 'pocket'" in error("tcd", "--base", base, "--preset", "poket")
    assert "no model_index.json" in error("tcd", "--base", str(tmp_path))
    assert "6 would be" not in error("tcd", "--base", base, "--preset", "tiny", "--images", "6")
    assert not (tmp_path / "run").exists()


def test_the_verb_trains_then_says_that_it_is_done(base: str, tmp_path: Path) -> None:
    arguments = ["lcm", "--base", base, "--preset", "tiny", "--images", "8", "--device", "cpu", "--json",
                 "--out", str(tmp_path / "run")]  # fmt: skip
    first = CliRunner().invoke(distill, arguments, catch_exceptions=False)
    written = (tmp_path / "run" / "lcm.safetensors").stat().st_mtime_ns
    second = CliRunner().invoke(distill, arguments, catch_exceptions=False)
    assert json.loads(first.stdout) == json.loads(second.stdout)
    assert json.loads(first.stdout)["state"] == "done"
    assert (tmp_path / "run" / "lcm.safetensors").stat().st_mtime_ns == written
