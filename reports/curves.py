"""Training curves: what a model's ``train.jsonl`` says of its losses."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hypersd_bench.errors import InputError

MAX_POINTS = 150  # per stage: more can't be seen at the width of a page


@dataclass(frozen=True, slots=True)
class Curve:
    """A model's loss in one stage. points: (images seen since the first stage began, loss), in order."""

    model: str
    stage: str
    points: tuple[tuple[int, float], ...]


def read_curves(run: Path, entry: Mapping[str, Any]) -> list[Curve]:
    """Read the curves of a manifest's model; none when it names no training folder or the folder is gone."""
    if not entry.get("training"):
        return []
    path = run / entry["training"] / "train.jsonl"
    if not path.is_file():
        return []
    stages: dict[str, list[tuple[int, float]]] = {}
    offset, previous = 0, 0
    for row in _rows(path):
        if row["images_seen"] < previous:  # a log that counts from zero in every stage
            offset += previous
        previous = row["images_seen"]
        stages.setdefault(str(row["stage"]), []).append((offset + previous, float(row["loss"])))
    return [Curve(entry["name"], stage, _thinned(points)) for stage, points in stages.items()]


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    """The log's complete rows that carry a loss; a last line cut short by a kill is not one."""
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise InputError(f"{path}, line {number}: {error}; the log is broken") from error
        if {"stage", "images_seen", "loss"} <= row.keys():
            yield row


def _thinned(points: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Thin a curve to MAX_POINTS: each is the median loss of its stretch, at the stretch's end."""
    stretch = -(-len(points) // MAX_POINTS)
    parts = [points[start : start + stretch] for start in range(0, len(points), stretch)]
    return tuple((part[-1][0], median(loss for _, loss in part)) for part in parts)
