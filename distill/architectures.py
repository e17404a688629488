"""A base's architecture from its configuration files alone; those of SD1.5 and SDXL are known here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.sources.sizes import EncodedShape
from hypersd_bench.errors import InputError, first_line
from hypersd_bench.pipelines import HUB_BASES
from hypersd_bench.pocket import WEIGHTS

Config = Mapping[str, Any]
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")

# What differs from the classes' defaults in the config.json files of the two repositories in HUB_BASES.
_SCHEDULER = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}  # fmt: skip
_VAE = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4, "layers_per_block": 2,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "latent_channels": 4, "norm_num_groups": 32,
}  # fmt: skip
_CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": 768,
}  # fmt: skip
_CLIP_BIG_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": 1280,
    "architectures": ["CLIPTextModelWithProjection"],
}  # fmt: skip
_SD15: dict[str, Config] = {
    "unet": {
        "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2, "attention_head_dim": 8, "cross_attention_dim": 768,
    },
    "vae": {**_VAE, "sample_size": 512, "scaling_factor": 0.18215},
    "text_encoder": _CLIP_L,
    "scheduler": _SCHEDULER,
}  # fmt: skip
_SDXL: dict[str, Config] = {
    "unet": {
        "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2, "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    "text_encoder": _CLIP_L,
    "text_encoder_2": _CLIP_BIG_G,
    "scheduler": _SCHEDULER,
}  # fmt: skip
KNOWN = {name: parts for short, parts in (("sd15", _SD15), ("sdxl", _SDXL)) for name in (short, HUB_BASES[short])}


@dataclass(frozen=True)
class Architecture:
    """The configurations of a base's parts, by the folders' names."""

    parts: Mapping[str, Config]

    @property
    def text_encoders(self) -> list[Config]:
        """One, or SDXL's two."""
        return [self.parts[name] for name in ("text_encoder", "text_encoder_2") if name in self.parts]

    @property
    def factor(self) -> int:
        """Pixels to one side of a latent."""
        factor: int = 2 ** (len(self.parts["vae"]["block_out_channels"]) - 1)
        return factor

    def encoded(self, resolution: int) -> EncodedShape:
        """What an image and a prompt become; resolution in pixels, 0 is the base's own."""
        unet = self.parts["unet"]
        second = self.parts.get("text_encoder_2")
        side = resolution // self.factor if resolution else int(unet["sample_size"])
        return EncodedShape(
            latent=(unet["in_channels"], side, side),
            tokens=self.parts["text_encoder"]["max_position_embeddings"],
            text_width=unet["cross_attention_dim"],
            pooled_width=second["projection_dim"] if second else 0,
        )


def find_architecture(base: str) -> Architecture:
    """The architecture of ``pocket``, a folder, or a hub id, of which only the configuration files are fetched."""
    folder = WEIGHTS / "base" if base == "pocket" else Path(base).expanduser()
    if folder.is_dir():
        return _read(base, folder)
    if base in KNOWN:
        return Architecture(KNOWN[base])
    return _read(base, _fetch(base))


def _read(base: str, folder: Path) -> Architecture:
    parts: dict[str, Config] = {}
    files = [(name, folder / name / "config.json") for name in PARTS]
    for name, path in [*files, ("scheduler", folder / "scheduler" / "scheduler_config.json")]:
        try:
            parts[name] = json.loads(path.read_text())
        except FileNotFoundError:
            if name != "text_encoder_2":
                raise InputError(f"base {base!r} is incomplete: {path} is missing") from None
        except ValueError as error:
            raise InputError(f"base {base!r} is damaged: {path} is not JSON; fetch it again") from error
    return Architecture(parts)


def _fetch(hub_id: str) -> Path:
    """A hub repository's configuration files, in the hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*/config.json", "scheduler/scheduler_config.json"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(
            f"the configuration of base {hub_id!r} can't be had from the hub: {first_line(error)}; give pocket, "
            f"{', '.join(HUB_BASES)} or a pipeline folder"
        ) from error
