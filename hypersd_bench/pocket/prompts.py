"""Prompt sets in the miniature's language: distinct captions of scenes, half of them with two emoji."""

from __future__ import annotations

from itertools import islice

from hypersd_bench.pocket.scenes import sample_scene
from hypersd_bench.prompts import Prompt, PromptSet

_SEEDS = {"held-out": 20_000_000, "train": 30_000_000}
COUNT = 96  # distinct captions; the held-out split has 12 with one emoji and 96 with two


def held_out_prompts() -> PromptSet:
    """Captions of combinations that no training has seen."""
    return _captions("held-out")


def train_prompts() -> PromptSet:
    """Captions of combinations that training has seen, of scenes it has not."""
    return _captions("train")


def _captions(split: str) -> PromptSet:
    seen: dict[str, None] = {}
    seed = _SEEDS[split]
    while len(seen) < COUNT:
        seen[sample_scene(seed, split).caption] = None
        seed += 1
    captions = islice(seen, COUNT)
    return PromptSet(f"pocket/{split}", tuple(Prompt(f"p{i:05d}", caption) for i, caption in enumerate(captions)))
