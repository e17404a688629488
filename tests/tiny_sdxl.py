"""A tiny random base in SDXL's layout: two tokenizers, two text encoders, pooled embeddings and size time ids."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hypersd_bench.pocket.tokenizer import MAX_LENGTH, build_tokenizer

WIDTHS = (16, 24)  # of the two text encoders; the UNet attends to both, side by side
POOLED = 24  # of the second encoder's projection
TIME_WIDTH = 8  # of each of the six time ids' embedding


def make_tiny_sdxl(folder: Path) -> Path:
    """Write a pipeline folder of about 0.4 M random parameters: 64x64 pixels, 8x8 latents of 4 channels."""
    torch.manual_seed(0)
    source = folder.parent / "tokenizer-source"
    tokenizer = build_tokenizer(source)
    tokenizer_2 = CLIPTokenizer.from_pretrained(source, pad_token="!")  # as in SDXL, the second pads with another token
    pipe = StableDiffusionXLPipeline(
        vae=_new_vae(), text_encoder=CLIPTextModel(_text_config(tokenizer, WIDTHS[0], "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer_2, WIDTHS[1], "gelu")),
        tokenizer=tokenizer, tokenizer_2=tokenizer_2, unet=_new_unet(), scheduler=_new_scheduler(),
        force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def _new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.13025,
        force_upcast=True,
    )


def _new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=sum(WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=POOLED + 6 * TIME_WIDTH,
        norm_num_groups=8,
    )


def _text_config(tokenizer: CLIPTokenizer, width: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=POOLED,
        num_hidden_layers=3,  # the pipeline reads the last but one
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _new_scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        steps_offset=1, timestep_spacing="leading", prediction_type="epsilon", interpolation_type="linear",
        use_karras_sigmas=False,
    )  # fmt: skip
