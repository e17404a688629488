"""The image grid: which prompts are shown, and the pictures a report folder carries so that it can be moved."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import nsmallest
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from PIL import Image

from hypersd_bench.errors import InputError
from hypersd_bench.store import ImageRow
from metrics.comparison import Cell, View
from reports.strings import Said, counted, say

MAX_PICTURES = 1200  # of the grid, or of MIN_PROMPTS: what a page shows at ease, and half a minute carries
MAX_PROMPTS, MIN_PROMPTS = 64, 12
MAX_SIDE_PX = 512  # larger pictures are carried at this size, as WebP
SMALL_SIDE_PX = 256  # the same, in a single file
NUM_APART = 6  # prompts for each metric, where models differ most
MAX_NOISES, NUM_NOISE_ROWS = 8, 6


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of the report. file: relative to its run's folder. scores: by metric id. defect: see ImageRow."""

    run: int
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
        return _spread((p.steps, p.scores[metric]) for p in self.pictures if metric in p.scores)

    def picture(self, model: str, steps: int) -> Picture | None:
        """The picture of a model at a step count, when there is one."""
        return next((p for p in self.pictures if (p.model, p.steps) == (model, steps)), None)


@dataclass(frozen=True, slots=True)
class NoiseRow:
    """One prompt from several noises, by model: what shows whether a model still draws different pictures."""

    prompt_id: str
    prompt: str
    steps: int
    pictures: dict[str, tuple[Picture, ...]]


def choose_prompts(view: View) -> tuple[tuple[PromptRow, ...], list[Said]]:
    """Choose prompts evenly over the runs, and those where models differ most; the first noise of each.

    Says beside what is not shown.
    """
    images = _by_prompt(view)
    ids = sorted(images)
    room = max(MIN_PROMPTS, min(MAX_PROMPTS, MAX_PICTURES // len(view.cells)))
    apart = _most_apart(view)[: room // 3] if room < len(ids) else []
    count = min(len(ids), room - len(apart))
    evenly = [ids[i * len(ids) // count] for i in range(count)]
    chosen = list(dict.fromkeys([*evenly, *apart]))
    rows, lost = [], 0
    for prompt_id in chosen:
        first = min(row.replicate for _, row in images[prompt_id])
        same_noise = [(cell, row) for cell, row in images[prompt_id] if row.replicate == first]
        kept = [(cell, row) for cell, row in same_noise if (view.origin(cell)[0].folder / row.file).is_file()]
        lost += len(same_noise) - len(kept)
        _, any_row = same_noise[0]
        pictures = tuple(_picture(view, cell, row) for cell, row in kept)
        rows.append(PromptRow(prompt_id, any_row.prompt, first, any_row.seed, pictures))
    notes = []
    if count < len(ids):
        notes.append(say("note.grid", shown=len(chosen), of=len(ids), evenly=count))
    if lost:
        notes.append(say("note.lost", images=counted(lost, "image")))
    return tuple(rows), notes


def choose_noises(view: View) -> tuple[NoiseRow, ...]:
    """Choose prompts that were drawn from several noises, at the fewest steps, where diversity suffers first."""
    steps = min(steps for _, steps in view.cells)
    images = _by_prompt(view)
    several = [p for p in sorted(images) if len({row.replicate for cell, row in images[p] if cell[1] == steps}) > 1]
    count = min(len(several), NUM_NOISE_ROWS)
    rows = []
    for prompt_id in (several[i * len(several) // count] for i in range(count)):
        pictures: dict[str, list[Picture]] = defaultdict(list)
        for cell, row in images[prompt_id]:
            is_there = cell[1] == steps and (view.origin(cell)[0].folder / row.file).is_file()
            if is_there and len(pictures[cell[0]]) < MAX_NOISES:
                pictures[cell[0]].append(_picture(view, cell, row))
        shown = {model: tuple(mine) for model, mine in pictures.items() if mine}
        rows.append(NoiseRow(prompt_id, images[prompt_id][0][1].prompt, steps, shown))
    return tuple(rows)


def _by_prompt(view: View) -> dict[str, list[tuple[Cell, ImageRow]]]:
    """All images by prompt, each with its configuration, in the order of configurations and noises."""
    found: dict[str, list[tuple[Cell, ImageRow]]] = defaultdict(list)
    for cell in view.cells:
        for row in view.images[cell]:
            found[row.prompt_id].append((cell, row))
    return found


def _picture(view: View, cell: Cell, row: ImageRow) -> Picture:
    key = (row.prompt_id, row.replicate)
    scores = {
        info.id: view.values(info.id, cell)[key]
        for info in view.infos
        if info.per_image and key in view.values(info.id, cell)
    }
    return Picture(view.stores.index(view.origin(cell)[0]), *cell, row.file, scores, row.defect)


def _most_apart(view: View) -> list[str]:
    """The prompts on which models are furthest apart by the first noise, the metrics' own in turn."""
    furthest = []
    for info in (info for info in view.infos if info.per_image):
        values: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for cell in view.cells:
            for (prompt_id, replicate), value in view.values(info.id, cell).items():
                if replicate == 0:
                    values[prompt_id].append((cell[1], value))
        spreads = [(-(_spread(of_prompt) or 0.0), prompt_id) for prompt_id, of_prompt in values.items()]
        furthest.append([prompt_id for _, prompt_id in nsmallest(NUM_APART, spreads)])
    in_turn = (prompt_id for rank in zip_longest(*furthest) for prompt_id in rank if prompt_id)
    return list(dict.fromkeys(in_turn))


def _spread(values: Iterable[tuple[int, float]]) -> float | None:
    """The largest difference of two values of one step count; None where no step count has two."""
    by_steps: dict[int, list[float]] = defaultdict(list)
    for steps, value in values:
        by_steps[steps].append(value)
    return max((max(mine) - min(mine) for mine in by_steps.values() if len(mine) > 1), default=None)


@dataclass(frozen=True, slots=True)
class Carried:
    """A picture in a report. src: its address on the page, quoted. width, height: in pixels, as carried."""

    src: str
    width: int
    height: int


def carry_picture(run: Path, file: str, report: Path, under: str = "") -> Carried:
    """Copy a run's picture into a report folder, at most MAX_SIDE_PX wide and high; ``under`` a folder of that run."""
    data, suffix, size = _read(run, file, MAX_SIDE_PX)
    target = f"{PurePosixPath(under, file).with_suffix('')}{suffix}"
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
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a PNG's chunks
        raise InputError(f"can't read {source}: {error}; hypersd-bench verify lists broken images") from error
    return data, suffix, size


def _smaller(image: Image.Image, max_side: int) -> tuple[bytes, str, tuple[int, int]]:
    # gap 1: by whole factors pixels are averaged, which is twice as fast; the rest is Lanczos's
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=1.0)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=90, method=2)  # three times as fast as the usual 4
    return buffer.getvalue(), ".webp", image.size
