"""LoRA tensors in the two key styles there are, with what each style keeps in its metadata.

diffusers   unet.down_blocks.1.attentions.0.proj_in.lora_A.weight (r, in), .lora_B.weight (out, r)
kohya       lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight, .lora_up.weight, .alpha

A layer's update is (alpha / r) B A; here alpha is always r. kohya's and ComfyUI's own SDXL files name the blocks as
Stability's code does (input_blocks, middle_block, output_blocks), their SD1.5 files as diffusers does.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from diffusers import StableDiffusionXLPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from safetensors.torch import save as to_safetensors
from torch import Tensor

from hypersd_bench.errors import InputError
from hypersd_bench.sampling import SamplerContract

Lora = Mapping[str, Tensor]

_A, _B = ".lora_A.weight", ".lora_B.weight"
_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
           "conv_shortcut": "skip_connection"}  # fmt: skip
_OUTSIDE_BLOCKS = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
                   "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
                   "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip
_MIDDLE = {("resnets", 0): 0, ("attentions", 0): 1, ("resnets", 1): 2}


def is_sdxl(unet_config: Mapping[str, Any]) -> bool:
    """Whether a UNet takes SDXL's pooled text and time ids."""
    return unet_config.get("addition_embed_type") == "text_time"


def layers(lora: Lora) -> dict[str, tuple[Tensor, Tensor]]:
    """The pairs (A, B) by module; raises InputError for tensors that are no such pair."""
    pairs = {}
    for key in lora:
        module = key.removesuffix(_A).removesuffix(_B)
        if module == key:
            raise InputError(f"{key!r} is no plain LoRA tensor (expected ...{_A} or ...{_B}); export the LoRA again")
        if module + _A not in lora or module + _B not in lora:
            raise InputError(f"layer {module!r} has only one of lora_A and lora_B; export the LoRA again")
        pairs[module] = lora[module + _A], lora[module + _B]
    return pairs


def ranks(lora: Lora) -> set[int]:
    """The ranks of the layers: one number in every LoRA that ``distill`` makes."""
    return {len(a) for a, _ in layers(lora).values()}


def to_kohya(lora: Lora, unet_config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename from diffusers' keys and add each layer's alpha (its rank, so that the scale is 1)."""
    layers(lora)
    if is_sdxl(unet_config):
        depth = int(unet_config["layers_per_block"])
        lora = {_sgm_key(key, depth): value for key, value in lora.items()}
    converted: dict[str, Tensor] = convert_state_dict_to_kohya(dict(lora))
    # float32, as alphas are in the wild: a loader that divides integers would round
    return {key: value.float() if key.endswith(".alpha") else value for key, value in converted.items()}


def from_kohya(tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename to diffusers' keys; a layer whose alpha is not its rank gets the scale multiplied into B."""
    scaled = dict(tensors)
    for key in [key for key in tensors if key.endswith(".alpha")]:
        module = key.removesuffix(".alpha")
        try:
            rank = len(tensors[f"{module}.lora_down.weight"])
            scale = float(tensors[key]) / rank
            if scale != 1:
                scaled[f"{module}.lora_up.weight"] = tensors[f"{module}.lora_up.weight"] * scale
        except KeyError as error:
            raise InputError(f"layer {module!r} has an alpha but no {error}; export the LoRA again") from error
    try:
        state, _ = StableDiffusionXLPipeline.lora_state_dict(scaled, unet_config=FrozenDict(unet_config))
        converted: dict[str, Tensor] = convert_unet_state_dict_to_peft(state)
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(f"these are not kohya's keys of a UNet LoRA: {error}") from error
    layers(converted)
    return converted


def architecture(unet_config: Mapping[str, Any]) -> str:
    """The architecture's id in the ModelSpec standard; the miniature's code path is Stable Diffusion 1's."""
    if is_sdxl(unet_config):
        return "stable-diffusion-xl-v1-base"
    return "stable-diffusion-v2-512" if unet_config.get("cross_attention_dim") == 1024 else "stable-diffusion-v1"


def model_spec(
    title: str, unet_config: Mapping[str, Any], contract: SamplerContract, form: str, resolution: int, created: str
) -> dict[str, str]:
    """ModelSpec 1.0.1's keys (``modelspec.*``) that user interfaces show; ``resolution`` is the image's side."""
    steps = ", ".join(str(count) for count in sorted(contract.timesteps))
    eta = "" if contract.eta is None else f", eta {contract.eta:g}"
    stability = form == "kohya" and is_sdxl(unet_config)
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture(unet_config) + ("" if form == "unet" else "/lora"),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models" if stability else "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.date": created,
        "modelspec.prediction_type": "v" if contract.prediction_type == "v_prediction" else contract.prediction_type,
        "modelspec.usage_hint": f"{contract.scheduler}; steps: {steps}; guidance {contract.guidance_scale:g}{eta}",
    }


def kohya_metadata(name: str, lora: Lora, unet_config: Mapping[str, Any]) -> dict[str, str]:
    """What kohya's trainer writes about a LoRA and user interfaces read (``ss_*``); ``lora`` has diffusers' keys."""
    found = ranks(lora)
    rank = str(found.pop()) if len(found) == 1 else "Dynamic"  # kohya's word for ranks that differ
    convolutions = any(a.ndim == 4 and a.shape[-1] > 1 for a, _ in layers(lora).values())
    v2 = architecture(unet_config).startswith("stable-diffusion-v2")
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_network_args": json.dumps({"conv_dim": rank, "conv_alpha": rank} if convolutions else {}),
        "ss_base_model_version": "sdxl_base_v1-0" if is_sdxl(unet_config) else "sd_v2" if v2 else "sd_v1",
        "ss_v2": str(v2),
        "ss_output_name": name,
    }


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """ModelSpec's hash: of the tensors' bytes as a safetensors file lays them out, whatever the metadata."""
    data = to_safetensors(dict(tensors))
    start = 8 + int.from_bytes(data[:8], "little")
    return f"0x{hashlib.sha256(memoryview(data)[start:]).hexdigest()}"


def _sgm_key(key: str, layers_per_block: int) -> str:
    """unet.<module in diffusers' name>.lora_X.weight with the module in Stability's name."""
    match = re.fullmatch(r"unet\.(.+)(\.lora_[AB]\.weight)", key)
    if match is None:
        raise InputError(f"{key!r} is no LoRA tensor of a UNet; only those have names in kohya's SDXL files")
    return f"unet.{_sgm_module(match[1], layers_per_block)}{match[2]}"


def _sgm_module(module: str, layers_per_block: int) -> str:
    """A module's name in Stability's code, which numbers a side's layers through instead of block by block."""
    if module in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[module]
    match = re.fullmatch(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)", module)
    if match is None:
        raise InputError(f"layer {module!r} has no name in kohya's SDXL files; leave it out of the LoRA")
    side, kind, inside = match[1], match[3], match[5]
    block, layer = int(match[2] or 0), int(match[4])
    if kind == "resnets":
        inside = _RESNET[inside]
    stride = layers_per_block + 1  # going down, the downsampler is a layer of its own; going up, a block has one more
    if side == "mid":
        return f"middle_block.{_MIDDLE[kind, layer]}.{inside}"
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * stride}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{block * stride + layers_per_block}.2.{inside}"
    position = {"resnets": 0, "attentions": 1}[kind]
    first = "input_blocks" if side == "down" else "output_blocks"
    index = block * stride + layer + (side == "down")  # input_blocks.0 is conv_in
    return f"{first}.{index}.{position}.{inside}"
