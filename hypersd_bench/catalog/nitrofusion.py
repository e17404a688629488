"""NitroFusion (arXiv 2412.02030): SDXL UNets for 1 to 4 steps, told a shifted timestep.

Recipe, licences and what each was made from are those of ChenDarYen/NitroFusion's README: LCMScheduler on a grid of
4 points, no guidance; NitroSD-Realism starts from DMD2, NitroSD-Vibrant from Hyper-SDXL, whose rewards it inherits.
"""

from __future__ import annotations

from hypersd_bench.catalog.hyper_sd import TRAINED_ON, WHICH_PREDICTOR
from hypersd_bench.catalog.published import published
from hypersd_bench.catalog.spec import HubWeights, ModelSpec
from hypersd_bench.sampling import SamplerContract, skipping

REPO = "ChenDY/NitroFusion"
STEPS = (1, 2, 3, 4)


def models() -> list[ModelSpec]:
    """NitroSD-Realism and NitroSD-Vibrant."""
    return [
        _model("realism", shift=250, license="CC BY-NC 4.0"),
        _model("vibrant", shift=500, license="Open RAIL++-M", trained_on=TRAINED_ON, unconfirmed=WHICH_PREDICTOR),
    ]


def _model(name: str, shift: int, license: str, trained_on: tuple[str, ...] = (), unconfirmed: str = "") -> ModelSpec:
    family = f"nitro-{name}"
    return ModelSpec(
        name=f"nitrosd-{name}",
        family=family,
        base="sdxl",
        kind="unet",
        contract=SamplerContract(
            "LCMScheduler",
            timesteps={count: skipping(count, grid=4) for count in STEPS},
            settings={"original_inference_steps": 4},
            shifted_timestep=shift,
        ),
        weights=HubWeights(REPO, f"nitrosd-{name}_unet.safetensors"),
        license=license,
        trained_on=trained_on,
        unconfirmed=unconfirmed,
        published=published("sdxl", family, STEPS),
    )
