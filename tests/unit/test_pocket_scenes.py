"""Scenes: what a caption says is what the picture holds, and held-out means held out."""

from __future__ import annotations

from hashlib import blake2b
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypersd_bench.errors import InputError
from hypersd_bench.pocket.checker import MIN_CELLS, cell_classes, read_cells
from hypersd_bench.pocket.scenes import (
    BACKGROUND_NAMES,
    BACKGROUNDS,
    CONCEPT_NAMES,
    SIZE,
    Scene,
    held_out,
    parse_caption,
    render,
    sample_scene,
    scenes,
)

seeds = st.integers(0, 2**40)
splits = st.sampled_from(["train", "held-out"])


@given(st.lists(st.sampled_from(CONCEPT_NAMES), min_size=1, max_size=2), st.sampled_from(BACKGROUND_NAMES))
def test_every_caption_reads_back_as_what_it_says(concepts: list[str], background: str) -> None:
    scene = Scene(tuple(concepts), background, 0)
    assert parse_caption(scene.caption) == (scene.concepts, background)


def test_captions_are_english() -> None:
    assert Scene(("octopus", "fox"), "green", 1).caption == "an octopus left of a fox on a green background"


@pytest.mark.parametrize(
    "caption",
    ["", "a fox", "a fox on a green", "a dragon on a green background", "a fox on a mauve background",
     "a fox left of a pizza left of a car on a blue background"],
)  # fmt: skip
def test_a_caption_of_another_world_is_refused_with_an_example(caption: str) -> None:
    with pytest.raises(InputError, match="write 'a fox on a green background'"):
        parse_caption(caption)


@settings(max_examples=40)
@given(seeds, splits)
def test_masks_lie_inside_side_by_side_and_big_enough_to_check(seed: int, split: str) -> None:
    scene = sample_scene(seed, split)
    masks = render(scene).masks
    assert masks.shape == (len(scene.concepts), SIZE, SIZE)
    assert masks.min() >= 0
    assert masks.max() <= 1
    assert masks.sum(0).max() <= 1, "emoji overlap"
    centres = [float((mask.sum(0) * np.arange(SIZE)).sum() / mask.sum()) for mask in masks]
    assert centres == sorted(centres), "the first concept is not the left one"
    cells = cell_classes(scene, masks)
    assert all((cells == CONCEPT_NAMES.index(name)).sum() >= 2 * MIN_CELLS for name in scene.concepts)


@settings(max_examples=40)
@given(seeds, splits)
def test_outside_the_masks_there_is_only_the_shaded_background(seed: int, split: str) -> None:
    scene = sample_scene(seed, split)
    rendered = render(scene)
    empty = rendered.masks.sum(0) == 0
    base, picture = np.array(BACKGROUNDS[scene.background]), rendered.image[empty].astype(int)
    shade = 0.14 * 2**0.5 + 1e-9  # the deepest gradient, in a corner
    ringing = 8  # gray levels that the scaling filter may leave just outside an emoji
    assert (picture >= base * (1 - shade) - ringing).all()
    assert (picture <= base * (1 + shade) + ringing).all()


@settings(max_examples=40)
@given(seeds, splits)
def test_true_masks_read_as_exactly_the_scene(seed: int, split: str) -> None:
    scene = sample_scene(seed, split)
    reading = read_cells(cell_classes(scene, render(scene).masks).astype(np.int64))
    assert (reading.concepts, reading.background) == (scene.concepts, scene.background)


@given(seeds, splits)
def test_a_split_draws_only_its_own_combinations(seed: int, split: str) -> None:
    scene = sample_scene(seed, split)
    assert held_out(scene.concepts, scene.background) == (split == "held-out")


def test_an_unordered_pair_is_held_out_whole_on_every_background() -> None:
    for pair in permutations(CONCEPT_NAMES, 2):
        assert len({held_out(order, b) for order in (pair, pair[::-1]) for b in BACKGROUND_NAMES}) == 1


def test_every_concept_and_background_is_seen_in_training_and_held_out_somewhere() -> None:
    singles = [(name, background) for name in CONCEPT_NAMES for background in BACKGROUND_NAMES]
    kept = [pair for pair in singles if held_out((pair[0],), pair[1])]
    assert len(kept) * 8 == len(singles)
    seen = set(singles) - set(kept)
    assert {name for name, _ in seen} == set(CONCEPT_NAMES)
    assert {background for _, background in seen} == set(BACKGROUND_NAMES)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(InputError, match="train and held-out"):
        sample_scene(0, "test")


def test_the_same_seeds_give_the_same_bytes_as_ever() -> None:
    digest = blake2b(digest_size=8)
    for scene in scenes(0, 8):
        digest.update(scene.caption.encode())
        digest.update(render(scene).image.tobytes())
    assert digest.hexdigest() == "0e0fcc996126c29f"
