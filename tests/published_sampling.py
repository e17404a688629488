"""Sample every published checkpoint at every step count that it claims, by the steps of a benchmark run.

    python -m tests.published_sampling FOLDER

A process of its own, as huggingface_hub reads its environment when imported. What it saw goes to FOLDER/found.json,
the pictures to FOLDER/pictures.npz, each under BASE/MODEL/STEPS.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from hypersd_bench.bench import Bench
from hypersd_bench.catalog.spec import HubWeights, ModelSpec
from hypersd_bench.pipelines import (
    HUB_BASES,
    Pipeline,
    base_folder,
    decode_latents,
    encode_empty,
    encode_prompts,
    load_base,
    sample_latents,
    to_uint8,
    weights_path,
)
from hypersd_bench.runner.plan import Configuration, make_plan
from hypersd_bench.runner.spec import RunSpec
from hypersd_bench.runner.weights import bring
from hypersd_bench.sampling import SamplerContract
from hypersd_bench.seeding import image_seed
from tests.published_hub import ENTRIES, lora_updates, runs_in

PROMPTS = ("a fox on a blue background", "a car left of a tree on a pink background")
COMPARED_STEPS = 16  # pictures of more steps, which take most of the time, are not compared with the bare pipeline's
SEEDS = [image_seed(0, str(i), 0) for i in range(len(PROMPTS))]


def main(folder: Path) -> None:
    """Sample all of them, pipeline by pipeline."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    found: dict[str, Any] = {}
    pictures: dict[str, np.ndarray[Any, Any]] = {}
    for pipeline in dict.fromkeys(map(runs_in, ENTRIES)):
        _sample_pipeline([model for model in ENTRIES if runs_in(model) == pipeline], folder, found, pictures)
    (folder / "found.json").write_text(json.dumps(found))
    np.savez(folder / "pictures.npz", allow_pickle=False, **pictures)


def _sample_pipeline(
    models: list[ModelSpec], folder: Path, found: dict[str, Any], pictures: dict[str, np.ndarray[Any, Any]]
) -> None:
    """All models of a pipeline on one bench, one after the other."""
    bench = Bench()
    for model in models:
        for steps in sorted(model.contract.timesteps):
            configuration = _brought(model, steps, folder)
            pipe = bench.seat(configuration.model, configuration.pipeline, configuration.dtype)
            with _watched(pipe) as seen:
                made = _pictures(pipe, configuration.model.contract, steps)
            name = f"{model.base}/{model.name}/{steps}"
            pictures[name] = made["pixels"].numpy()
            found[name] = {
                **seen,
                **_files(configuration),
                "weights_off": _weights_off(configuration, pipe),
                "finite": made["finite"],
                "contrast": (made["pixels"].flatten(1).amax(1) - made["pixels"].flatten(1).amin(1)).tolist(),
                "unlike_base": _unlike_base(made["pixels"], configuration) if steps <= COMPARED_STEPS else [],
                "mean": float(made["pixels"].float().mean()),
                "sha256": hashlib.sha256(pictures[name].tobytes()).hexdigest(),
            }
    before = _pristine(configuration.pipeline).unet.state_dict()
    after = bench.base(configuration.pipeline).unet.state_dict()
    same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    found[f"{runs_in(models[0])} is as before"] = same


def _brought(model: ModelSpec, steps: int, folder: Path) -> Configuration:
    ref = {"name": model.name, "steps": [steps]}
    spec = RunSpec.model_validate({"base": model.base, "models": [ref], "prompts": "prompts.txt"})
    plan, pins = bring(make_plan(spec, folder), _PINS)
    _PINS.update(pins)
    (configuration,) = plan.configurations
    return configuration


_PINS: dict[str, str] = {}


@cache
def _pristine(pipeline: str) -> Pipeline:
    return load_base(pipeline)


@torch.no_grad()
def _pictures(pipe: Pipeline, contract: SamplerContract, steps: int) -> dict[str, Any]:
    cond = encode_prompts(pipe, PROMPTS)
    pixels = decode_latents(pipe, sample_latents(pipe, contract, steps, cond, SEEDS, encode_empty(pipe)))
    return {"pixels": to_uint8(pixels), "finite": bool(pixels.isfinite().all())}


def _unlike_base(pixels: Tensor, configuration: Configuration) -> list[int]:
    """How far each picture is from the bare pipeline's under the same contract; of a whole pipeline, from its base's.

    In grey levels, at most.
    """
    model, steps = configuration.model, configuration.steps
    bare = HUB_BASES[model.base] if model.kind == "base" else configuration.pipeline
    timesteps = {steps: model.contract.timesteps[steps]}
    plain = _plain(bare, replace(model.contract, timesteps=timesteps, embedded_guidance=None).to_json(), steps)
    unlike: list[int] = (pixels.int() - plain.int()).abs().flatten(1).amax(1).tolist()
    return unlike


@cache
def _plain(pipeline: str, contract: str, steps: int) -> Tensor:
    pixels: Tensor = _pictures(_pristine(pipeline), SamplerContract.from_json(contract), steps)["pixels"]
    return pixels


@contextmanager
def _watched(pipe: Pipeline) -> Iterator[dict[str, Any]]:
    """What the UNet is told, and the scheduler that is made, while pictures are."""
    seen: dict[str, Any] = {"told": [], "batch": [], "told_guidance": []}
    make = SamplerContract.make_scheduler

    def look(_: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        seen["told"].append(float(args[1]))
        seen["batch"].append(len(args[0]))
        seen["told_guidance"].append(kwargs.get("timestep_cond") is not None)

    def note(contract: SamplerContract, config: Mapping[str, Any]) -> Any:
        scheduler = make(contract, config)
        seen["scheduler"] = type(scheduler).__name__
        return scheduler

    hook = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    with patch.object(SamplerContract, "make_scheduler", note):
        yield seen
    hook.remove()


def _files(configuration: Configuration) -> dict[str, str]:
    model = configuration.model
    return {
        "model": model.name,
        "pipeline": str(base_folder(configuration.pipeline)),
        "weights": str(weights_path(model)) if model.weights else "",
    }


def _weights_off(configuration: Configuration, pipe: Pipeline) -> float:
    """How far the seated UNet's weights are from what they must be: the file's, or the base's and the LoRA's update."""
    model, state = configuration.model, pipe.unet.state_dict()
    wanted = dict(_pristine(configuration.pipeline).unet.state_dict())
    if model.kind == "unet":
        wanted = _tensors(weights_path(model))
    if model.kind == "lora":
        assert isinstance(model.weights, HubWeights)
        published = replace(model.weights, revision="main")
        for name, update in lora_updates(published, _pristine(configuration.pipeline).unet).items():
            wanted[f"{name}.weight"] = wanted[f"{name}.weight"] + model.contract.lora_scale * update
    assert wanted.keys() == state.keys()
    return max(float((state[key] - wanted[key].float()).abs().max()) for key in wanted)


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        path = path / "diffusion_pytorch_model.safetensors"
    if path.suffix == ".safetensors":
        return load_file(path)
    tensors: dict[str, Tensor] = torch.load(path, weights_only=True)
    return tensors


if __name__ == "__main__":
    main(Path(sys.argv[1]))
