"""A small design that belongs to no run, for tests of what is handed out and voted on."""

from __future__ import annotations

from typing import Any

from user_study.design import Arm, Configuration, Design, Pair, Rules, Session

SESSION: dict[str, Any] = {"practice": 0, "gold_every": 0, "repeat_every": 0}


def make_pairs(num_prompts: int, comparisons: tuple[tuple[str, str], ...], prefix: str = "") -> tuple[Pair, ...]:
    """``num_prompts`` pairs of each comparison, at four steps."""
    pairs: list[Pair] = []
    for p in range(num_prompts):
        for a, b in comparisons:
            arms = [Arm(Configuration(name, 4), f"images/{name}/{p}.png", "0" * 64) for name in (a, b)]
            pairs.append(Pair(f"{prefix}{len(pairs) + 1:04d}", f"p{p:04d}", f"prompt {p}", 0, *arms))
    return tuple(pairs)


def tiny_design(
    num_prompts: int = 4,
    comparisons: tuple[tuple[str, str], ...] = (("one", "two"), ("one", "three")),
    criteria: tuple[str, ...] = ("overall",),
    num_gold: int = 0,
    num_practice: int = 0,
    **session: Any,
) -> Design:
    """A design that belongs to no run."""
    pairs = make_pairs(num_prompts, comparisons)
    values: dict[str, Any] = {"pairs_per_rater": len(pairs), "votes_per_pair": None, **SESSION, **session}
    return Design(
        run="0" * 64,
        seed=0,
        criteria=criteria,
        wording={"en": {"title": "", "consent": [], "instructions": [], "questions": dict.fromkeys(criteria, "?")}},
        session=Session(**values),
        pairs=pairs,
        gold=make_pairs(num_gold, (("one", "one"),), "g"),
        practice=make_pairs(num_practice, (("one", "one"),), "t"),
        rules=Rules(),
    )
