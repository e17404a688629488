"""Who sees what next: coverage, sides, gold and repeats at exact rates, quotas, the adaptive draw."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_design import tiny_design
from user_study.assignment import Given, Tally, kinds_of, next_item, side_balance
from user_study.design import Design

COMPARISONS = (("one", "two"), ("one", "three"), ("two", "three"))


def _session(design: Design, rater: str, load: Counter[str]) -> list[Given]:
    given_items: list[Given] = []
    while (item := next_item(design, rater, given_items, load)) is not None:
        given_items.append(Given(item.pair.id, item.kind, item.a_side, len(given_items)))
        if item.kind == "main":
            load[item.pair.id] += 1
    return given_items


@settings(max_examples=40, deadline=None)
@given(
    num_prompts=st.integers(1, 12),
    num_raters=st.integers(1, 8),
    per_rater=st.integers(1, 30),
    quota=st.none() | st.integers(1, 4),
    policy=st.sampled_from(["balanced", "adaptive"]),
)
def test_coverage_sides_and_quotas_hold(
    num_prompts: int, num_raters: int, per_rater: int, quota: int | None, policy: str
) -> None:
    design = tiny_design(num_prompts, COMPARISONS, pairs_per_rater=per_rater, votes_per_pair=quota, policy=policy)
    load: Counter[str] = Counter({pair.id: 0 for pair in design.pairs})
    for r in range(num_raters):
        items = _session(design, f"rater {r}", load)
        assert len({item.pair_id for item in items}) == len(items) <= per_rater
        assert all(abs(difference) <= 1 for difference in side_balance(design, items).values())
        if quota is None:
            assert len(items) == min(per_rater, len(design.pairs))
        if policy == "balanced":
            assert max(load.values()) - min(load.values()) <= 1
    assert quota is None or max(load.values()) <= quota


@pytest.mark.parametrize(("gold_every", "repeat_every"), [(10, 20), (3, 4), (5, 0), (0, 7), (10, 10)])
def test_gold_and_repeats_come_at_exact_rates(gold_every: int, repeat_every: int) -> None:
    design = tiny_design(
        40, num_gold=80, num_practice=3, practice=3, gold_every=gold_every, repeat_every=repeat_every,
        pairs_per_rater=60,
    )  # fmt: skip
    for r in range(10):
        items = _session(design, f"rater {r}", Counter())
        assert [item.kind for item in items] == list(kinds_of(design, f"rater {r}"))
        assert [item.kind for item in items[:3]] == ["practice"] * 3
        kinds = [item.kind for item in items[3:]]
        assert kinds.count("main") == 60
        for kind, every in (("gold", gold_every), ("repeat", repeat_every)):
            blocks = len(kinds) // every if every else 0
            assert blocks <= kinds.count(kind) <= blocks + bool(every)  # type: ignore[arg-type]
            if every and kind == "gold":
                starts = range(0, len(kinds) - every + 1, every)
                assert all(kinds[start : start + every].count("gold") == 1 for start in starts)


def test_a_repeat_is_an_earlier_pair_with_its_sides_swapped() -> None:
    design = tiny_design(20, repeat_every=5, pairs_per_rater=40)
    items = _session(design, "ann", Counter())
    first = {item.pair_id: item for item in items if item.kind == "main"}
    repeats = [item for item in items if item.kind == "repeat"]
    assert len(repeats) >= 8
    assert len({item.pair_id for item in repeats}) == len(repeats)
    for item in repeats:
        assert first[item.pair_id].position < item.position
        assert first[item.pair_id].a_side != item.a_side
    assert all(item.position - first[item.pair_id].position >= 5 for item in repeats[1:])


def test_sides_of_gold_are_even_too() -> None:
    design = tiny_design(40, num_gold=30, gold_every=3, pairs_per_rater=40)
    sides = [item.a_side for item in _session(design, "ann", Counter()) if item.kind == "gold"]
    assert abs(sides.count("left") - sides.count("right")) <= 1


def test_the_same_state_gives_the_same_item_and_raters_differ() -> None:
    design = tiny_design(10)
    assert next_item(design, "ann", [], {}) == next_item(design, "ann", [], {})
    assert len({next_item(design, f"rater {r}", [], {}).pair.id for r in range(20)}) > 5  # type: ignore[union-attr]


def test_the_adaptive_policy_draws_the_uncertain_comparison_with_the_probability_it_logs() -> None:
    design = tiny_design(200, pairs_per_rater=400, policy="adaptive", uniform_floor=0.2)
    sure, open_ = design.comparisons
    tallies = {sure: Tally(a=400), open_: Tally(a=20, b=20)}
    drawn = [next_item(design, f"rater {r}", [], {}, tallies) for r in range(600)]
    items = [item for item in drawn if item is not None]
    share = sum(item.pair.comparison == open_ for item in items) / len(items)
    logged = {item.pair.comparison: item.propensity for item in items}
    assert sum(logged.values()) == pytest.approx(1)
    assert logged[sure] >= 0.2 / 2
    weights = {name: tallies[name].uncertainty for name in tallies}
    assert logged[open_] == pytest.approx(0.1 + 0.8 * weights[open_] / sum(weights.values()))
    assert share == pytest.approx(logged[open_], abs=4 * (0.25 / 600) ** 0.5)


def test_uncertainty_is_the_beta_posterior_s() -> None:
    from scipy.stats import beta

    assert Tally(7, 3, 2).uncertainty == pytest.approx(beta(9, 5).std())


def test_the_balanced_policy_draws_nothing() -> None:
    item = next_item(tiny_design(3), "ann", [], {})
    assert item is not None
    assert item.propensity == 1
