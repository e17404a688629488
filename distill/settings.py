"""What decides a distillation's result, and where it is read back from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from distill.presets import PRESETS, Preset
from distill.sources.pictures import DataSettings
from hypersd_bench.errors import InputError
from hypersd_bench.pipelines import base_folder
from hypersd_bench.provenance import sha256

MANIFEST = "distill.json"
# settings of a preset that change how a run is watched and kept, not what comes out
INCIDENTAL = ("checkpoint_every_s", "sample_every_s", "scoreboard", "trackers")


@dataclass(frozen=True)
class Settings:
    """Two runs of equal settings are the same run."""

    method: str
    base: str
    preset: Preset
    seed: int = 0
    data: DataSettings = field(default_factory=DataSettings)

    @property
    def command(self) -> str:
        """The command that repeats this run."""
        parts = [f"hypersd-bench distill {self.method} --base {self.base} --preset {self.preset.name}"]
        known = PRESETS.get(self.preset.name, self.preset)
        parts += [f"--set {name}={value}" for name, value in _changes(known, self.preset)]
        if self.data.source != "scenes":
            parts.append(f"--data {self.data.source!r}")
        parts += [
            f"--set data.{name}={value}" for name, value in _changes(DataSettings(source=self.data.source), self.data)
        ]
        return " ".join([*parts, f"--seed {self.seed}"])

    @property
    def training_data(self) -> DataSettings:
        """The data's settings, with what the preset and the seed decide of them."""
        resolution = self.data.resolution or self.preset.resolution or None
        return replace(self.data, seed=self.seed, scenes=self.preset.scenes, resolution=resolution)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the hash of the base's UNet: another base under the same name is another run."""
        weights = sorted((base_folder(self.base) / "unet").glob("*.safetensors"))
        if not weights:
            raise InputError(f"base {self.base!r}: its unet folder holds no safetensors weights")
        return {**asdict(self), "base_unet_sha256": sha256(weights[0])}


def decisive(stored: dict[str, Any]) -> dict[str, Any]:
    """What of a manifest's settings decides the result."""
    preset = {key: value for key, value in stored["preset"].items() if key not in INCIDENTAL}
    return {**stored, "preset": preset}


def read_settings(folder: Path, method: str) -> Settings:
    """The settings of a run's folder; raises InputError where there is none, or one of another method or version."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"--resume {folder}: no distillation there (no {MANIFEST})")
    stored = {key: value for key, value in manifest["settings"].items() if key != "base_unet_sha256"}
    if (other := stored.get("method")) != method:
        raise InputError(f"--resume {folder}: that is a run of {other}; say: distill {other} --resume {folder}")
    try:
        return TypeAdapter(Settings).validate_python(stored)
    except (ValidationError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--resume {folder}: its settings are not this version's ({reason}); finish it with the "
                         "version that began it, or start anew") from None  # fmt: skip


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """A run's manifest, None where there is none; raises InputError for one that can't be read."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        return manifest
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"can't read {folder / MANIFEST}: {error}") from error


def _changes(known: Any, chosen: Any, prefix: str = "") -> list[tuple[str, str]]:
    """The dotted names of settings that differ from a known one's, and their values as YAML."""
    found = []
    for name in (each.name for each in fields(chosen)):
        before, now = getattr(known, name), getattr(chosen, name)
        if hasattr(now, "__dataclass_fields__"):
            found += _changes(before, now, f"{prefix}{name}.")
        elif before != now and name not in INCIDENTAL:
            found.append((f"{prefix}{name}", json.dumps(now).replace(" ", "")))
    return found
