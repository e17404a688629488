"""Latent consistency models (arXiv 2310.04378) and LCM-LoRA (arXiv 2311.05556)."""

from __future__ import annotations

from hypersd_bench.catalog.published import published
from hypersd_bench.catalog.spec import HubWeights, ModelSpec
from hypersd_bench.sampling import lcm

LORA_STEPS = tuple(range(2, 9))
UNET_GUIDANCE = 8.0  # told to the UNet as w = 7
LORA_FILE = "pytorch_lora_weights.safetensors"


def models() -> list[ModelSpec]:
    """LoRAs, sampled without guidance (``lcm``), and full UNets, which are told it (``lcm-unet``)."""
    return [
        _lora("sdxl", "latent-consistency/lcm-lora-sdxl"),
        _lora("sd15", "latent-consistency/lcm-lora-sdv1-5"),
        ModelSpec(
            name="lcm-sdxl-unet",
            family="lcm-unet",
            base="sdxl",
            kind="unet",
            contract=lcm(LORA_STEPS, UNET_GUIDANCE),
            weights=HubWeights("latent-consistency/lcm-sdxl"),
            license="Open RAIL++-M",
            allowed={"embedded_guidance": (3.0, 13.0)},
            published=published("sdxl", "lcm-unet", LORA_STEPS),
        ),
        ModelSpec(
            name="lcm-dreamshaper-v7",
            family="lcm-unet",
            base="sd15",
            kind="base",
            contract=lcm(tuple(range(1, 9)), UNET_GUIDANCE),
            pipeline="SimianLuo/LCM_Dreamshaper_v7",
            license="MIT",
            allowed={"embedded_guidance": (3.0, 13.0)},
            unconfirmed="guidance: 8 is that of community scripts, its range that of lcm-sdxl",
        ),
    ]


def _lora(base: str, repo: str) -> ModelSpec:
    return ModelSpec(
        name=repo.rpartition("/")[2],
        family="lcm",
        base=base,
        kind="lora",
        contract=lcm(LORA_STEPS),
        weights=HubWeights(repo, LORA_FILE),
        license="Open RAIL++-M",
        allowed={"guidance_scale": (1.0, 2.0)},
        published=published(base, "lcm", LORA_STEPS),
    )
