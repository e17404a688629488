"""Pictures to look at while training: grids of the same prompts and noise, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from hypersd_bench import registry
from hypersd_bench.pipelines import Pipeline
from hypersd_bench.prompts import Prompt
from hypersd_bench.store import write_bytes

NUM_PROMPTS = 8
SCENE_PROMPTS = "pocket/train"  # not the held-out ones, which results are measured on
# Ours: one of each thing that few steps are known to spoil (hands, text, counts, fine texture, composition, style).
PROMPTS = (
    "a portrait photo of an old fisherman with weathered skin, soft window light",
    "two hands holding a steaming cup of coffee, close up",
    "a red cube on top of a blue sphere on a wooden table",
    "three green apples in a row on a white plate",
    "a shop window with the word OPEN painted on the glass",
    "a watercolour painting of a lighthouse in a storm",
    "macro photo of a dragonfly's wing covered in dew",
    "an aerial view of a city at night after rain",
)


def looking_prompts(pipe: Pipeline) -> tuple[Prompt, ...]:
    """What to draw while training: scenes for a base that draws scenes, else prompts for any photographic base."""
    if speaks_scenes(pipe):
        prompts: tuple[Prompt, ...] = registry.resolve("prompts", SCENE_PROMPTS).load().prompts[:NUM_PROMPTS]
        return prompts
    return tuple(Prompt(f"p{i:05d}", text) for i, text in enumerate(PROMPTS))


def speaks_scenes(pipe: Pipeline) -> bool:
    """Whether a base was trained on the miniature's captions: its tokenizer knows little else."""
    return len(pipe.tokenizer) < 1000


def write_grid(path: Path, rows: Sequence[Tensor]) -> None:
    """Write rows of images (N, 3, H, W) uint8 as one PNG."""
    buffer = BytesIO()
    as_grid(rows).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def as_grid(rows: Sequence[Tensor]) -> Image.Image:
    """Rows of images (N, 3, H, W) uint8 as one picture."""
    grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)  # (3, rows x H, N x W)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())
