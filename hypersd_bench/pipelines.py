"""ModelSpec to a ready diffusers pipeline, and the one way an image is sampled from it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from hypersd_bench.catalog.spec import ModelSpec
from hypersd_bench.errors import InputError
from hypersd_bench.pocket import WEIGHTS
from hypersd_bench.sampling import SamplerContract, read_safetensors_metadata
from hypersd_bench.seeding import generators, starting_noise

COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def base_folder(base: str) -> Path:
    """Where a base's pipeline folder lies: ``pocket`` is the shipped miniature, anything else a path."""
    folder = WEIGHTS / "base" if base == "pocket" else Path(base).expanduser()
    if not (folder / "model_index.json").is_file():
        remedy = "build it with: hypersd-bench pocket build" if base == "pocket" else "give 'pocket' or such a folder"
        raise InputError(f"base {base!r}: {folder} is not a diffusers pipeline folder (no model_index.json); {remedy}")
    missing = [name for name in COMPONENTS if not (folder / name).is_dir()]
    if missing:
        raise InputError(f"base {base!r} is incomplete: {folder} lacks {', '.join(missing)}")
    for weights in sorted(folder.glob("*/*.safetensors")):
        read_safetensors_metadata(weights)  # a truncated file is named here, not deep inside a loader
    return folder


def load_base(base: str, device: str | torch.device = "cpu") -> StableDiffusionPipeline:
    """Load a base pipeline in float32 for evaluation; raises InputError naming what is missing."""
    folder = base_folder(base)
    try:
        pipe: StableDiffusionPipeline = StableDiffusionPipeline.from_pretrained(
            folder, safety_checker=None, requires_safety_checker=False, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"base {base!r} can't be loaded from {folder}: {first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        model.eval().requires_grad_(False)
    if torch.device(device).type == "cpu":  # PyTorch's fused attention is slow on a CPU, its backward above all
        pipe.unet.set_attn_processor(AttnProcessor())
    return pipe.to(device)


def with_model(base: StableDiffusionPipeline, model: ModelSpec) -> StableDiffusionPipeline:
    """A pipeline that samples as ``model``: its LoRA fused into a copy of the base's UNet, all else shared.

    The base itself is never touched: fusing and unfusing would leave rounding behind, and the pictures would depend
    on which models came before.
    """
    if model.kind == "base":
        return base
    assert model.weights is not None
    read_safetensors_metadata(model.weights)
    components = {**base.components, "unet": copy.deepcopy(base.unet)}
    pipe: StableDiffusionPipeline = StableDiffusionPipeline(**components, requires_safety_checker=False)
    try:
        pipe.load_lora_weights(model.weights.parent, weight_name=model.weights.name)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        problem = f"{model.name}: {model.weights} does not fit base {model.base!r}"
        raise InputError(f"{problem}: {first_line(error)}") from error
    pipe.fuse_lora(lora_scale=model.contract.lora_scale)
    pipe.unload_lora_weights()
    return pipe


def encode_prompts(pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """Encode prompts as the pipeline does: (N, tokens, width) float32 on the pipeline's device."""
    embeds, _ = pipe.encode_prompt(list(prompts), pipe.device, 1, do_classifier_free_guidance=False)
    result: Tensor = embeds
    return result


@torch.no_grad()
def sample_latents(
    pipe: StableDiffusionPipeline,
    contract: SamplerContract,
    steps: int,
    prompt_embeds: Tensor,
    seeds: Sequence[int],
    empty_embeds: Tensor | None = None,
) -> Tensor:
    """Sample clean latents (N, C, h, w) under a contract; image i's noise comes from ``seeds[i]`` alone.

    ``empty_embeds`` (1, tokens, width) is the encoded empty prompt, needed when the contract's guidance is above 1.
    """
    scheduler: Any = contract.make_scheduler(pipe.scheduler.config)
    contract.set_timesteps(scheduler, steps)
    image_generators = generators(seeds)
    size = pipe.unet.config.sample_size
    noise = starting_noise(image_generators, (pipe.unet.config.in_channels, size, size))
    x = noise.to(pipe.device) * scheduler.init_noise_sigma
    guided = contract.guidance_scale > 1
    if guided:
        assert empty_embeds is not None
        prompt_embeds = torch.cat([empty_embeds.expand_as(prompt_embeds), prompt_embeds])
    options: dict[str, Any] = {} if contract.eta is None else {"eta": contract.eta}
    if contract.scheduler != "DDIMScheduler" or contract.eta:
        options["generator"] = image_generators
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
        eps = pipe.unet(x_in, t, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
        if guided:
            eps_u, eps_c = eps.chunk(2)
            eps = eps_u + contract.guidance_scale * (eps_c - eps_u)
        x = scheduler.step(eps, t, x, return_dict=False, **options)[0]
    latents: Tensor = x
    return latents


@torch.no_grad()
def decode_latents(pipe: StableDiffusionPipeline, latents: Tensor) -> Tensor:
    """Decode latents to pixels in [0, 1]: (N, 3, H, W) float32 on the CPU, not clipped, non-finite values kept."""
    pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    decoded: Tensor = (pixels.float() / 2 + 0.5).cpu()
    return decoded


def to_uint8(pixels: Tensor) -> Tensor:
    """(N, 3, H, W) in [0, 1] to uint8, rounded as diffusers rounds."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def sample(
    pipe: StableDiffusionPipeline,
    contract: SamplerContract,
    steps: int,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int = 64,
) -> Tensor:
    """Prompts and seeds to images (N, 3, H, W) uint8 on the CPU."""
    empty = encode_prompts(pipe, [""]) if contract.guidance_scale > 1 else None
    images = []
    for i in range(0, len(prompts), batch_size):
        embeds = encode_prompts(pipe, prompts[i : i + batch_size])
        latents = sample_latents(pipe, contract, steps, embeds, seeds[i : i + batch_size], empty)
        images.append(to_uint8(decode_latents(pipe, latents)))
    return torch.cat(images)


def first_line(error: Exception) -> str:
    """An exception's first line, for a one-line message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
