"""Prompt sets in the miniature's language: distinct captions of scenes, half of them with two emoji."""

from __future__ import annotations

from itertools import islice

from hypersd_bench.pocket.scenes import sample_scene
from hypersd_bench.prompts import PromptSet, PromptSource

_SEEDS = {"held-out": 20_000_000, "train": 30_000_000}
COUNT = 96  # distinct captions; the held-out split has 12 with one emoji and 96 with two


def held_out_prompts() -> PromptSet:
    """Captions of combinations that no training has seen."""
    return HELD_OUT.load()


def _captions(split: str) -> list[tuple[str, str]]:
    seen: dict[str, None] = {}
    seed = _SEEDS[split]
    while len(seen) < COUNT:
        seen[sample_scene(seed, split).caption] = None
        seed += 1
    return [(caption, "") for caption in islice(seen, COUNT)]


HELD_OUT = PromptSource(
    id="pocket/held-out",
    count=COUNT,
    license="Apache-2.0",
    url="",
    parse=lambda _: _captions("held-out"),
    prompts_sha256="b4c6a89a4729ff8f7312e761dd040e25ca079836a8fcb27722ca27cce1eae5c5",
    note="the miniature's language; combinations that no training has seen",
)
TRAIN = PromptSource(
    id="pocket/train",
    count=COUNT,
    license="Apache-2.0",
    url="",
    parse=lambda _: _captions("train"),
    prompts_sha256="3d29fedef1f1e7783149ffbd83e0ccf5898aa81ce4505f4b55ae907662800773",
    note="the miniature's language; combinations that training has seen",
)
