"""What the catalogue of published checkpoints names, in miniature: each repository with its real files' names.

Everything follows from the catalogue, so that a new entry is there without being named here: a tiny pipeline of random
weights for every base and every pipeline of its own, a LoRA, a UNet file or a UNet folder for every entry's weights.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from distill.formats import to_kohya
from hypersd_bench import registry
from hypersd_bench.catalog.spec import HubWeights, ModelSpec
from hypersd_bench.pipelines import HUB_BASES
from tests.tiny_base import make_tiny_base
from tests.tiny_sdxl import make_tiny_sdxl

Files = dict[str, bytes]

ENTRIES: tuple[ModelSpec, ...] = tuple(
    model
    for row in registry.rows("family")
    for model in registry.resolve("family", row)()
    if model.base in HUB_BASES
)  # fmt: skip
LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
               "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")  # fmt: skip
RANK = 2
ALPHA = 1.0  # of kohya's files; the others have none, which means the rank
# How a LoRA's tensors are called: kohya's way with diffusers' or with Stability's blocks, or diffusers' old or new way.
# Repositories that are not named have one of diffusers' ways, by turns.
LAYOUTS = {
    "ByteDance/Hyper-SD": "kohya",
    "ByteDance/SDXL-Lightning": "stability",
    "latent-consistency/lcm-lora-sdxl": "kohya",
    "latent-consistency/lcm-lora-sdv1-5": "kohya",
    "wangfuyun/PCM_Weights": "kohya",
}
TOLD_GUIDANCE = {"time_cond_proj_dim": 256}  # of LCM's UNets
UNET = "unet/diffusion_pytorch_model"
# Copies, and parts that nobody here loads: in real repositories gigabytes.
UNUSED = (f"{UNET}.fp16.safetensors", f"{UNET}.non_ema.safetensors", "one_file.safetensors",
          "safety_checker/model.safetensors", "vae_1_0/diffusion_pytorch_model.safetensors")  # fmt: skip
_NOISE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
          "trained_betas": None}  # fmt: skip
_SD1_SCHEDULER = {"_class_name": "PNDMScheduler", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
                  "skip_prk_steps": True}  # fmt: skip
_SDXL_SCHEDULER = {"_class_name": "EulerDiscreteScheduler", "clip_sample": False, "interpolation_type": "linear",
                   "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False,
                   "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading",
                   "use_karras_sigmas": False}  # fmt: skip
SCHEDULERS: dict[str, dict[str, Any]] = {
    "stabilityai/sdxl-turbo": {
        "_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing", "steps_offset": 1,
    },
    "stabilityai/sd-turbo": {
        "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "steps_offset": 1,
    },
    "SimianLuo/LCM_Dreamshaper_v7": {
        "_class_name": "LCMScheduler", "clip_sample": False, "original_inference_steps": 50, "steps_offset": 1,
    },
}  # fmt: skip
# Of a pipeline of Stable Diffusion 1 or 2, beside the components: what nobody here loads.
_FEATURES = {"_class_name": "StableDiffusionPipeline", "feature_extractor": ["transformers", "CLIPImageProcessor"],
             "requires_safety_checker": True,
             "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}  # fmt: skip
INDICES: dict[str, dict[str, Any]] = {
    # a class that transformers has no longer, as in pipelines of 2023
    "Lykon/dreamshaper-7": {"feature_extractor": ["transformers", "CLIPFeatureExtractor"]},
    "SimianLuo/LCM_Dreamshaper_v7": {"_class_name": "LatentConsistencyModelPipeline"},
}


def runs_in(model: ModelSpec) -> str:
    """The repository of the pipeline that an entry is sampled in."""
    return model.pipeline or HUB_BASES[model.base]


def repositories(folder: Path) -> dict[str, Files]:
    """All repositories, by id; ``folder`` is for building."""
    found: dict[str, Files] = {}
    for base, repo in HUB_BASES.items():
        found[repo] = _pipeline(base, repo, folder)
    for model in ENTRIES:
        if runs_in(model) not in found:
            told = TOLD_GUIDANCE if model.contract.embedded_guidance else {}
            found[runs_in(model)] = _pipeline(model.base, runs_in(model), folder, told)
        if isinstance(model.weights, HubWeights):
            unet = _read_unet(found[runs_in(model)])
            found.setdefault(model.weights.repo, {}).update(_weights(model, model.weights, unet))
    return found


def lora_layers(weights: HubWeights, unet: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The layers (A, B) of a LoRA file by module, float32; strong enough that a layer left out shows."""
    generator = torch.Generator().manual_seed(_seed(str(weights)))
    dtype = _dtype(weights)
    layers = {}
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and name.endswith(LORA_LAYERS):
            weight = module.weight
            a = torch.randn(RANK, *weight.shape[1:], generator=generator) / weight[0].numel() ** 0.5
            b = 0.3 * torch.randn(len(weight), RANK, *(1,) * (weight.ndim - 2), generator=generator)
            layers[name] = a.to(dtype).float(), b.to(dtype).float()
    return layers


def lora_updates(weights: HubWeights, unet: nn.Module) -> dict[str, Tensor]:
    """What a LoRA file adds to the UNet's weights at scale 1, by module: (alpha / rank) B A."""
    scale = ALPHA / RANK if layout(weights.repo) in ("kohya", "stability") else 1.0
    return {
        name: scale * (b.flatten(1) @ a.flatten(1)).reshape(len(b), *a.shape[1:])
        for name, (a, b) in lora_layers(weights, unet).items()
    }


def layout(repo: str) -> str:
    """How the tensors of a repository's LoRAs are called."""
    return LAYOUTS.get(repo) or ("peft", "diffusers")[_seed(repo) % 2]


def _pipeline(base: str, repo: str, folder: Path, changes: Mapping[str, Any] | None = None) -> Files:
    """A whole pipeline's repository: random weights of its own, and what real ones hold beside them."""
    files = dict(_tiny(base, folder))
    config = json.loads(files["unet/config.json"])
    # Stable Diffusion 2 has linear projections around its attention, 1 has convolutions
    unet = _new_unet({**config, "use_linear_projection": base != "sd15", **(changes or {})}, repo)
    files["unet/config.json"] = unet.to_json_string().encode()
    files[f"{UNET}.safetensors"] = to_safetensors(unet.state_dict())
    files |= dict.fromkeys(UNUSED, b"not asked for")
    own = SCHEDULERS.get(repo, _SDXL_SCHEDULER if base == "sdxl" else _SD1_SCHEDULER)
    files["scheduler/scheduler_config.json"] = json.dumps({**_NOISE, **own}).encode()
    index = json.loads(files["model_index.json"])
    if base != "sdxl":
        index |= _FEATURES
        files["feature_extractor/preprocessor_config.json"] = b'{"size": 224, "crop_size": 224}'
    index |= {"scheduler": ["diffusers", own["_class_name"]], **INDICES.get(repo, {})}
    return {**files, "model_index.json": json.dumps(index).encode(), "README.md": b"# A model"}


@cache
def _tiny(base: str, folder: Path) -> Files:
    make = make_tiny_sdxl if base == "sdxl" else make_tiny_base
    made = make(folder / base / "pipeline")
    return {str(path.relative_to(made)): path.read_bytes() for path in sorted(made.rglob("*")) if path.is_file()}


def _read_unet(files: Files) -> UNet2DConditionModel:
    unet: UNet2DConditionModel = UNet2DConditionModel.from_config(json.loads(files["unet/config.json"]))
    unet.load_state_dict(from_safetensors(files[f"{UNET}.safetensors"]))
    return unet


def _new_unet(config: Mapping[str, Any], name: str) -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(_seed(name))
        unet: UNet2DConditionModel = UNet2DConditionModel.from_config(config)
    return unet


def _weights(model: ModelSpec, weights: HubWeights, unet: UNet2DConditionModel) -> Files:
    """The files of an entry's own weights, for the UNet that it was made from."""
    if weights.is_folder:
        told = TOLD_GUIDANCE if model.contract.embedded_guidance else {}
        own = _new_unet({**unet.config, **told}, str(weights))
        name = f"{weights.file}/diffusion_pytorch_model".lstrip("/")
        return {
            f"{weights.file}/config.json".lstrip("/"): own.to_json_string().encode(),
            f"{name}.safetensors": to_safetensors(own.state_dict()),
            f"{name}.fp16.safetensors": b"not asked for",
            "lora.safetensors": b"not asked for",
            "README.md": b"# A model",
        }
    tensors = _lora(weights, unet) if model.kind == "lora" else _changed(unet.state_dict(), weights)
    tensors = {key: value.to(_dtype(weights)).contiguous() for key, value in tensors.items()}
    if weights.file.endswith(".safetensors"):
        return {weights.file: to_safetensors(tensors)}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return {weights.file: buffer.getvalue()}


def _changed(state: Mapping[str, Tensor], weights: HubWeights) -> dict[str, Tensor]:
    """A UNet's weights after a training: each moved by a third of its spread."""
    generator = torch.Generator().manual_seed(_seed(str(weights)))
    return {
        key: value + value.std(correction=0) / 3 * torch.randn(value.shape, generator=generator)
        for key, value in state.items()
    }


def _lora(weights: HubWeights, unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """A LoRA's tensors under the names of its layout."""
    layers, way = lora_layers(weights, unet), layout(weights.repo)
    if way == "kohya":
        named = {f"lora_unet_{name.replace('.', '_')}": pair for name, pair in layers.items()}
        down = {f"{name}.lora_down.weight": a for name, (a, _) in named.items()}
        up = {f"{name}.lora_up.weight": b for name, (_, b) in named.items()}
        return {**down, **up, **{f"{name}.alpha": torch.tensor(ALPHA) for name in named}}
    endings = ("lora.down", "lora.up") if way == "diffusers" else ("lora_A", "lora_B")
    tensors = {f"unet.{name}.{endings[i]}.weight": pair[i] for name, pair in layers.items() for i in (0, 1)}
    if way == "stability":
        renamed = to_kohya(tensors, unet.config)
        return {key: torch.tensor(ALPHA) if key.endswith(".alpha") else value for key, value in renamed.items()}
    return tensors


def _dtype(weights: HubWeights) -> torch.dtype:
    return torch.float16 if "fp16" in weights.file else torch.float32


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
