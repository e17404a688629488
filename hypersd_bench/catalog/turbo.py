"""SDXL-Turbo and SD-Turbo: adversarial diffusion distillation, whole pipelines for 1 to 4 steps at 512 px.

Schedulers are those of the two repositories' scheduler_config.json.
"""

from __future__ import annotations

from hypersd_bench.catalog.published import published
from hypersd_bench.catalog.spec import ModelSpec
from hypersd_bench.sampling import SamplerContract, trailing

STEPS = (1, 2, 3, 4)


def models() -> list[ModelSpec]:
    """SDXL-Turbo beside SDXL, SD-Turbo (made from SD2.1) beside SD2.1 base."""
    return [
        _model(
            "sdxl-turbo", "sdxl", "EulerAncestralDiscreteScheduler", "Stability AI non-commercial (sai-nc-community)"
        ),
        _model(
            "sd-turbo",
            "sd21",
            "EulerDiscreteScheduler",
            "Stability AI, non-commercial: see the model card",
            unconfirmed="guidance, 512 px: only copies of the model card were seen",
        ),
    ]


def _model(name: str, base: str, scheduler: str, license: str, unconfirmed: str = "") -> ModelSpec:
    return ModelSpec(
        name=name,
        family="turbo",
        base=base,
        kind="base",
        contract=SamplerContract(
            scheduler,
            timesteps={count: trailing(count) for count in STEPS},
            settings={"timestep_spacing": "trailing"},
        ),
        pipeline=f"stabilityai/{name}",
        license=license,
        unconfirmed=unconfirmed,
        published=published(base, "turbo", STEPS),
    )
