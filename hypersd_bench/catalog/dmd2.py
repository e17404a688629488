"""DMD2 (arXiv 2405.14867): SDXL UNets for 4 steps and for one, and a 4-step LoRA.

LCMScheduler does what DMD2 does at each step, predict x0 and add noise anew, but at its own timesteps: DMD2's are told.
"""

from __future__ import annotations

from collections.abc import Mapping

from hypersd_bench.catalog.published import published
from hypersd_bench.catalog.spec import HubWeights, Kind, ModelSpec
from hypersd_bench.sampling import SamplerContract

REPO = "tianweiy/DMD2"
LICENSE = "CC BY-NC 4.0 (weights), CC BY-NC-SA 4.0 (code)"
FOUR_STEPS = {4: (999, 749, 499, 249)}
ONE_STEP = {1: (399,)}


def models() -> list[ModelSpec]:
    """UNets (``dmd2``) and the LoRA (``dmd2-lora``), which is scaled down on fine-tuned bases."""
    return [
        # The repository has the 4-step UNet as .bin and as .safetensors, the one-step UNet as a pickle only.
        _model("dmd2", "unet", FOUR_STEPS, "dmd2_sdxl_4step_unet_fp16.safetensors"),
        _model("dmd2", "unet", ONE_STEP, "dmd2_sdxl_1step_unet_fp16.bin"),
        _model("dmd2-lora", "lora", FOUR_STEPS, "dmd2_sdxl_4step_lora_fp16.safetensors", {"lora_scale": (0.5, 1.0)}),
    ]


def _model(
    family: str,
    kind: Kind,
    timesteps: Mapping[int, tuple[int, ...]],
    file: str,
    allowed: dict[str, tuple[float, float]] | None = None,
) -> ModelSpec:
    (steps,) = timesteps
    return ModelSpec(
        name=f"dmd2-sdxl-{steps}step-{kind}",
        family=family,
        base="sdxl",
        kind=kind,
        contract=SamplerContract("LCMScheduler", timesteps=timesteps),
        weights=HubWeights(REPO, file),
        license=LICENSE,
        allowed=allowed or {},
        published=published("sdxl", family, timesteps),
    )
