"""Sound documents and bytes made unsound, by a seed; and how many tries the default suite and the nightly one give."""

from __future__ import annotations

import copy
import random
from typing import Any

from hypothesis import HealthCheck, settings

FEW = settings(max_examples=25, derandomize=True, deadline=None, database=None,
               suppress_health_check=list(HealthCheck))  # fmt: skip
MANY = settings(FEW, max_examples=2000, derandomize=False)

JUNK: tuple[Any, ...] = (
    None, True, 0, -1, 1e308, float("nan"), "", "x" * 300, "../../etc", "\x00", "<script>", "{0}", "%s", "٣", [], {},
    [[]], {"": None}, [None], 10**30,
)  # fmt: skip


def mutated(document: Any, seed: int) -> Any:
    """The document with one to three of its places replaced by junk, dropped, doubled or renamed."""
    rng = random.Random(seed)
    changed = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        holders = list(_holders(changed))
        if not holders:
            return rng.choice(JUNK)
        holder, key = rng.choice(holders)
        change = rng.randrange(4)
        if change == 0:
            del holder[key]
        elif change == 1 and isinstance(holder, dict):
            holder[f"{key}x"] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(rng.choice(JUNK))
    return changed if rng.random() < 0.97 else rng.choice(JUNK)


def _holders(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [(value, key) for key in keys] + [pair for key in keys for pair in _holders(value[key])]


def garbled(data: bytes, seed: int) -> bytes:
    """The bytes cut short, with some changed, or with some put in between."""
    rng = random.Random(seed)
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(changed) + 1)
        change = rng.randrange(3)
        if change == 0:
            del changed[at:]
        elif change == 1 and at < len(changed):
            changed[at] = rng.randrange(256)
        else:
            changed[at:at] = rng.randbytes(rng.randint(1, 20))
    return bytes(changed)
