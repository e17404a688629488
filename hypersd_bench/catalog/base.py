"""Models that need no catalogue entry: a base itself as the teacher, and LoRA files that carry their contract."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
            trained_on=_trained_on(file, card),
            notes=_how_it_was_made(card, family),
            card=card,
        )
        for file, card in ((file, _card(file)) for file in files)
    ]


def _card(file: Path) -> Mapping[str, Any]:
    """What ``distill`` wrote into a LoRA about its making; empty for a file from elsewhere."""
    try:
        card = json.loads(read_safetensors_metadata(file).get(CARD_KEY, "{}"))
    except ValueError:
        card = None
    if not isinstance(card, dict):
        raise InputError(f"{file}: its {CARD_KEY} is no JSON object; export the LoRA again")
    return card


def _trained_on(file: Path, card: Mapping[str, Any]) -> tuple[str, ...]:
    """The ids of the metrics a LoRA was optimised for; cards older than the key name none."""
    ids = card.get("trained_on", [])
    if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids):
        raise InputError(f"{file}: trained_on in its {CARD_KEY} is no list of metric ids; export the LoRA again")
    return tuple(ids)


def _how_it_was_made(card: Mapping[str, Any], family: str) -> str:
    """What ``distill`` wrote about a file's making, in a sentence; nothing for a file from elsewhere."""
    if not {"method", "preset"} <= card.keys():
        return ""
    return f"{family}: distilled by {card['method']} with preset {card['preset']}"
