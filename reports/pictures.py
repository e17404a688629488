"""The image grid: which prompts are shown, and the pictures a report folder carries so that it can be moved."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from PIL import Image

from hypersd_bench.errors import InputError
from hypersd_bench.store import ImageRow, RunStore, ScoreRow

MAX_PROMPTS = 64
MAX_SIDE_PX = 512  # larger pictures are carried at this size, as WebP
SMALL_SIDE_PX = 256  # the same, in a single file
NUM_APART = 6  # prompts for each metric, where models differ most


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of the grid. file: relative to the run directory. scores: by metric id. defect: see ImageRow."""

    model: str
    steps: int
    file: str
    scores: dict[str, float]
    defect: str


@dataclass(frozen=True, slots=True)
class PromptRow:
    """All models' pictures of one prompt from the same noise."""

    prompt_id: str
    prompt: str
    replicate: int
    seed: int
    pictures: tuple[Picture, ...]

    def spread(self, metric: str) -> float | None:
        """How far models are apart on this prompt: the largest difference of two at one step count."""
        by_steps: dict[int, list[float]] = defaultdict(list)
        for picture in self.pictures:
            if metric in picture.scores:
                by_steps[picture.steps].append(picture.scores[metric])
        return max((max(values) - min(values) for values in by_steps.values() if len(values) > 1), default=None)

    def picture(self, model: str, steps: int) -> Picture | None:
        """The picture of a model at a step count, when there is one."""
        return next((p for p in self.pictures if (p.model, p.steps) == (model, steps)), None)


def choose_prompts(
    store: RunStore, images: Sequence[ImageRow], models: Sequence[str]
) -> tuple[tuple[PromptRow, ...], list[str]]:
    """Choose up to MAX_PROMPTS prompts evenly over the run, and those where models differ most; first noise of each.

    Says beside what is not shown.
    """
    groups: dict[str, list[ImageRow]] = defaultdict(list)
    for row in images:
        groups[row.prompt_id].append(row)
    ids = sorted(groups)
    count = min(len(ids), MAX_PROMPTS)
    scores = {metric: store.scores(metric) for metric in store.scored_metrics()}
    evenly = [ids[i * len(ids) // count] for i in range(count)]
    chosen = list(dict.fromkeys([*evenly, *_most_apart(groups, models, scores)])) if count < len(ids) else ids
    rows, lost = [], 0
    for prompt_id in chosen:
        first = min(row.replicate for row in groups[prompt_id])
        same_noise = [row for row in groups[prompt_id] if row.replicate == first and row.model in models]
        kept = [row for row in same_noise if (store.folder / row.file).is_file()]
        lost += len(same_noise) - len(kept)
        pictures = tuple(
            Picture(row.model, row.steps, row.file, _scores(row, scores), row.defect)
            for row in sorted(kept, key=lambda row: (models.index(row.model), row.steps))
        )
        rows.append(PromptRow(prompt_id, same_noise[0].prompt, first, same_noise[0].seed, pictures))
    notes = []
    if count < len(ids):
        notes.append(
            f"The image grid shows {len(chosen)} of {len(ids)} prompts: {count} evenly chosen, and those where models "
            "differ most."
        )
    if lost:
        notes.append(f"{lost} {'image' if lost == 1 else 'images'} of the grid can't be found on disk.")
    return tuple(rows), notes


def _most_apart(
    groups: dict[str, list[ImageRow]], models: Sequence[str], scores: dict[str, dict[int, ScoreRow]]
) -> list[str]:
    """The prompts on which models are furthest apart, NUM_APART for each metric, by the first noise of each."""
    found: list[str] = []
    for by_image in scores.values():
        spreads = []
        for prompt_id, rows in groups.items():
            first = min(row.replicate for row in rows)
            by_steps: dict[int, list[float]] = defaultdict(list)
            for row in rows:
                score = by_image.get(row.id or -1)
                if row.replicate == first and row.model in models and score is not None and score.value is not None:
                    by_steps[row.steps].append(score.value)
            apart = max((max(values) - min(values) for values in by_steps.values()), default=0.0)
            spreads.append((-apart, prompt_id))
        found += [prompt_id for _, prompt_id in sorted(spreads)[:NUM_APART]]
    return found


def _scores(row: ImageRow, scores: dict[str, dict[int, ScoreRow]]) -> dict[str, float]:
    found = {}
    for metric, by_image in scores.items():
        score = by_image.get(row.id or -1)
        if score is not None and score.value is not None:
            found[metric] = score.value
    return found


@dataclass(frozen=True, slots=True)
class Carried:
    """A picture in a report. src: its address on the page, quoted. width, height: in pixels, as carried."""

    src: str
    width: int
    height: int


def carry_picture(run: Path, file: str, report: Path) -> Carried:
    """Copy a run's picture into a report folder, at most MAX_SIDE_PX wide and high."""
    data, suffix, size = _read(run, file, MAX_SIDE_PX)
    target = f"{PurePosixPath(file).with_suffix('')}{suffix}"
    (report / target).parent.mkdir(parents=True, exist_ok=True)
    (report / target).write_bytes(data)  # not synced one by one: the folder is moved into place when it is whole
    return Carried(quote(target), *size)


def embed_picture(run: Path, file: str) -> Carried:
    """A run's picture as a data address, at most SMALL_SIDE_PX wide and high."""
    data, suffix, size = _read(run, file, SMALL_SIDE_PX)
    return Carried(f"data:image/{suffix.lstrip('.')};base64,{base64.b64encode(data).decode()}", *size)


def _read(run: Path, file: str, max_side: int) -> tuple[bytes, str, tuple[int, int]]:
    """A picture's bytes, suffix and size: as it is where it is small enough, else smaller as WebP."""
    source = (run / file).resolve()
    if not source.is_relative_to(run.resolve()):
        raise InputError(f"{run / 'ledger.sqlite'} names {file}, which lies outside the run directory")
    try:
        data, suffix = source.read_bytes(), source.suffix
        with Image.open(io.BytesIO(data)) as image:
            size = image.size
            if max(size) > max_side:
                data, suffix, size = _smaller(image, max_side)
    except OSError as error:
        raise InputError(f"can't read {source}: {error}; hypersd-bench verify lists broken images") from error
    return data, suffix, size


def _smaller(image: Image.Image, max_side: int) -> tuple[bytes, str, tuple[int, int]]:
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=90)
    return buffer.getvalue(), ".webp", image.size
