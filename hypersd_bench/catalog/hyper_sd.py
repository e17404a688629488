"""Hyper-SD (arXiv 2404.13686): LoRAs for 2, 4 and 8 steps, the unified LoRA, the one-step UNet, LoRAs that keep CFG.

How they are sampled is what the model card of ByteDance/Hyper-SD says, but for the CFG-preserving LoRAs, of which it
gives the guidance (5 to 8) and no sampler.
"""

from __future__ import annotations

from hypersd_bench.catalog.published import published
from hypersd_bench.catalog.spec import HubWeights, Kind, ModelSpec
from hypersd_bench.sampling import SamplerContract, ddim_trailing, tcd

REPO = "ByteDance/Hyper-SD"
FILES = {"sdxl": "Hyper-SDXL", "sd15": "Hyper-SD15"}  # how their files' names begin
LICENSE = "see the model card (Open RAIL++-M at first; the licence file changed in August and December 2024)"
# Human feedback learning optimised these two. The paper doesn't say which LAION predictor it means.
TRAINED_ON = ("aesthetic/laion-v1", "aesthetic/laion-v2", "image-reward/v1")  # which V is not said
WHICH_PREDICTOR = "which LAION aesthetic predictor it was trained on"
CFG_GUIDANCE = (5.0, 8.0)  # the authors' range, of which we take the lower end
UNIFIED_STEPS = tuple(range(1, 9))


def models() -> list[ModelSpec]:
    """Every released checkpoint for SDXL and SD1.5."""
    return [model for base in FILES for model in _of(base)]


def _of(base: str) -> list[ModelSpec]:
    unified, eta = "1step-lora", {"eta": (0.0, 1.0)}
    one_step = (
        _model(base, "hyper-sd", "1step-unet", _one_step_unet(), file="1step-Unet", kind="unet")
        if base == "sdxl"
        else _model(base, "hyper-sd", unified, tcd((1,), eta=1.0), file=unified, allowed=eta)
    )
    return [
        one_step,
        *(_model(base, "hyper-sd", f"{n}steps-lora", ddim_trailing((n,)), file=f"{n}steps-lora") for n in (2, 4, 8)),
        _model(base, "hyper-sd-unified", "unified-lora", tcd(UNIFIED_STEPS, eta=1.0), file=unified, allowed=eta),
        *(
            _model(
                base,
                "hyper-sd-cfg",
                f"{n}steps-cfg-lora",
                ddim_trailing((n,), CFG_GUIDANCE[0]),
                file=f"{n}steps-CFG-lora",
                allowed={"guidance_scale": CFG_GUIDANCE},
                unconfirmed="sampler: community use; guidance: 5 is our choice of the card's 5 to 8; ",
            )
            for n in (8, 12)
        ),
    ]


def _one_step_unet() -> SamplerContract:
    """Pure noise while the UNet is told 800: eps errors are amplified 5.2 times, at 999 it would be 14.7."""
    return SamplerContract("LCMScheduler", timesteps={1: (800,)})


def _model(
    base: str,
    family: str,
    name: str,
    contract: SamplerContract,
    file: str,
    kind: Kind = "lora",
    allowed: dict[str, tuple[float, float]] | None = None,
    unconfirmed: str = "",
) -> ModelSpec:
    return ModelSpec(
        name=f"{FILES[base].lower()}-{name}",
        family=family,
        base=base,
        kind=kind,
        contract=contract,
        weights=HubWeights(REPO, f"{FILES[base]}-{file}.safetensors"),
        license=LICENSE,
        allowed=allowed or {},
        trained_on=TRAINED_ON,
        unconfirmed=unconfirmed + WHICH_PREDICTOR,
        published=published(base, family, contract.timesteps),
    )
