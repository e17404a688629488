"""Assignment: never a pair twice, least covered first, sides even, and the same again from the same state."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from user_study.assignment import Side, next_pair, side_balance
from user_study.design import Arm, Pair

MODELS = ("lcm", "tcd", "lightning")


def _pairs(count: int) -> list[Pair]:
    def arm(model: str) -> Arm:
        return Arm(model, 4, "x.png", "0" * 64)

    return [Pair(f"{i:04d}", f"p{i}", "a fox", 0, arm("hyper-sd"), arm(MODELS[i % 3])) for i in range(count)]


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 12), turns=st.lists(st.sampled_from(["ann", "ben", "cho", "dee"]), max_size=40))
def test_invariants_hold_after_every_turn(count: int, turns: list[str]) -> None:
    pairs = _pairs(count)
    coverage: Counter[str] = Counter()
    seen: dict[str, dict[str, Side]] = {}
    for rater in turns:
        mine = seen.setdefault(rater, {})
        chosen = next_pair(pairs, coverage, mine, rater)
        assert chosen == next_pair(pairs, dict(coverage), dict(mine), rater)
        if chosen is None:
            assert len(mine) == count
            continue
        pair, side = chosen
        assert pair.id not in mine
        assert coverage[pair.id] == min(coverage[other.id] for other in pairs if other.id not in mine)
        mine[pair.id] = side
        coverage[pair.id] += 1
        assert max(map(abs, side_balance(pairs, mine).values())) <= 1


def test_a_lone_rater_meets_all_method_pairs_evenly() -> None:
    pairs = _pairs(12)
    seen: dict[str, Side] = {}
    for _ in range(6):
        chosen = next_pair(pairs, Counter(seen), seen, "ann")
        assert chosen is not None
        seen[chosen[0].id] = chosen[1]
    assert set(Counter(pair.methods for pair in pairs if pair.id in seen).values()) == {2}


def test_sides_and_orders_differ_between_raters() -> None:
    pairs = _pairs(9)
    first = [next_pair(pairs, {}, {}, f"rater {i}") for i in range(60)]
    sides = Counter(choice[1] for choice in first if choice)
    assert min(sides["left"], sides["right"]) >= 15
    assert len({choice[0].id for choice in first if choice}) >= 5
