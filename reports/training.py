"""How weights were made: the losses in a training folder's ``train.jsonl``, and what the weights say of themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

from hypersd_bench.errors import InputError
from hypersd_bench.sampling import METADATA_KEY, SamplerContract, read_card, read_safetensors_metadata

LOG = "train.jsonl"
MAX_POINTS = 150  # per stage: more can't be seen at the width of a page


@dataclass(frozen=True, slots=True)
class Curve:
    """A model's loss in one stage. points: (images seen since the first stage began, loss), in order."""

    model: str
    stage: str
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Made:
    """A weights file and what it says of its own making; card is empty where it says nothing."""

    label: str
    file: str
    sha256: str
    steps: tuple[int, ...]
    card: Mapping[str, Any]


def is_training(folder: Path) -> bool:
    """Whether a folder is what ``hypersd-bench distill`` trains in, and no run."""
    return (folder / LOG).is_file() and not (folder / "run.json").exists()


def read_curves(run: Path, entry: Mapping[str, Any]) -> list[Curve]:
    """Read the curves of a manifest's model; none when it names no training folder or the folder is gone."""
    return read_log(run / entry["training"], entry["name"]) if entry.get("training") else []


def read_log(folder: Path, name: str) -> list[Curve]:
    """Read a training folder's curves under this name; none without a log."""
    path = folder / LOG
    if not path.is_file():
        return []
    stages: dict[str, list[tuple[int, float]]] = {}
    offset, previous = 0, 0
    for stage, images_seen, loss in _rows(path):
        if images_seen < previous:  # a log that counts from zero in every stage
            offset += previous
        previous = images_seen
        if isfinite(loss):  # a training that diverged is drawn as far as it can be
            stages.setdefault(stage, []).append((offset + previous, loss))
    return [Curve(name, stage, _thinned(points)) for stage, points in stages.items()]


def made_in_folder(folder: Path, name: str) -> list[Made]:
    """The weights that a training folder holds, under this name; none before its first stage has ended."""
    return [
        Made(name, str(file.relative_to(folder)), "", _steps(told), read_card(file))
        for file in sorted([*folder.glob("*.safetensors"), *folder.glob("[!.]*/diffusion_pytorch_model.safetensors")])
        for told in [read_safetensors_metadata(file)]
    ]


def _steps(told: Mapping[str, str]) -> tuple[int, ...]:
    """The step counts of the contract inside the weights; none where they carry none."""
    return tuple(SamplerContract.from_json(told[METADATA_KEY]).timesteps) if METADATA_KEY in told else ()


def _rows(path: Path) -> Iterator[tuple[str, int, float]]:
    """Stage, images seen and loss of the log's complete rows; a last line cut short by a kill is not one."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if {"stage", "images_seen", "loss"} <= row.keys():
                yield str(row["stage"]), int(row["images_seen"]), float(row["loss"])
        except (ValueError, TypeError, AttributeError) as error:
            if number == len(lines):
                return
            raise InputError(f"{path}, line {number}: {error}; the log is broken") from error


def _thinned(points: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Thin a curve to MAX_POINTS: each is the median loss of its stretch, at the stretch's end."""
    stretch = -(-len(points) // MAX_POINTS)
    parts = [points[start : start + stretch] for start in range(0, len(points), stretch)]
    return tuple((part[-1][0], median(loss for _, loss in part)) for part in parts)
