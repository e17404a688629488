"""Noise belongs to an image: neither batch nor order nor anything else changes it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hypersd_bench.seeding import generators, image_seed, starting_noise


def test_seeds_are_pinned() -> None:
    # a change here would silently unpair every new image from every old one
    assert image_seed(0, "p00000", 0) == 7937696197604581360
    others = [(1, "p00000", 0), (0, "p0000", 0), (0, "p00000", 1), (0, "p0000", 1)]
    assert len({image_seed(0, "p00000", 0), *(image_seed(*other) for other in others)}) == 5


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6, unique=True), st.randoms())
def test_noise_is_independent_of_batch_and_order(seeds: list[int], random: object) -> None:
    together = starting_noise(generators(seeds), (2, 3, 3))
    shuffled = list(range(len(seeds)))
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again = starting_noise(generators([seeds[i] for i in shuffled]), (2, 3, 3))
    for position, i in enumerate(shuffled):
        assert torch.equal(again[position], together[i])
        assert torch.equal(starting_noise(generators([seeds[i]]), (2, 3, 3))[0], together[i])
