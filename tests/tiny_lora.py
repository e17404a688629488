"""A random LoRA of a base, in diffusers' layout, with its contract and, if given, a card inside."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from hypersd_bench.pipelines import load_base
from hypersd_bench.sampling import CARD_KEY, METADATA_KEY, SamplerContract


def make_lora(base: Path, path: Path, contract: SamplerContract, card: object = None, scale: float = 4.0) -> Path:
    """Write a LoRA of rank 2 whose deltas are ``scale`` squared as strong as a random initialisation's."""
    torch.manual_seed(0)
    pipe = load_base(str(base))
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(path.parent, get_peft_model_state_dict(pipe.unet), weight_name=path.name)
    tensors = {key: tensor * scale for key, tensor in load_file(path).items()}
    told = {} if card is None else {CARD_KEY: json.dumps(card)}
    save_file(tensors, path, {METADATA_KEY: contract.to_json(), **told})
    return path
