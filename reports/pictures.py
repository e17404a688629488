"""The image grid: which prompts are shown, and the pictures a report folder carries so that it can be moved."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from hypersd_bench.errors import InputError
from hypersd_bench.store import ImageRow, RunStore, ScoreRow

MAX_PROMPTS = 64
MAX_SIDE_PX = 512  # larger pictures are carried at this size, as WebP


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

    def picture(self, model: str, steps: int) -> Picture | None:
        """The picture of a model at a step count, when there is one."""
        return next((p for p in self.pictures if (p.model, p.steps) == (model, steps)), None)


def choose_prompts(
    store: RunStore, images: Sequence[ImageRow], models: Sequence[str]
) -> tuple[tuple[PromptRow, ...], list[str]]:
    """Choose up to MAX_PROMPTS prompts evenly over the run, first noise of each, and say what is not shown."""
    groups: dict[str, list[ImageRow]] = defaultdict(list)
    for row in images:
        groups[row.prompt_id].append(row)
    ids = sorted(groups)
    count = min(len(ids), MAX_PROMPTS)
    chosen = [ids[i * len(ids) // count] for i in range(count)]
    scores = {metric: store.scores(metric) for metric in store.scored_metrics()}
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
    notes = [f"The image grid shows {count} of {len(ids)} prompts, evenly chosen."] if count < len(ids) else []
    if lost:
        notes.append(f"{lost} {'image' if lost == 1 else 'images'} of the grid can't be found on disk.")
    return tuple(rows), notes


def _scores(row: ImageRow, scores: dict[str, dict[int, ScoreRow]]) -> dict[str, float]:
    found = {}
    for metric, by_image in scores.items():
        score = by_image.get(row.id or -1)
        if score is not None and score.value is not None:
            found[metric] = score.value
    return found


@dataclass(frozen=True, slots=True)
class Carried:
    """A picture in a report folder. path: relative to it. width, height: in pixels, as carried."""

    path: str
    width: int
    height: int


def carry_picture(run: Path, file: str, report: Path) -> Carried:
    """Copy a run's picture into a report folder, at most MAX_SIDE_PX wide and high."""
    source = (run / file).resolve()
    if not source.is_relative_to(run.resolve()):
        raise InputError(f"{run / 'ledger.sqlite'} names {file}, which lies outside the run directory")
    try:
        data, suffix = source.read_bytes(), source.suffix
        with Image.open(io.BytesIO(data)) as image:
            size = image.size
            if max(size) > MAX_SIDE_PX:
                data, suffix, size = _smaller(image)
    except OSError as error:
        raise InputError(f"can't read {source}: {error}; hypersd-bench verify lists broken images") from error
    target = f"{PurePosixPath(file).with_suffix('')}{suffix}"
    (report / target).parent.mkdir(parents=True, exist_ok=True)
    (report / target).write_bytes(data)  # not synced one by one: the folder is moved into place when it is whole
    return Carried(target, *size)


def _smaller(image: Image.Image) -> tuple[bytes, str, tuple[int, int]]:
    image.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=90)
    return buffer.getvalue(), ".webp", image.size
