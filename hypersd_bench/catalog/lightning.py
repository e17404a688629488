"""SDXL-Lightning (arXiv 2402.13929): UNets and LoRAs for exactly 2, 4 and 8 steps, and a one-step UNet."""

from __future__ import annotations

from dataclasses import replace

from hypersd_bench.catalog.published import published
from hypersd_bench.catalog.spec import HubWeights, Kind, ModelSpec
from hypersd_bench.sampling import SamplerContract, euler_trailing

REPO = "ByteDance/SDXL-Lightning"
LICENSE = "Open RAIL++-M"


def models() -> list[ModelSpec]:
    """UNets (``lightning``) and LoRAs (``lightning-lora``)."""
    predicts_x0 = replace(euler_trailing((1,)), prediction_type="sample")
    return [
        _model("lightning", "unet", 1, predicts_x0, "1step_unet_x0"),
        *(_model("lightning", "unet", n, euler_trailing((n,)), f"{n}step_unet") for n in (2, 4, 8)),
        *(_model("lightning-lora", "lora", n, euler_trailing((n,)), f"{n}step_lora") for n in (2, 4, 8)),
    ]


def _model(family: str, kind: Kind, steps: int, contract: SamplerContract, file: str) -> ModelSpec:
    return ModelSpec(
        name=f"sdxl-lightning-{steps}step-{kind}",
        family=family,
        base="sdxl",
        kind=kind,
        contract=contract,
        weights=HubWeights(REPO, f"sdxl_lightning_{file}.safetensors"),
        license=LICENSE,
        published=published("sdxl", family, (steps,)),
    )
