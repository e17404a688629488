"""Votes needed: the published table, simulation, and what can't be shown."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, logit

from metrics.preference import two_way_rate
from metrics.vote_power import intraclass, plan_votes, smallest_rate


@pytest.mark.parametrize(
    ("rate", "votes", "six"),
    [(0.529, 2331, None), (0.55, 783, 1209), (0.6, 194, 300), (0.631, 112, None), (0.65, 85, 132), (0.7, 47, None),
     (0.75, 29, None)],
)  # fmt: skip
def test_independent_votes_are_the_textbook_s(rate: float, votes: int, six: int | None) -> None:
    """Two-sided alpha .05, power .8, and for six comparisons alpha / 6: the usual normal approximation."""
    plan = plan_votes(rate, 10**9, 10**9, icc_rater=0, icc_prompt=0)
    assert plan.independent == plan.votes == votes
    assert plan_votes(1 - rate, 10, 10, icc_rater=0, icc_prompt=0).independent == votes
    if six:
        assert plan_votes(rate, 10, 10, icc_rater=0, icc_prompt=0, num_comparisons=6).independent == six


def test_the_design_effect_is_kish_s() -> None:
    plan = plan_votes(0.6, 30, 40, icc_rater=0.02, icc_prompt=0.05)
    assert plan.votes is not None
    effect = 1 + (plan.votes / 30 - 1) * 0.02 + (plan.votes / 40 - 1) * 0.05
    assert plan.votes == pytest.approx(plan.independent * effect, abs=1)
    assert plan.votes_per_rater == -(-plan.votes // 30)
    assert plan.votes_per_prompt == plan.votes / 40


def test_what_these_raters_can_t_show_says_how_many_could() -> None:
    plan = plan_votes(0.52, 30, 40, icc_rater=0.05, icc_prompt=0.1)
    assert plan.votes is None
    assert plan.reason is not None
    raters, prompts = (int(word) for word in plan.reason.split("at least")[1].split() if word.isdigit())
    assert plan_votes(0.52, raters, prompts, icc_rater=0.05, icc_prompt=0.1).votes is not None


def test_the_smallest_rate_is_the_plan_turned_round() -> None:
    plan = plan_votes(0.6, 30, 40, icc_rater=0.02, icc_prompt=0.05)
    assert plan.votes is not None
    rate = smallest_rate(plan.votes, 30, 40, icc_rater=0.02, icc_prompt=0.05)
    assert rate == pytest.approx(0.6, abs=0.001)
    assert smallest_rate(1, 1, 1, icc_rater=0, icc_prompt=0) == 1


@pytest.mark.parametrize("rate", [0.5, 0, 1, -1])
def test_no_preference_can_t_be_planned_for(rate: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        plan_votes(rate, 10, 10, icc_rater=0, icc_prompt=0)


def test_the_intraclass_correlation_of_simulated_clusters() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(0, 0.5, (2000, 1)) + rng.normal(0, 1, (2000, 10))).ravel()
    clusters = np.repeat([str(i) for i in range(2000)], 10).tolist()
    assert intraclass(x, clusters) == pytest.approx(0.25 / 1.25, abs=0.03)
    assert intraclass(rng.normal(size=20_000), clusters) < 0.02
    assert intraclass([1.0, 1.0], ["a", "b"]) == 0
    assert intraclass([1.0] * 4, ["a", "a", "b", "b"]) == 0


def test_the_planned_votes_have_about_the_asked_power() -> None:
    R, P, sd = 30, 40, (0.3, 0.5)
    rng = np.random.default_rng(5)
    mu = logit(0.6) * 1.08  # a little more, since the spread pulls the mean rate towards a half
    grid = expit(mu + np.hypot(*sd) * rng.normal(size=100_000))
    rate = float(grid.mean())
    total = rate * (1 - rate)
    icc = [float(np.var(expit(mu + s * rng.normal(size=100_000)))) / total for s in sd]
    plan = plan_votes(rate, R, P, icc_rater=icc[0], icc_prompt=icc[1])
    assert plan.votes is not None
    each = -(-plan.votes // R)
    shown = 0
    for _ in range(200):
        a, b = rng.normal(0, sd[0], R), rng.normal(0, sd[1], P)
        r, p = np.repeat(np.arange(R), each), np.concatenate([rng.permutation(P)[:each] for _ in range(R)])
        x = (rng.random(len(r)) < expit(mu + a[r] + b[p])).astype(float)
        shown += two_way_rate(x, r.astype(str).tolist(), p.astype(str).tolist()).p_value < 0.05
    assert 0.68 <= shown / 200 <= 0.92
