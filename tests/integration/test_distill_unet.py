"""Full-weight students from the first step to the benchmark: UNet folders that diffusers loads and the harness runs."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from distill import export, export_verb, loop, scoreboard
from distill.checkpoint import RunFolder
from distill.export_verb import export_run
from distill.loop import Trainer, train
from distill.pictures import looking_prompts
from distill.presets import LightningSettings
from distill.settings import Settings
from distill.stages import Stage
from hypersd_bench import registry
from hypersd_bench.bench import Bench
from hypersd_bench.catalog.local import distilled_family
from hypersd_bench.errors import InputError
from hypersd_bench.pipelines import encode_prompts, load_base, sample, sample_latents
from hypersd_bench.provenance import sha256
from hypersd_bench.runner.benchmark import run_benchmark
from hypersd_bench.runner.plan import make_plan
from hypersd_bench.runner.spec import load_spec
from tests.tiny_base import make_tiny_base
from tests.tiny_runs import BATCH, HYPER_SD, tiny_preset

STEPS = 2  # of every stage
WEIGHTS = "diffusion_pytorch_model.safetensors"
SETTINGS = {
    "lcm": {"sample_every_s": 1e-3, "scoreboard": ()},  # looks are taken, too
    "tcd": {},
    "hyper-sd": {  # the one-step stage alone, from the teacher
        "hyper_sd": replace(
            HYPER_SD, segments=(), shares=(), feedback_shares=(), mse_weights=(), adversarial_weights=()
        )
    },
    # guided, 2 steps, then one in x0 form, whose last objective has the student of 4 steps for its teacher
    "lightning": {"lightning": LightningSettings(teacher_steps=8, chain=(4, 2, 1), shares=(0.0, 0.0, 1.0))},
}  # fmt: skip
Run = tuple[Settings, Path, dict[str, Any]]


def settings(method: str, base: str) -> Settings:
    """A run whose every stage has a few steps."""
    preset = replace(tiny_preset(method, student="unet"), images=BATCH * 1000)
    preset = replace(preset, **SETTINGS[method])  # type: ignore[arg-type]
    stages = registry.resolve("method", method)().stages(preset)
    return Settings(method, base, replace(preset, images=BATCH * STEPS * len(stages)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_base(tmp_path_factory.mktemp("tiny") / "base"))


@pytest.fixture(scope="module")
def finished(base: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Runs that nothing stopped, one for each method asked for, with what their last checkpoint held."""

    @cache
    def run(method: str) -> Run:
        chosen, out = settings(method, base), tmp_path_factory.mktemp(method) / "run"
        with pytest.MonkeyPatch.context() as patch:
            quicken(patch)
            last = keep_last(patch)
            train(chosen, out)
        return chosen, out, last

    return run


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Checkpoints within stages, and few pictures: those of other steps than trained take most of a tiny run."""
    patch.setattr(loop, "LOG_EVERY", 1)
    patch.setattr(scoreboard, "STEPS", (1,))
    for module in (export, scoreboard):
        patch.setattr(module, "TEACHER_STEPS", 1)
    for module in (export, loop):
        patch.setattr(module, "looking_prompts", lambda pipe: looking_prompts(pipe)[:2])


def keep_last(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A copy of everything that a run's newest checkpoint holds."""
    last: dict[str, Any] = {}
    save = RunFolder.save

    def kept(self: RunFolder, position: Any, weights: Any, optimizers: Any) -> Path:
        last.clear()
        last.update({name: tensor.detach().clone() for name, tensor in weights.items()})
        last["optimizers"] = copy.deepcopy(dict(optimizers))
        return save(self, position, weights, optimizers)

    patch.setattr(RunFolder, "save", kept)
    return last


@pytest.mark.parametrize(
    ("method", "students", "timesteps"),
    [
        ("lcm", ["lcm"], (999,)), ("tcd", ["tcd"], (999,)), ("hyper-sd", ["hyper-sd-1step"], (800,)),
        ("lightning", ["lightning-1steps", "lightning-2steps"], (999,)),
    ],
)  # fmt: skip
def test_every_student_is_a_unet_folder_with_the_trained_weights(
    finished: Callable[[str], Run], method: str, students: list[str], timesteps: tuple[int, ...]
) -> None:
    chosen, out, last = finished(method)
    manifest = json.loads((out / "distill.json").read_text())
    assert manifest["state"] == "done"
    assert sorted(stage["file"] for stage in manifest["stages"] if "/" not in stage["file"]) == students
    for stage in manifest["stages"]:
        weights = out / stage["file"] / WEIGHTS
        assert stage["sha256"] == sha256(weights)
        assert 0 < stage["largest_difference"] < 0.01
        assert {value.dtype for value in load_file(weights).values()} == {torch.float16}
        config = json.loads((out / stage["file"] / "config.json").read_text())
        assert chosen.base not in json.dumps(config)  # folders are given away
        assert (out / "samples" / f"{stage['name']}.png").is_file()
    assert not list(out.rglob("*.partial"))

    models = {model.name: model for model in distilled_family(out, method, chosen.base)}
    assert sorted(models) == students
    one = models[students[0]]
    assert one.kind == "unet"
    assert one.contract.timesteps[1] == timesteps
    assert one.contract.prediction_type == ("sample" if method == "lightning" else "epsilon")
    assert one.card["seed"] == 0
    theirs = UNet2DConditionModel.from_pretrained(out / students[0])
    teacher, moved = load_base(chosen.base).unet.state_dict(), []
    for i, (name, value) in enumerate(theirs.named_parameters()):
        trained = last[f"ema.{i}"]  # of the run's last stage, which is that of one step
        assert torch.equal(value, trained.half().float()), name
        if name in teacher:
            moved.append(not torch.equal(trained, teacher[name]))
    assert sum(moved) > 0.9 * len(moved)
    card = (out / "README.md").read_text()
    assert f'from_pretrained("{manifest["stages"][-1]["file"]}")' in card
    assert "load_lora_weights" not in card


@pytest.mark.parametrize("method", ["lcm", "hyper-sd", "lightning"])
def test_the_harness_samples_as_a_stock_pipeline(finished: Callable[[str], Run], method: str) -> None:
    """The contract by our sampler, and by diffusers' pipeline with the folder as README.md says."""
    chosen, out, _ = finished(method)
    model = next(model for model in distilled_family(out, method, chosen.base) if 1 in model.contract.timesteps)
    contract, bench = model.contract, Bench()
    base = bench.base(chosen.base)
    untouched = {name: value.clone() for name, value in base.unet.state_dict().items()}
    pipe = bench.seat(model, chosen.base)
    assert pipe.vae is base.vae
    g = contract.embedded_guidance
    assert g == (chosen.preset.lcm.embedded_guidance if method == "lcm" else None)
    ours = sample_latents(pipe, contract, 1, encode_prompts(pipe, ["a"]), [3])
    assert all(torch.equal(value, untouched[name]) for name, value in base.unet.state_dict().items())

    unet = UNet2DConditionModel.from_pretrained(model.weights)
    stock = StableDiffusionPipeline.from_pretrained(chosen.base, unet=unet, safety_checker=None)
    stock.scheduler = contract.make_scheduler(stock.scheduler.config)
    listed = {"timesteps": list(contract.timesteps[1])} if method != "lightning" else {}
    theirs = stock(
        ["a"], num_inference_steps=1, guidance_scale=g or 1.0, output_type="latent",
        generator=[torch.Generator().manual_seed(3)], **listed,
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs.images, rtol=1e-3, atol=1e-3)


def test_a_benchmark_runs_whole_unets(base: str, finished: Callable[[str], Run], tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A run's folder, one UNet of another, and an exported one in shards."""
    runs = {method: finished(method)[1] for method in ("lcm", "lightning")}
    monkeypatch.setattr(export_verb, "MAX_SHARD_SIZE", "300KB")
    (exported,) = export_run(runs["lcm"], out=tmp_path / "exported")
    assert len(list(exported.path.glob("*.safetensors"))) > 1
    models = {"lcm": runs["lcm"], "two": runs["lightning"] / "lightning-2steps", "sharded": exported.path}
    (tmp_path / "prompts.txt").write_text("a fox\na car")
    spec = load_spec(None, {
        "base": base, "models": [{"name": name, "path": str(path), "steps": [2]} for name, path in models.items()],
        "prompts": "prompts.txt", "replicates": 1, "timing": {"repeats": 1}, "metrics": [],
    })  # fmt: skip
    store, failed = run_benchmark(make_plan(spec, tmp_path), tmp_path / "run", "cpu")
    assert failed == {}
    pictures: dict[str, list[bytes]] = {}
    for row in store.images():
        pictures.setdefault(row.model, []).append((store.folder / row.file).read_bytes())
    assert pictures["lcm"] == pictures["sharded"] != pictures["two"]
    told = {
        model["name"]: model["checkpoints"]["2"]
        for model in json.loads((store.folder / "run.json").read_text())["models"]
    }
    assert told["lcm"]["file"] == "lcm"
    assert told["lcm"]["sha256"] == sha256(runs["lcm"] / "lcm" / WEIGHTS)
    assert told["two"]["file"] == "lightning-2steps"
    assert len({each["sha256"] for each in told.values()}) == 3


@pytest.mark.parametrize(
    ("method", "stop_after"),
    [
        ("lcm", 1),
        ("hyper-sd", 1),
        ("lightning", 7),
        *(pytest.param("lightning", stop, marks=pytest.mark.nightly) for stop in (2, 5)),
    ],
)
def test_stopped_and_resumed_equals_unstopped(
    finished: Callable[[str], Run], method: str, stop_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was in memory is lost after ``stop_after`` steps: within a stage, and on its border."""
    chosen, out, last = finished(method)
    quicken(monkeypatch)
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
    resumed = keep_last(monkeypatch)
    train(chosen, tmp_path / "run")
    files = [stage["file"] for stage in json.loads((out / "distill.json").read_text())["stages"]]
    for file in files:
        mine, whole = load_file(tmp_path / "run" / file / WEIGHTS), load_file(out / file / WEIGHTS)
        assert all(torch.equal(mine[name], whole[name]) for name in whole), file
    assert resumed.keys() == last.keys()
    assert all(torch.equal(resumed[name], last[name]) for name in last if name != "optimizers")
    for name, state in last["optimizers"].items():
        for i, moments in state["state"].items():
            assert all(torch.equal(resumed["optimizers"][name]["state"][i][key], moments[key]) for key in moments)


def test_fresh_removes_a_runs_unets_and_nothing_else(finished: Callable[[str], Run], tmp_path: Path) -> None:
    chosen, out, _ = finished("lightning")
    shutil.copytree(out, tmp_path / "run")
    (tmp_path / "run" / ".lightning-1steps.partial").mkdir()  # killed while it was written
    (tmp_path / "run" / "mine").mkdir()
    RunFolder.open(tmp_path / "run", replace(chosen, seed=1), {}, fresh=True)
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left == ["cache", "distill.json", "mine"]


def test_unets_that_dont_fit_or_arent_whole_get_one_line(finished: Callable[[str], Run], tmp_path: Path) -> None:
    chosen, out, _ = finished("tcd")
    folder = tmp_path / "tcd"
    shutil.copytree(out / "tcd", folder)
    config = json.loads((folder / "config.json").read_text())
    (model,) = distilled_family(folder, "tcd", chosen.base)
    assert sample(Bench().seat(model, chosen.base), model.contract, 1, ["a"], [1]).shape == (1, 3, 64, 64)
    (folder / "config.json").write_text(json.dumps({**config, "sample_size": 16}))
    with pytest.raises(InputError, match=r"does not fit base .* its sample_size is 16, the base's 8"):
        Bench().seat(model, chosen.base)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="not a whole diffusers UNet folder"):
        Bench().seat(model, chosen.base)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])
    with pytest.raises(InputError, match="truncated"):
        distilled_family(folder, "tcd", chosen.base)
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match="no safetensors weights"):
        distilled_family(folder, "tcd", chosen.base)
