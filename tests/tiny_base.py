"""A tiny random base in the miniature's layout, for tests that need every component but no quality."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from hypersd_bench.pocket.teacher import new_scheduler, new_text_encoder, new_unet
from hypersd_bench.pocket.tokenizer import build_tokenizer


def make_tiny_base(folder: Path) -> Path:
    """Write a pipeline folder of about 0.3 M random parameters: 64x64 pixels, 8x8 latents of 4 channels."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(folder.parent / "tokenizer-source")
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.0,
    )
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=new_text_encoder(tokenizer), tokenizer=tokenizer,
        unet=new_unet((16, 32), latent_channels=4), scheduler=new_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder
