"""The miniature's models: its teacher, and the LoRAs that ``distill`` made from it."""

from __future__ import annotations

from pathlib import Path

from hypersd_bench.catalog.spec import ModelSpec
from hypersd_bench.errors import InputError
from hypersd_bench.pocket import WEIGHTS
from hypersd_bench.sampling import ddim_trailing, read_contract

TEACHER_STEPS = (1, 2, 4, 8, 25, 50)
TEACHER_GUIDANCE = 3.0
LICENSE = "Apache-2.0; trained on Twemoji artwork (CC-BY 4.0)"


def models() -> list[ModelSpec]:
    """The teacher and every shipped LoRA."""
    teacher = ModelSpec(
        name="teacher",
        family="teacher",
        base="pocket",
        kind="base",
        contract=ddim_trailing(TEACHER_STEPS, guidance_scale=TEACHER_GUIDANCE),
        license=LICENSE,
    )
    lora = WEIGHTS / "lora"
    folders = sorted(path for path in lora.iterdir() if path.is_dir()) if lora.is_dir() else []
    return [teacher, *(spec for folder in folders for spec in lora_family(folder, folder.name, "pocket", LICENSE))]


def lora_family(path: Path, family: str, base: str, license: str = "") -> list[ModelSpec]:
    """Read a LoRA file, or a folder of them, as models: each file's sampler contract says its step counts."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} holds no .safetensors file; give a LoRA, or a folder that distill made")
    training = next((f for f in (path, path.parent) if (f / "train.jsonl").is_file()), None) if path.is_dir() else None
    return [
        ModelSpec(
            name=file.stem,
            family=family,
            base=base,
            kind="lora",
            contract=read_contract(file),
            weights=file,
            license=license,
            training=training,
        )
        for file in files
    ]
