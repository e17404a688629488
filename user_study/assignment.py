"""Who sees which pair next, and on which side: a pure function of the state, so that it can be tested and repeated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Literal

from user_study.design import Pair

Side = Literal["left", "right"]


def next_pair(
    pairs: Sequence[Pair], coverage: Mapping[str, int], seen: Mapping[str, Side], rater: str
) -> tuple[Pair, Side] | None:
    """Choose a rater's next pair and the side its image ``a`` goes to; None when the rater has seen all.

    coverage: how often each pair was given out, to anybody. seen: the rater's pairs so far and where ``a`` was.
    Least covered first, then the method pair this rater met least; ties go by a lot of rater and pair.
    """
    unseen = [pair for pair in pairs if pair.id not in seen]
    if not unseen:
        return None
    met = Counter(pair.methods for pair in pairs if pair.id in seen)
    pair = min(unseen, key=lambda p: (coverage.get(p.id, 0), met[p.methods], _lot("order", rater, p.id)))
    return pair, _side(pair, pairs, seen, rater)


def side_balance(pairs: Sequence[Pair], seen: Mapping[str, Side]) -> Counter[tuple[str, str]]:
    """How often ``a`` was left minus how often it was right, by method pair."""
    balance: Counter[tuple[str, str]] = Counter()
    for pair in pairs:
        if pair.id in seen:
            balance[pair.methods] += 1 if seen[pair.id] == "left" else -1
    return balance


def _side(pair: Pair, pairs: Sequence[Pair], seen: Mapping[str, Side], rater: str) -> Side:
    """Even out the method pair's sides for this rater; where they are even, a lot decides (blocks of two)."""
    balance = side_balance(pairs, seen)[pair.methods]
    if balance == 0:
        return "left" if _lot("side", rater, pair.id)[0] % 2 else "right"
    return "left" if balance < 0 else "right"


def _lot(*parts: str) -> bytes:
    return blake2b("\x1f".join(parts).encode(), digest_size=8).digest()
