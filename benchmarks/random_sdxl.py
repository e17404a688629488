"""A pipeline of SDXL's architecture with random weights, for speed and memory where no weights can be had."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from distill.architectures import Config, find_architecture
from hypersd_bench.pocket.tokenizer import build_tokenizer


def make_random_sdxl(folder: Path) -> Path:
    """Write the pipeline's folder in float16: about 7 GB."""
    source = folder.parent / "tokenizer-source"
    build_tokenizer(source)
    tokenizer = CLIPTokenizer.from_pretrained(source, model_max_length=77)
    parts = find_architecture("sdxl").parts
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        pipe = StableDiffusionXLPipeline(
            vae=AutoencoderKL(**parts["vae"]),
            text_encoder=CLIPTextModel(_text_config(parts["text_encoder"], tokenizer)),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(parts["text_encoder_2"], tokenizer)),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=UNet2DConditionModel(**parts["unet"]),
            scheduler=EulerDiscreteScheduler(**parts["scheduler"]),
            add_watermarker=False,
        )
    finally:
        torch.set_default_dtype(before)
    pipe.save_pretrained(folder)
    return folder


def _text_config(config: Config, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CLIPTextConfig(**{key: value for key, value in config.items() if key != "architectures"}, **ids)
