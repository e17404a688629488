"""Which images a batch holds: a pure function of (seed, images seen so far), so that a resumed run goes on exactly.

One bucket: every epoch is a new permutation of all images, cut wherever the batches fall.

Several buckets, whose images can't share a batch: each bucket is an endless stream of permutations of its own images,
cut into batches; epoch e holds the batches of each stream that are complete by its end and were not by its start, in
shuffled order. With N_b images in bucket b and batches of m, floor(e N_b / m) of its batches lie before epoch e. What
is left of a bucket at the end of an epoch thus opens its first batch in a later one: nothing is dropped, nothing is
seen early, and after any number of epochs an image has been seen that often, or once less while it waits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


def batch_indices(seed: int, count: int, position: int, size: int) -> NDArray[np.int64]:
    """Indices into ``count`` images, (size,) int64: every epoch is a new permutation of all of them."""
    return np.array(
        [_permutation((seed, i // count), count)[i % count] for i in range(position, position + size)], np.int64
    )


@lru_cache(maxsize=128)
def _permutation(key: tuple[int, ...], count: int) -> NDArray[np.int64]:
    return np.random.default_rng(key).permutation(count)


class Slot(NamedTuple):
    """A place in a batch: the ``place``-th of the permutation of epoch ``epoch`` of a bucket."""

    bucket: int
    epoch: int
    place: int


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of the images of some buckets, in batches of one size.

    members: indices of each bucket's images, all non-empty. keys: numbers that name a bucket, for its own randomness.
    """

    members: Sequence[NDArray[np.int64]]
    keys: Sequence[tuple[int, ...]]
    seed: int
    size: int

    def slots(self, position: int) -> list[Slot]:
        """The places of the batch after ``position`` images, all of one bucket.

        With several buckets the order is one of whole batches: a position between two counts as that of the first.
        """
        if len(self.members) == 1:
            count = len(self.members[0])
            return [Slot(0, i // count, i % count) for i in range(position, position + self.size)]
        unit = position // self.size
        epoch = self._epoch_of(unit)
        bucket, batch = self._epoch_batches(epoch)[unit - self._batches_before(epoch)]
        count = len(self.members[bucket])
        first = int(batch) * self.size
        return [Slot(int(bucket), i // count, i % count) for i in range(first, first + self.size)]

    def candidate(self, slot: Slot, skipped: int = 0) -> int:
        """The image of a place, or the one that replaces it when ``skipped`` before it can't be used.

        A replacement is the next in the bucket's permutation, around its end; it is then seen twice in that epoch.
        """
        members = self.members[slot.bucket]
        key = () if len(self.members) == 1 else self.keys[slot.bucket]
        permutation = _permutation((self.seed, slot.epoch, *key), len(members))
        return int(members[permutation[(slot.place + skipped) % len(members)]])

    def _batches_before(self, epoch: int) -> int:
        return sum(epoch * len(members) // self.size for members in self.members)

    def _epoch_of(self, unit: int) -> int:
        num_images = sum(map(len, self.members))
        beyond = (unit + len(self.members) + 1) * self.size // num_images + 2
        return bisect_right(range(beyond), unit, key=self._batches_before) - 1

    def _epoch_batches(self, epoch: int) -> NDArray[np.int64]:
        return _shuffled_batches(tuple(map(len, self.members)), self.seed, self.size, epoch)


@lru_cache(maxsize=4)
def _shuffled_batches(counts: tuple[int, ...], seed: int, size: int, epoch: int) -> NDArray[np.int64]:
    """(bucket, number of the batch in the bucket's stream) of every batch of an epoch, (batches, 2)."""
    batches = [
        (bucket, batch)
        for bucket, count in enumerate(counts)
        for batch in range(epoch * count // size, (epoch + 1) * count // size)
    ]
    return np.random.default_rng([seed, epoch, 1]).permutation(np.array(batches, np.int64).reshape(-1, 2))
