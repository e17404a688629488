"""Trajectory distribution matching (arXiv 2503.06674): a 4-step LoRA on DreamShaper 7, which is made from SD1.5.

The README of Luo-Yihong/TDM takes DPMSolverMultistepScheduler with SD1.5's own scheduler config, which leaves all but
the noise schedule at the class's defaults; they are spelled out here, for defaults may change.
"""

from __future__ import annotations

from hypersd_bench.catalog.spec import HubWeights, ModelSpec
from hypersd_bench.sampling import SamplerContract

SETTINGS = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "timestep_spacing": "linspace",
}


def models() -> list[ModelSpec]:
    """The LoRA. Its file is a pickle: it is loaded weights-only."""
    return [
        ModelSpec(
            name="tdm-dreamshaper-lora",
            family="tdm",
            base="sd15",
            kind="lora",
            contract=SamplerContract(
                "DPMSolverMultistepScheduler",
                timesteps={4: (999, 749, 500, 250)},
                settings=SETTINGS,
                guidance_scale=1.0,
            ),
            weights=HubWeights("Luo-Yihong/TDM_dreamshaper_LoRA", "tdm_dreamshaper.pt"),
            pipeline="Lykon/dreamshaper-7",
            license="Apache-2.0",
        )
    ]
