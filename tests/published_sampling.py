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
SEEDS = [image_seed(0, str(i), 0) for i in range(len(PROMPTS))]


def main(folder: Path) -> None:
    """Sample all of them, pipeline by pipeline."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    found: dict[str, Any] = {}
    pictures: dict[str, np.ndarray[Any, Any]] = {}
    for pipeline in dict.fromkeys(map(runs_in, ENTRIES)):
        _sample_pipeline([model for model in ENTRIES if runs_in(model) == pipeline], folder, found, pictures)
    (folder / "found.json").write_text(json.dumps(found))
    np.savez(folder / "pictures.npz", allow_pickle=False, **pictures)  # type: ignore[arg-type]


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
            unlike = (made["pixels"].int() - _plain_pixels(configuration).int()).abs().flatten(1).amax(1)
            name = f"{model.base}/{model.name}/{steps}"
            pictures[name] = made["pixels"].numpy()
            found[name] = {
                **seen,
                **_files(configuration),
                "weights_off": _weights_off(configuration, pipe),
                "finite": made["finite"],
                "contrast": (made["pixels"].flatten(1).amax(1) - made["pixels"].flatten(1).amin(1)).tolist(),
                "unlike_base": unlike.tolist(),
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


def _plain_pixels(configuration: Configuration) -> Tensor:
    """What the bare pipeline gives under the same contract; of a pipeline of its own, its base's."""
    model, steps = configuration.model, configuration.steps
    bare = HUB_BASES[model.base] if model.kind == "base" else configuration.pipeline
    timesteps = {steps: model.contract.timesteps[steps]}
    return _plain(bare, replace(model.contract, timesteps=timesteps, embedded_guidance=None).to_json(), steps)


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
    SamplerContract.make_scheduler = note  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        hook.remove()
        SamplerContract.make_scheduler = make  # type: ignore[method-assign]


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
