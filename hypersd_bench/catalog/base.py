"""Models that need no catalogue entry: a base itself as the teacher, and LoRAs and UNets that carry their contract."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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


def distilled_family(path: Path, family: str, base: str, license: str = "") -> list[ModelSpec]:
    """Read a LoRA file, a UNet folder, or a folder of either, as models: their contracts say the step counts."""
    students = _students(path)
    if not students:
        raise InputError(f"{path} holds no .safetensors file; give a LoRA, a UNet, or a folder that distill made")
    training = next((f for f in (path, path.parent) if (f / "train.jsonl").is_file()), None) if path.is_dir() else None
    return [
        ModelSpec(
            name=student.name if student.is_dir() else student.stem,
            family=family,
            base=base,
            kind="unet" if student.is_dir() else "lora",
            contract=read_contract(file),
            weights=student,
            license=license,
            training=training,
            trained_on=_trained_on(file, card),
            notes=_how_it_was_made(card, family),
            card=card,
        )
        for student, file, card in ((student, file, _card(file)) for student in students for file in [_told(student)])
    ]


def weight_files(weights: Path) -> Sequence[Path]:
    """The files of a LoRA, which is one, or of a UNet folder, which may be sharded."""
    return sorted(weights.glob("*.safetensors")) if weights.is_dir() else [weights]


def _students(path: Path) -> list[Path]:
    if not path.is_dir() or _is_unet(path):
        return [path]
    return [*sorted(path.glob("*.safetensors")), *sorted(folder for folder in path.iterdir() if _is_unet(folder))]


def _is_unet(path: Path) -> bool:
    """Whether a path is a diffusers UNet folder. Half-written ones have hidden names."""
    return (path / "config.json").is_file() and not path.name.startswith(".")


def _told(student: Path) -> Path:
    """The file whose metadata say how a student is sampled; of a sharded UNet's, which all do, the first."""
    files = weight_files(student)
    if not files:
        raise InputError(f"{student} holds a UNet's config but no safetensors weights; download or export it again")
    return files[0]


def _card(file: Path) -> Mapping[str, Any]:
    """What ``distill`` wrote into a file about its making; empty for a file from elsewhere."""
    try:
        card = json.loads(read_safetensors_metadata(file).get(CARD_KEY, "{}"))
    except ValueError:
        card = None
    if not isinstance(card, dict):
        raise InputError(f"{file}: its {CARD_KEY} is no JSON object; export it again")
    return card


def _trained_on(file: Path, card: Mapping[str, Any]) -> tuple[str, ...]:
    """The ids of the metrics a student was optimised for; cards older than the key name none."""
    ids = card.get("trained_on", [])
    if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids):
        raise InputError(f"{file}: trained_on in its {CARD_KEY} is no list of metric ids; export it again")
    return tuple(ids)


def _how_it_was_made(card: Mapping[str, Any], family: str) -> str:
    """What ``distill`` wrote about a file's making, in a sentence; nothing for a file from elsewhere."""
    if not {"method", "preset"} <= card.keys():
        return ""
    return f"{family}: distilled by {card['method']} with preset {card['preset']}"
