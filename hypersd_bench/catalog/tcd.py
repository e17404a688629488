"""Trajectory consistency distillation (arXiv 2402.19159): one LoRA a base, for 4 steps and more."""

from __future__ import annotations

from hypersd_bench.catalog.published import published
from hypersd_bench.catalog.spec import HubWeights, ModelSpec
from hypersd_bench.sampling import tcd

STEPS = (4, 5, 6, 7, 8, 16, 25, 50)  # of the card's 4 to 50
REPOS = {"sdxl": "h1t/TCD-SDXL-LoRA", "sd15": "h1t/TCD-SD15-LoRA", "sd21": "h1t/TCD-SD21-base-LoRA"}


def models() -> list[ModelSpec]:
    """The LoRAs for SDXL, SD1.5 and SD2.1 base. The authors raise eta with the number of steps."""
    return [
        ModelSpec(
            name=repo.rpartition("/")[2].lower(),
            family="tcd",
            base=base,
            kind="lora",
            contract=tcd(STEPS, eta=0.3),
            weights=HubWeights(repo, "pytorch_lora_weights.safetensors"),
            license="MIT",
            allowed={"eta": (0.0, 1.0)},
            published=published(base, "tcd", STEPS),
        )
        for base, repo in REPOS.items()
    ]
