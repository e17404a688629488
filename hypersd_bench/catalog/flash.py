"""Flash Diffusion (arXiv 2406.02347): LoRAs for SDXL and SD1.5.

The cards set LCMScheduler's ``timestep_spacing`` to "trailing", which that scheduler never reads.
"""

from __future__ import annotations

from hypersd_bench.catalog.published import published
from hypersd_bench.catalog.spec import HubWeights, ModelSpec
from hypersd_bench.sampling import lcm


def models() -> list[ModelSpec]:
    """One LoRA a base."""
    return [
        _model("flash-sdxl", "sdxl", (4,), "CC BY-NC-ND 4.0"),
        _model("flash-sd", "sd15", (2, 3, 4), "CC BY-NC 4.0"),
    ]


def _model(name: str, base: str, steps: tuple[int, ...], license: str) -> ModelSpec:
    return ModelSpec(
        name=name,
        family="flash",
        base=base,
        kind="lora",
        contract=lcm(steps),
        weights=HubWeights(f"jasperai/{name}", "pytorch_lora_weights.safetensors"),
        license=license,
        published=published(base, "flash", steps),
    )
