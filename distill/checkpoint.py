"""A distillation's folder: what it is (``distill.json``), where it is (``checkpoints/``), and how it goes on.

distill.json              settings, their hash, provenance, finished stages
checkpoints/<stage>-<images>/  weights.safetensors, optimizers.pt, position.json: renamed into place when whole
train.jsonl, tensorboard/, samples/, cache/
*.safetensors             the LoRAs to use, or folders of UNets; stages/ holds those of intermediate stages
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from distill.settings import MANIFEST, Settings, decisive, read_manifest
from hypersd_bench.errors import InputError
from hypersd_bench.store import write_bytes, write_json

KEPT_CHECKPOINTS = 2
FORMAT = 2  # of a run's folder; raised whenever an older checkpoint can't be gone on from
_OURS = ("checkpoints", "stages", "samples", "tensorboard", "train.jsonl", "scoreboard.jsonl", "README.md")


@dataclass(frozen=True)
class Position:
    """How far a run is: the stage's index, images seen in that stage and in all, seconds spent training."""

    stage: int = 0
    stage_images: int = 0
    images: int = 0
    seconds: float = 0.0


class RunFolder:
    """A distillation's folder, opened for going on."""

    def __init__(self, path: Path, manifest: dict[str, Any], new: bool = False) -> None:
        self.path = path
        self.manifest = manifest
        self._new = new

    @classmethod
    def open(cls, path: Path, settings: Settings, provenance: Mapping[str, Any], fresh: bool) -> RunFolder:
        """Open the folder of these settings, new or half done; raises InputError when it holds anything else."""
        wanted = json.loads(json.dumps(settings.to_json()))  # tuples become lists, as in the file
        digest = hashlib.sha256(json.dumps(decisive(wanted), sort_keys=True).encode()).hexdigest()
        manifest = {"format": FORMAT, "settings": wanted, "settings_hash": digest, "state": "running",
                    "provenance": dict(provenance), "stages": []}  # fmt: skip
        found = read_manifest(path)
        if found is None and path.exists() and any(path.iterdir()):
            raise InputError(f"{path} is not empty and holds no distillation; choose another --out")
        if found is not None and fresh:
            _clear(path, found)
        elif found is not None:
            if found.get("format", 1) != FORMAT and found["state"] != "done":
                raise InputError(f"{path} was begun by another version of this program (format "
                                 f"{found.get('format', 1)}, now {FORMAT}); finish it with that one, or start over "
                                 "with --fresh")  # fmt: skip
            if found["settings_hash"] != digest:
                difference = _difference(decisive(found["settings"]), decisive(wanted))
                raise InputError(f"{path} holds another distillation ({difference}); choose another --out, or start "
                                 "over with --fresh")  # fmt: skip
            return cls(path, found)
        write_json(path / MANIFEST, manifest)
        return cls(path, manifest, new=found is None)

    def discard(self) -> None:
        """Remove a folder that this start has made: its run could not begin."""
        if self._new:
            shutil.rmtree(self.path)

    @property
    def done(self) -> bool:
        """Whether every stage is finished."""
        return bool(self.manifest["state"] == "done")

    def finish_stage(self, entry: Mapping[str, Any]) -> None:
        """Enter a finished stage; one entered before (its checkpoint was lost) is replaced."""
        others = [stage for stage in self.manifest["stages"] if stage["name"] != entry["name"]]
        self.manifest["stages"] = [*others, dict(entry)]
        write_json(self.path / MANIFEST, self.manifest)

    def finish(self) -> None:
        """Mark the run as done and drop what only going on needs."""
        self.manifest["state"] = "done"
        write_json(self.path / MANIFEST, self.manifest)
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def save(self, position: Position, weights: Mapping[str, Tensor], optimizers: Mapping[str, Any]) -> Path:
        """Write a checkpoint whole or not at all, and prune old ones."""
        folder = self.path / "checkpoints" / f"{position.stage:02d}-{position.images:012d}"
        if not folder.exists():  # else the same position of the same run: the same state
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            buffer = io.BytesIO()
            torch.save(dict(optimizers), buffer)
            write_bytes(partial / "optimizers.pt", buffer.getvalue())
            tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
            write_bytes(partial / "weights.safetensors", to_safetensors(tensors))
            write_json(partial / "position.json", asdict(position))
            os.replace(partial, folder)
            for old in self._checkpoints()[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(old)
        return folder

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        return next(iter(reversed(self._checkpoints())), None)

    def _checkpoints(self) -> list[Path]:
        return sorted(path for path in (self.path / "checkpoints").glob("*") if path.suffix != ".partial")


def load_position(checkpoint: Path | None) -> Position:
    """Where a checkpoint stands; the start without one."""
    return Position(**json.loads((checkpoint / "position.json").read_text())) if checkpoint else Position()


def load_state(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's weights and optimizer states, on the CPU."""
    optimizers = torch.load(checkpoint / "optimizers.pt", map_location="cpu", weights_only=True)
    return load_file(checkpoint / "weights.safetensors"), optimizers


def keep_log_until(log: Path, images: int) -> None:
    """Cut rows from a JSONL log that were written after ``images`` images seen: they will be written again."""
    if log.exists():
        lines = [line for line in log.read_text().splitlines() if _images_seen(line) <= images]
        write_bytes(log, "".join(f"{line}\n" for line in lines).encode())


def _images_seen(line: str) -> float:
    try:
        return float(json.loads(line)["images_seen"])
    except ValueError:  # cut off in the middle by a kill
        return float("inf")


def _clear(path: Path, manifest: Mapping[str, Any]) -> None:
    """Remove what a run has written, and nothing else."""
    unfinished = (each.name for each in path.glob(".*.partial"))
    for name in (*(stage["file"] for stage in manifest["stages"]), *_OURS, *unfinished):
        if (path / name).is_dir():
            shutil.rmtree(path / name)
        else:
            (path / name).unlink(missing_ok=True)


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Name the first setting that differs, another preset before its settings."""
    before, now = _flat(found), _flat(wanted)
    names = sorted((name for name in now if before.get(name) != now[name]), key=lambda name: name != "preset.name")
    name = names[0] if names else "version"
    shown = name.removesuffix(".name") if name == "preset.name" else name.removeprefix("preset.")
    return f"its {shown} is {before.get(name)}, not {now.get(name)}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
