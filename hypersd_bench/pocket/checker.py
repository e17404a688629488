"""Stage ``checker``: says which emoji a picture shows, in which order, on which background.

A small fully convolutional network names each of 16x16 cells, taught by the scenes' exact masks. It shares nothing
with the CLIP and the aesthetic head, so a student trained to please those can't please it by the same trick.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn
from tqdm import tqdm

from hypersd_bench.errors import InputError
from hypersd_bench.pocket.pictures import Pictures, as_float, flawed, weights_file
from hypersd_bench.pocket.scenes import BACKGROUND_NAMES, CONCEPT_NAMES, SIZE, Scene, render, scenes
from hypersd_bench.pocket.training import Schedule, fit
from hypersd_bench.sampling import read_safetensors_metadata
from hypersd_bench.store import write_bytes

CELLS = 16  # cells on a side, 4x4 pixels each
CLASSES = (*CONCEPT_NAMES, *BACKGROUND_NAMES)
NUM_LABELLED = 10_000  # scenes rendered with their masks; more teach it nothing new
MIN_CELLS = 6  # half of the least that an emoji covers (12 cells: a banana in a pair); less is a smudge, not an emoji
WEIGHTS_FILE = "checker.safetensors"
_NEIGHBOURS = np.ones((3, 3), int)  # cells that touch at a corner belong together


@dataclass(frozen=True, slots=True)
class Reading:
    """What a picture shows: concepts from left to right (one entry for each separate emoji) and the background."""

    concepts: tuple[str, ...]
    background: str

    def matches(self, concepts: tuple[str, ...], background: str) -> Match:
        """Compare with what was asked for."""
        return Match(
            concept_ok=sorted(self.concepts) == sorted(concepts),
            order_ok=self.concepts == concepts,
            background_ok=self.background == background,
        )


@dataclass(frozen=True, slots=True)
class Match:
    """Concept: exactly the emoji asked for. Order: also from left to right as asked. Background: the one asked for."""

    concept_ok: bool
    order_ok: bool
    background_ok: bool

    @property
    def all_ok(self) -> bool:
        """Say whether everything is right."""
        return self.order_ok and self.background_ok


class CellNet(nn.Module):
    """(N, 3, 64, 64) in [0, 1] to class logits of 16x16 cells; about 280,000 parameters."""

    def __init__(self, width: int = 64) -> None:
        """Build it untrained."""
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 4, stride=2, padding=1), nn.GroupNorm(8, width // 2), nn.SiLU(),
            nn.Conv2d(width // 2, width, 4, stride=2, padding=1),
        )  # fmt: skip
        # dilation lets a cell see the whole emoji around it
        self.blocks = nn.ModuleList(_block(width, dilation) for dilation in (1, 2, 4))
        self.head = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, len(CLASSES), 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes, 16, 16)."""
        x = self.stem(2 * x - 1)
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.head(x)
        return logits


def _block(width: int, dilation: int) -> nn.Sequential:
    return nn.Sequential(
        nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation),
        nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
    )  # fmt: skip


@dataclass(frozen=True)
class Checker:
    """The concept checker, ready to read pictures."""

    net: CellNet

    @torch.no_grad()
    def read(self, images: Tensor) -> list[Reading]:
        """Read images (N, 3, 64, 64) uint8."""
        device = next(self.net.parameters()).device
        logits = [self.net(as_float(part, device)) for part in images.split(256)]
        return [read_cells(cells) for cells in torch.cat(logits).argmax(1).cpu().numpy()]


def read_cells(cells: NDArray[np.int64]) -> Reading:
    """Read a map of classes (16, 16): every connected patch of at least MIN_CELLS cells of a concept is an emoji."""
    found = []
    for number, concept in enumerate(CONCEPT_NAMES):
        patches, count = ndimage.label(cells == number, structure=_NEIGHBOURS)
        for patch in range(1, count + 1):
            columns = np.nonzero(patches == patch)[1]
            if len(columns) >= MIN_CELLS:
                found.append((float(columns.mean()), concept))
    backgrounds = np.bincount(cells.ravel(), minlength=len(CLASSES))[len(CONCEPT_NAMES) :]
    return Reading(tuple(concept for _, concept in sorted(found)), BACKGROUND_NAMES[int(backgrounds.argmax())])


def cell_classes(scene: Scene, masks: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The true map of classes (16, 16): an emoji where it covers more than half of the cell, else the background."""
    cells = np.full((CELLS, CELLS), CLASSES.index(scene.background), np.uint8)
    side = SIZE // CELLS
    for concept, mask in zip(scene.concepts, masks, strict=True):
        cover = mask.reshape(CELLS, side, CELLS, side).mean((1, 3))
        cells[cover > 0.5] = CLASSES.index(concept)
    return cells


def labelled_pool(folder: Path, count: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Render training scenes once and keep them: images (count, 64, 64, 3) and cells (count, 16, 16), uint8."""
    path = folder / f"labelled-{count}.npz"
    if not path.exists():
        images, cells = np.empty((count, SIZE, SIZE, 3), np.uint8), np.empty((count, CELLS, CELLS), np.uint8)
        for i, scene in enumerate(tqdm(scenes(0, count), total=count, desc="pocket masks")):
            rendered = render(scene)
            images[i], cells[i] = rendered.image, cell_classes(scene, rendered.masks)
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, images=images, cells=cells)
        os.replace(partial, path)
    with np.load(path) as arrays:
        return arrays["images"], arrays["cells"]


def train_checker(
    folder: Path, schedule: Schedule, pool_size: int, device: torch.device, vae: AutoencoderKL | None = None
) -> tuple[Checker, dict[str, Any]]:
    """Train on rendered scenes, part of them through ``vae``; returns the checker and the facts of the training."""
    count = min(pool_size, NUM_LABELLED)
    images, cells = labelled_pool(folder, count)
    pictures = Pictures(images, vae, folder)
    torch.manual_seed(0)
    net = CellNet().to(device)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([step, 5])
        index = rng.integers(count, size=schedule.batch_size)
        target = torch.from_numpy(cells[index]).to(device).long()
        logits = net(flawed(pictures.draw(index, rng, device), rng)).float()
        right = (logits.argmax(1) == target).float().mean()
        return F.cross_entropy(logits, target), {"cells_right": float(right)}

    facts = fit("checker", net, loss_at, schedule, folder, device)
    return Checker(net), facts


def save_checker(checker: Checker, folder: Path) -> None:
    """Write the checker's weights in half precision."""
    tensors = {name: value.detach().cpu().half().contiguous() for name, value in checker.net.state_dict().items()}
    write_bytes(folder / WEIGHTS_FILE, safetensors.torch.save(tensors, {"classes": " ".join(CLASSES)}))


def load_checker(folder: Path, device: torch.device | str = "cpu") -> Checker:
    """Load the checker; raises InputError when its file is missing, broken or of another world."""
    path = weights_file(folder, WEIGHTS_FILE, "checker")
    if read_safetensors_metadata(path).get("classes") != " ".join(CLASSES):
        raise InputError(f"{path} was trained for other emoji; build it again with: hypersd-bench pocket build")
    net = CellNet()
    net.load_state_dict(safetensors.torch.load_file(path))
    return Checker(net.eval().requires_grad_(False).to(device))
