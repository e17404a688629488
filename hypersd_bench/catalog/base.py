"""Models that need no catalogue entry: a base itself as the teacher, and LoRA files that carry their contract."""

from __future__ import annotations

import json
from pathlib import Path

from hypersd_bench.catalog.spec import ModelSpec
from hypersd_bench.errors import InputError
from hypersd_bench.sampling import ddim_trailing, read_contract, read_safetensors_metadata

TEACHER_STEPS = (1, 2, 4, 8, 25, 50)
CARD_KEY = "hypersd_bench.card"  # safetensors metadata of files that ``distill`` wrote
USUAL_GUIDANCE = 7.5  # Stable Diffusion's own default


def teacher(base: str, guidance_scale: float = USUAL_GUIDANCE, license: str = "") -> ModelSpec:
    """The base without any LoRA, sampled by DDIM with guidance."""
    contract = ddim_trailing(TEACHER_STEPS, guidance_scale)
    return ModelSpec("teacher", "teacher", base, "base", contract, license=license)


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
            notes=_how_it_was_made(file, family),
        )
        for file in files
    ]


def _how_it_was_made(file: Path, family: str) -> str:
    """What ``distill`` wrote about a file's making, in a sentence; nothing for a file from elsewhere."""
    card = json.loads(read_safetensors_metadata(file).get(CARD_KEY, "{}"))
    if not card:
        return ""
    return f"{family}: distilled by {card['method']} with preset {card['preset']}"
