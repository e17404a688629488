"""Models that need no catalogue entry: a base itself as the teacher, LoRAs and UNets on this disk.

A file that ``distill`` wrote carries its contract. One from elsewhere is recognised by its name, when the catalogue
has it, or is given a contract: the name of a catalogue entry, a file, or a preset such as ``tcd:steps=1-8:eta=0.3``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypersd_bench.catalog.spec import HubWeights, Kind, ModelSpec
from hypersd_bench.errors import InputError, unknown_name
from hypersd_bench.hub import check_whole, without_copies
from hypersd_bench.sampling import (
    CARD_KEY,
    METADATA_KEY,
    SamplerContract,
    ddim_trailing,
    euler_trailing,
    lcm,
    read_card,
    read_contract,
    read_safetensors_header,
    read_safetensors_metadata,
    tcd,
)
from hypersd_bench.yaml_file import read_yaml

TEACHER_STEPS = (1, 2, 4, 8, 25, 50)
USUAL_GUIDANCE = 7.5  # Stable Diffusion's own default
PRESETS = {"ddim-trailing": ddim_trailing, "euler-trailing": euler_trailing, "lcm": lcm, "tcd": tcd}
_PRESET_SETTINGS = {
    "guidance": "guidance_scale",
    "embedded-guidance": "embedded_guidance",
    "eta": "eta",
    "lora-scale": "lora_scale",
}


def teacher(base: str, guidance_scale: float = USUAL_GUIDANCE, license: str = "") -> ModelSpec:
    """The base without any LoRA, sampled by DDIM with guidance."""
    contract = ddim_trailing(TEACHER_STEPS, guidance_scale)
    return ModelSpec("teacher", "teacher", base, "base", contract, license=license)


def local_family(
    path: Path, family: str, base: str, contract: SamplerContract | None, known: Iterable[ModelSpec]
) -> list[ModelSpec]:
    """Read a LoRA file, a UNet, or a folder of either, as models.

    contract: for a file that carries none. known: the catalogue, whose checkpoints are recognised by their file's name.
    """
    if _carries_contracts(path):
        return distilled_family(path, family, base)
    files = _by_file_name(known)
    if path.name in files:
        note = f"{family}: taken for {files[path.name].name} by its file's name"
        return [replace(files[path.name], family=family, weights=path, notes=note)]
    if contract is None:
        raise InputError(f"{path} carries no sampler contract, and its name is no published checkpoint's; say how to "
                         "sample it with --contract MODEL, FILE or PRESET, such as lcm:steps=1-8 (in a spec: "
                         "contract)")  # fmt: skip
    kind: Kind = "unet" if path.is_dir() else _kind_of(path)
    return [ModelSpec(path.name if path.is_dir() else path.stem, family, base, kind, contract, weights=path)]


def _by_file_name(known: Iterable[ModelSpec]) -> dict[str, ModelSpec]:
    """Published checkpoints by their file's name, where it is one checkpoint's alone."""
    found: dict[str, list[ModelSpec]] = defaultdict(list)
    for model in known:
        if isinstance(model.weights, HubWeights) and not model.weights.is_folder:
            found[Path(model.weights.file).name].append(model)
    return {name: max(models, key=lambda model: len(model.contract.timesteps)) for name, models in found.items()
            if len({model.weights for model in models}) == 1}  # fmt: skip


def parse_contract(text: str, known: Mapping[str, ModelSpec], folder: Path = Path()) -> SamplerContract:
    """Read a contract: a model of the catalogue, a JSON or YAML file, or ``PRESET[:steps=1-8][:guidance=..][:eta=..]``.

    Relative paths are taken from ``folder``; raises InputError for what is none of the three.
    """
    if text in known:
        return known[text].contract
    if text.endswith((".json", ".yaml", ".yml")):
        raw = read_yaml((folder / text).expanduser(), "contract")
        return SamplerContract.from_json(json.dumps(raw))
    preset, *settings = text.split(":")
    if preset not in PRESETS:
        raise unknown_name("contract", preset, [*known, *PRESETS])
    try:
        wanted = dict(setting.split("=", 1) for setting in settings)
        contract = PRESETS[preset](_step_counts(wanted.pop("steps", "1-8")))
        numbers: dict[str, Any] = {_PRESET_SETTINGS[name]: float(value) for name, value in wanted.items()}
    except KeyError as error:
        raise unknown_name("contract setting", str(error.args[0]), ["steps", *_PRESET_SETTINGS], text) from None
    except ValueError:
        raise InputError(f"contract {text!r}: write settings as steps=1-8 or steps=1,4 and name=number, with colons "
                         "between") from None  # fmt: skip
    return replace(contract, **numbers)


def _step_counts(text: str) -> tuple[int, ...]:
    """``1-4,8`` to (1, 2, 3, 4, 8)."""
    counts: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        counts += range(int(first), int(last or first) + 1)
    if not counts or min(counts) < 1 or max(counts) > 1000:
        raise ValueError(text)
    return tuple(sorted(set(counts)))


def _carries_contracts(path: Path) -> bool:
    """Whether a file, or the folder of LoRAs and UNets that ``distill`` wrote, says how it is sampled."""
    if path.is_dir() and not _is_unet(path):
        return True  # each of its files must; the first that does not is named
    file = _told(path) if path.is_dir() else path
    return file.suffix == ".safetensors" and METADATA_KEY in read_safetensors_metadata(file)


def _kind_of(file: Path) -> Kind:
    """Whether a file holds a LoRA or a UNet's weights, by the names of its tensors."""
    if file.suffix != ".safetensors":
        raise InputError(f"{file} is no .safetensors file, and its name is no published checkpoint's; convert it, or "
                         "give it the published file's name")  # fmt: skip
    names = read_safetensors_header(file)
    if any("lora" in name.lower() for name in names):
        return "lora"
    if "conv_in.weight" in names:
        return "unet"
    raise InputError(f"{file} holds neither a LoRA nor the weights of a diffusers UNet; files for other programs, such "
                     "as ComfyUI's, can't be read")  # fmt: skip


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
        for student, file, card in (
            (student, file, read_card(file)) for student in students for file in [_told(student)]
        )
    ]


def as_its_card_says(model: ModelSpec, weights: Path) -> ModelSpec:
    """The model with what ``distill`` wrote into its weights on this disk; no entry of a catalogue can leave it out."""
    file, card = _told(weights), {}
    if file.suffix == ".safetensors":
        check_whole(file)  # whose error knows how a broken download is had again
        card = read_card(file)
    return replace(
        model,
        trained_on=tuple(dict.fromkeys([*model.trained_on, *_trained_on(file, card)])),
        notes=model.notes or _how_it_was_made(card, model.family),
        card=card or model.card,
    )


def weight_files(weights: Path) -> Sequence[Path]:
    """The files of a LoRA, which is one, or those that are loaded of a UNet folder, which may be sharded."""
    return without_copies(sorted(weights.glob("*.safetensors"))) if weights.is_dir() else [weights]


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
