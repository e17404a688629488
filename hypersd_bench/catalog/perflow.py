"""PeRFlow (arXiv 2405.07510): DreamShapers of SD1.5 and SDXL with four straightened time windows, for 4 steps and more.

Prediction types and guidance are those of magic-research/piecewise-rectified-flow's scripts (4.5 with 4 steps to 7.5
with 8 on SD1.5) and of the SDXL model's card (1.5 to 2.5).
"""

from __future__ import annotations

from hypersd_bench.catalog.published import published
from hypersd_bench.catalog.spec import HubWeights, ModelSpec
from hypersd_bench.sampling import SamplerContract

LICENSE = "CC BY-NC 4.0"
WINDOWS = 4
STEPS = (4, 8)  # others would give some windows more steps than others


def models() -> list[ModelSpec]:
    """The two models that the authors merged into DreamShaper."""
    return [
        ModelSpec(
            name="perflow-sd15-dreamshaper",
            family="perflow",
            base="sd15",
            kind="base",
            contract=_contract("diff_eps", 7.5),
            pipeline="hansyan/perflow-sd15-dreamshaper",
            license=LICENSE,
            allowed={"guidance_scale": (4.5, 7.5)},
            unconfirmed="which of the authors' SD1.5 models the published row measured",
            published=published("sd15", "perflow", STEPS),
        ),
        ModelSpec(
            name="perflow-sdxl-dreamshaper",
            family="perflow",
            base="sdxl",
            kind="unet",
            contract=_contract("ddim_eps", 2.0),
            # The repository is a whole pipeline, but its weights have a variant's names, and which text encoders and
            # autoencoder they are its card doesn't say beyond what it was made from.
            weights=HubWeights("hansyan/perflow-sdxl-dreamshaper", "unet/diffusion_pytorch_model.v0-fix.safetensors"),
            pipeline="Lykon/dreamshaper-xl-1-0",
            license=LICENSE,
            allowed={"guidance_scale": (1.5, 2.5)},
            unconfirmed="pipeline: its other parts are taken to be DreamShaper XL's, unchanged",
        ),
    ]


def _contract(prediction_type: str, guidance_scale: float) -> SamplerContract:
    """Steps from the starts of the windows, 1000, 750, 500 and 250, evenly to their ends."""
    return SamplerContract(
        "PeRFlowScheduler",
        timesteps={count: tuple(1000 - i * 1000 // count for i in range(count)) for count in STEPS},
        settings={"num_time_windows": WINDOWS},
        guidance_scale=guidance_scale,
        prediction_type=prediction_type,
    )
