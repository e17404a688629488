"""The miniature's models: its teacher, and the LoRAs that ``distill`` made from it."""

from __future__ import annotations

from hypersd_bench.catalog.local import distilled_family, teacher
from hypersd_bench.catalog.spec import ModelSpec
from hypersd_bench.pocket import WEIGHTS

TEACHER_GUIDANCE = 3.0
LICENSE = "Apache-2.0; trained on Twemoji artwork (CC-BY 4.0)"


def models() -> list[ModelSpec]:
    """The teacher and every shipped LoRA."""
    lora = WEIGHTS / "lora"
    folders = sorted(path for path in lora.iterdir() if path.is_dir()) if lora.is_dir() else []
    shipped = [spec for folder in folders for spec in distilled_family(folder, folder.name, "pocket", LICENSE)]
    return [teacher("pocket", TEACHER_GUIDANCE, LICENSE), *shipped]
