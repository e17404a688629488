"""Every published checkpoint, loaded from a stand-in for the hub and sampled at every step count that it claims.

The weights are tiny and random; files, layouts, schedulers and code paths are the real ones. Some entries are checked
against plain diffusers, called as the authors' model cards call it, on the same files from the same noise.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from hypersd_bench.bench import Bench
from hypersd_bench.catalog.spec import HubWeights, ModelSpec
from hypersd_bench.pipelines import HUB_BASES
from hypersd_bench.sampling import lcm
from hypersd_bench.seeding import generators, starting_noise
from tests.hub import StandInHub, environment
from tests.published_hub import ENTRIES, layout, repositories, runs_in
from tests.published_sampling import PROMPTS, SEEDS

ROOT = Path(__file__).parents[2]
each_entry = pytest.mark.parametrize("model", ENTRIES, ids=lambda model: f"{model.base}-{model.name}")


@dataclass(frozen=True)
class Sampled:
    """What the process that sampled them saw of each, by BASE/MODEL/STEPS, with the pictures (2, 3, H, W)."""

    seen: Mapping[str, Any]
    pictures: Mapping[str, NDArray[np.uint8]]
    commits: Mapping[str, str]

    def of(self, model: ModelSpec) -> list[tuple[int, Mapping[str, Any]]]:
        """Of an entry at each of its step counts."""
        return [(steps, self.seen[f"{model.base}/{model.name}/{steps}"]) for steps in sorted(model.contract.timesteps)]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Sampled:
    folder = tmp_path_factory.mktemp("published")
    with StandInHub() as hub:
        commits = {repo: hub.add(repo, files) for repo, files in repositories(folder / "tiny").items()}
        command = [sys.executable, "-m", "tests.published_sampling", str(folder)]
        env = environment(hub, folder / "home", OMP_NUM_THREADS="1")
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "pictures.npz") as pictures:
        return Sampled(json.loads((folder / "found.json").read_text()), dict(pictures), commits)


def test_every_base_has_entries() -> None:
    assert {model.base for model in ENTRIES} == set(HUB_BASES)


@each_entry
def test_its_own_files_are_loaded_from_the_commit_that_main_is_at(sampled: Sampled, model: ModelSpec) -> None:
    for _, seen in sampled.of(model):
        assert seen["model"] == model.name
        assert seen["pipeline"].endswith(snapshot(sampled, runs_in(model)))
        if isinstance(model.weights, HubWeights):
            assert seen["weights"].endswith(f"{snapshot(sampled, model.weights.repo)}/{model.weights.file}".rstrip("/"))


@each_entry
def test_its_weights_are_on_the_unet_in_full(sampled: Sampled, model: ModelSpec) -> None:
    for _, seen in sampled.of(model):
        assert seen["weights_off"] < 1e-6


@each_entry
def test_pictures_at_every_step_count_are_whole_and_not_its_bases(sampled: Sampled, model: ModelSpec) -> None:
    assert any(seen["unlike_base"] for _, seen in sampled.of(model))
    for _, seen in sampled.of(model):
        assert seen["finite"]
        assert min(seen["contrast"]) > 100
        if model.family == "teacher":
            assert seen["unlike_base"] in ([], [0, 0])
        else:
            assert min(seen["unlike_base"], default=255) > 10
    assert len({seen["sha256"] for _, seen in sampled.of(model)}) == len(model.contract.timesteps)


@each_entry
def test_the_unet_is_told_exactly_what_the_contract_says(sampled: Sampled, model: ModelSpec) -> None:
    contract = model.contract
    shift = contract.shifted_timestep or 1000
    for steps, seen in sampled.of(model):
        assert seen["told"] == [t * shift // 1000 for t in contract.timesteps[steps]]
        assert seen["batch"] == [len(PROMPTS) * (2 if contract.guidance_scale > 1 else 1)] * steps
        assert seen["told_guidance"] == [contract.embedded_guidance is not None] * steps
        assert seen["scheduler"] == contract.scheduler


@pytest.mark.parametrize("pipeline", dict.fromkeys(map(runs_in, ENTRIES)))
def test_after_all_of_its_models_the_base_is_to_the_bit_as_before(sampled: Sampled, pipeline: str) -> None:
    assert sampled.seen[f"{pipeline} is as before"] is True


def test_every_way_of_naming_a_loras_tensors_is_among_them() -> None:
    repos = {model.weights.repo for model in ENTRIES if model.kind == "lora" and isinstance(model.weights, HubWeights)}
    assert {layout(repo) for repo in repos} == {"kohya", "stability", "diffusers", "peft"}


def test_alphas_in_a_loras_metadata_count(sampled: Sampled, tmp_path: Path) -> None:
    base = sampled.seen["sd15/teacher/1"]["pipeline"]
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"], init_lora_weights=False)
    unet.add_adapter(config)
    tensors = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, tensors, weight_name="a.safetensors", unet_lora_adapter_metadata=config.to_dict()
    )
    model = ModelSpec("a", "a", "sd15", "lora", lcm((4,)), weights=tmp_path / "a.safetensors")
    after = Bench().seat(model, base).unet.state_dict()
    modules = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    assert modules
    for name in modules:
        update = 8 / 2 * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        assert (after[f"{name}.weight"] - before[f"{name}.weight"] - update).abs().max() < 1e-5


# plain diffusers, as the model cards say


def snapshot(sampled: Sampled, repo: str) -> str:
    return f"models--{repo.replace('/', '--')}/snapshots/{sampled.commits[repo]}"


def entry(name: str) -> ModelSpec:
    (found,) = (model for model in ENTRIES if model.name == name)
    return found


def plain_pipeline(sampled: Sampled, name: str) -> Any:
    """The entry's pipeline, as diffusers loads it from its folder."""
    model = entry(name)
    kind = StableDiffusionXLPipeline if model.base == "sdxl" else StableDiffusionPipeline
    options = {} if model.base == "sdxl" else {"safety_checker": None}
    pipe = kind.from_pretrained(sampled.of(model)[0][1]["pipeline"], **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fuse(pipe: Any, sampled: Sampled, name: str) -> None:
    path = Path(sampled.of(entry(name))[0][1]["weights"])
    pipe.load_lora_weights(path.parent, weight_name=path.name, local_files_only=True)
    pipe.fuse_lora()


def load_unet(pipe: Any, sampled: Sampled, name: str) -> None:
    path = Path(sampled.of(entry(name))[0][1]["weights"])
    pipe.unet.load_state_dict(load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True))


def off(sampled: Sampled, name: str, pipe: Any, steps: int, **options: Any) -> float:
    """The largest difference, in grey levels, between diffusers' pictures and ours."""
    model = entry(name)
    image_generators = generators(SEEDS)
    size = pipe.unet.config.sample_size
    noise = starting_noise(image_generators, (pipe.unet.config.in_channels, size, size))
    called = {"num_inference_steps": steps, "guidance_scale": 0.0, "output_type": "pt", **options}
    pictures = pipe(list(PROMPTS), latents=noise, generator=image_generators, **called).images
    ours = sampled.pictures[f"{model.base}/{name}/{steps}"].astype(float)
    return float(np.abs(255 * pictures.numpy() - ours).max())


@pytest.mark.parametrize("steps", [2, 4, 8])
@pytest.mark.parametrize("base", ["sdxl", "sd15"])
def test_hyper_sd_lora_as_its_card_samples_it(sampled: Sampled, base: str, steps: int) -> None:
    name = f"hyper-{base}-{steps}steps-lora"
    pipe = plain_pipeline(sampled, name)
    fuse(pipe, sampled, name)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    assert off(sampled, name, pipe, steps) < 1.01


@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize("base", ["sdxl", "sd15"])
def test_hyper_sd_unified_lora_as_its_card_samples_it(sampled: Sampled, base: str, steps: int) -> None:
    name = f"hyper-{base}-unified-lora"
    pipe = plain_pipeline(sampled, name)
    fuse(pipe, sampled, name)
    pipe.scheduler = diffusers.TCDScheduler.from_config(pipe.scheduler.config)
    assert off(sampled, name, pipe, steps, eta=1.0) < 1.01


def test_hyper_sd_one_step_unet_as_its_card_samples_it(sampled: Sampled) -> None:
    name = "hyper-sdxl-1step-unet"
    pipe = plain_pipeline(sampled, name)
    load_unet(pipe, sampled, name)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    assert off(sampled, name, pipe, 1, timesteps=[800]) < 1.01


def test_lightning_one_step_unet_as_its_card_samples_it(sampled: Sampled) -> None:
    name = "sdxl-lightning-1step-unet"
    pipe = plain_pipeline(sampled, name)
    load_unet(pipe, sampled, name)
    settings = {"timestep_spacing": "trailing", "prediction_type": "sample"}
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, **settings)
    assert off(sampled, name, pipe, 1) < 1.01


@pytest.mark.parametrize("kind", ["unet", "lora"])
def test_lightning_in_four_steps_as_its_card_samples_it(sampled: Sampled, kind: str) -> None:
    name = f"sdxl-lightning-4step-{kind}"
    pipe = plain_pipeline(sampled, name)
    (fuse if kind == "lora" else load_unet)(pipe, sampled, name)
    settings = {"timestep_spacing": "trailing"}
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, **settings)
    assert off(sampled, name, pipe, 4) < 1.01


def test_lcm_unet_is_told_its_guidance_as_its_card_samples_it(sampled: Sampled) -> None:
    name = "lcm-sdxl-unet"
    pipe = plain_pipeline(sampled, name)
    unet = UNet2DConditionModel.from_pretrained(sampled.of(entry(name))[0][1]["weights"])
    pipe = StableDiffusionXLPipeline(**{**pipe.components, "unet": unet})
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    assert off(sampled, name, pipe, 4, guidance_scale=8.0) < 1.01
    assert off(sampled, name, pipe, 4, guidance_scale=7.0) > 1.01  # the picture tells


@pytest.mark.parametrize(
    ("kind", "timesteps"), [("unet", [999, 749, 499, 249]), ("unet", [399]), ("lora", [999, 749, 499, 249])]
)
def test_dmd2_at_its_own_timesteps_as_its_card_samples_it(sampled: Sampled, kind: str, timesteps: list[int]) -> None:
    steps = len(timesteps)
    name = f"dmd2-sdxl-{steps}step-{kind}"
    pipe = plain_pipeline(sampled, name)
    (fuse if kind == "lora" else load_unet)(pipe, sampled, name)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    assert off(sampled, name, pipe, steps, timesteps=timesteps) < 1.01


@pytest.mark.parametrize("name", ["lcm-lora-sdxl", "lcm-lora-sdv1-5", "flash-sdxl", "flash-sd"])
def test_lora_sampled_by_lcm_as_its_card_samples_it(sampled: Sampled, name: str) -> None:
    pipe = plain_pipeline(sampled, name)
    fuse(pipe, sampled, name)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    assert off(sampled, name, pipe, 4) < 1.01


def test_tdm_by_the_scheduler_config_of_its_base(sampled: Sampled) -> None:
    name = "tdm-dreamshaper-lora"
    pipe = plain_pipeline(sampled, name)
    fuse(pipe, sampled, name)
    base = sampled.seen["sd15/teacher/1"]["pipeline"]
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_pretrained(base, subfolder="scheduler")
    assert off(sampled, name, pipe, 4, guidance_scale=1.0) < 1.01


@pytest.mark.parametrize("name", ["sdxl-turbo", "sd-turbo"])
def test_turbo_by_its_pipelines_own_scheduler(sampled: Sampled, name: str) -> None:
    pipe = plain_pipeline(sampled, name)
    assert off(sampled, name, pipe, 1) < 1.01
    assert off(sampled, name, pipe, 4) < 1.01


def test_a_teacher_with_guidance(sampled: Sampled) -> None:
    (model,) = (model for model in ENTRIES if (model.base, model.family) == ("sdxl", "teacher"))
    pipe = StableDiffusionXLPipeline.from_pretrained(sampled.of(model)[0][1]["pipeline"])
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    noise = starting_noise(generators(SEEDS), (4, 8, 8))
    pictures = pipe(list(PROMPTS), latents=noise, num_inference_steps=25, guidance_scale=7.5, output_type="pt").images
    ours = sampled.pictures["sdxl/teacher/25"].astype(float)
    assert np.abs(255 * pictures.numpy() - ours).max() < 1.01
