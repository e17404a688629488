"""Stage ``teacher``: a small UNet2DConditionModel and CLIPTextModel on the autoencoder's latents.

Noise prediction on Stable Diffusion's schedule, with min-SNR weighting (Hang et al. 2303.09556, gamma 5) and 10 %
empty captions for classifier-free guidance. Text encoder and UNet are trained together.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hypersd_bench.pocket.scenes import scenes
from hypersd_bench.pocket.tokenizer import MAX_LENGTH
from hypersd_bench.pocket.training import Schedule, fast_bf16, fit, scene_pool, to_unit

TEXT_WIDTH = 128
EMPTY_CAPTIONS = 0.1
MIN_SNR_GAMMA = 5.0


def new_unet(channels: tuple[int, ...] = (96, 160), latent_channels: int = 16) -> UNet2DConditionModel:
    """An untrained UNet on 8x8 latents."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained two-layer CLIP text encoder."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    return CLIPTextModel(config)


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing",
    )  # fmt: skip


def train_teacher(
    folder: Path,
    schedule: Schedule,
    pool_size: int,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    device: torch.device,
) -> tuple[StableDiffusionPipeline, dict[str, Any]]:
    """Train UNet and text encoder on rendered scenes; returns the whole pipeline and the facts of the training."""
    latents = encode_pool(folder, pool_size, vae, device)
    tokens = tokenize([scene.caption for scene in scenes(0, pool_size)], tokenizer)
    empty = tokenize([""], tokenizer)[0]
    torch.manual_seed(0)
    unet, text_encoder = new_unet().to(device), new_text_encoder(tokenizer).to(device)
    models = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    unet.set_attn_processor(AttnProcessor())  # on 8x8 latents the fused kernel's backward is 3x slower
    scheduler = new_scheduler()
    abar = scheduler.alphas_cumprod.to(device)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([step, 3])
        picked = np.sort(rng.integers(pool_size, size=schedule.batch_size))
        z = torch.from_numpy(latents[picked]).to(device).float()
        ids = tokens[picked].clone()
        ids[torch.from_numpy(rng.random(len(picked)) < EMPTY_CAPTIONS)] = empty
        t = torch.from_numpy(rng.integers(1000, size=len(picked))).to(device)
        eps = torch.from_numpy(rng.standard_normal(z.shape, dtype=np.float32)).to(device)
        alpha, sigma = abar[t].sqrt()[:, None, None, None], (1 - abar[t]).sqrt()[:, None, None, None]
        context = text_encoder(ids.to(device)).last_hidden_state
        predicted = unet(alpha * z + sigma * eps, t, context).sample.float()
        snr = abar[t] / (1 - abar[t])
        weight = torch.clamp(MIN_SNR_GAMMA / snr, max=1.0)
        per_image = (predicted - eps).square().mean((1, 2, 3))
        return (weight * per_image).mean(), {"mse": float(per_image.detach().mean())}

    facts = fit("teacher", models, loss_at, schedule, folder, device)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return pipeline, facts


def tokenize(captions: list[str], tokenizer: CLIPTokenizer) -> Tensor:
    """Captions to (N, 16) token ids, padded as the pipeline pads them."""
    encoded = tokenizer(captions, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    ids: Tensor = encoded.input_ids
    return ids


@torch.no_grad()
def encode_pool(folder: Path, count: int, vae: AutoencoderKL, device: torch.device) -> NDArray[np.float16]:
    """Encode the pool of scenes once and keep it: (count, 16, 8, 8) float16 latent means, memory-mapped."""
    path = folder / f"latents-{count}.npy"
    if not path.exists():
        pool = scene_pool(folder, count)
        parts = []
        with torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device)):
            for i in tqdm(range(0, count, 128), desc="pocket latents", unit="batch"):
                mean = vae.encode(to_unit(pool[i : i + 128], device)).latent_dist.mean
                parts.append(mean.to("cpu", torch.float16).numpy())
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, np.concatenate(parts))
        os.replace(partial, path)
    stored: NDArray[np.float16] = np.load(path, mmap_mode="r")
    return stored
