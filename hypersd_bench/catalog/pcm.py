"""Phased consistency models (arXiv 2405.18407): LoRAs for small guidance, for usual guidance, and one sampled as LCM.

The model card of wangfuyun/PCM_Weights asks for DDIM, trailing; guidance 1-2 for ``smallcfg``; for ``normalcfg`` 2-9
in all, 2.5-3.5 with 4 steps and 3-6 with 8. The ``lcmlike`` LoRA it only lists.
"""

from __future__ import annotations

from hypersd_bench.catalog.published import published
from hypersd_bench.catalog.spec import HubWeights, ModelSpec
from hypersd_bench.sampling import SamplerContract, ddim_trailing, lcm

REPO = "wangfuyun/PCM_Weights"
LICENSE = "see the model card"
SMALL_CFG = (1.0, 2.0)
# By steps: the card's range, and what of it we take: the middle, and with 16 steps the authors' demo's.
NORMAL_CFG = {4: ((2.5, 3.5), 3.0), 8: ((3.0, 6.0), 4.5), 16: ((2.0, 9.0), 7.5)}


def models() -> list[ModelSpec]:
    """The LoRAs for SDXL and SD1.5."""
    return [model for base in ("sdxl", "sd15") for model in _of(base)]


def _of(base: str) -> list[ModelSpec]:
    return [
        *(
            _model(base, "pcm", f"smallcfg_{n}step", ddim_trailing((n,), SMALL_CFG[0]), allowed=SMALL_CFG)
            for n in (2, 4, 8, 16)
        ),
        *(
            _model(
                base,
                "pcm-normalcfg",
                f"normalcfg_{n}step",
                ddim_trailing((n,), guidance),
                allowed=allowed,
                unconfirmed=f"guidance: {guidance:g} is our choice of the card's range",
            )
            for n, (allowed, guidance) in NORMAL_CFG.items()
        ),
        _model(
            base,
            "pcm-lcmlike",
            "lcmlike_lora",
            lcm((2, 4, 8)),
            allowed=SMALL_CFG,
            unconfirmed="steps, guidance: the card only lists it",
        ),
    ]


def _model(
    base: str,
    family: str,
    file: str,
    contract: SamplerContract,
    allowed: tuple[float, float],
    unconfirmed: str = "",
) -> ModelSpec:
    return ModelSpec(
        name=f"pcm-{base}-{file.replace('_', '-')}",
        family=family,
        base=base,
        kind="lora",
        contract=contract,
        weights=HubWeights(REPO, f"{base}/pcm_{base}_{file}_converted.safetensors"),
        license=LICENSE,
        allowed={"guidance_scale": allowed},
        unconfirmed=unconfirmed,
        published=published(base, family, contract.timesteps),
    )
