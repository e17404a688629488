"""Clustered preference rates: variances against statsmodels, intervals by simulation, degenerate studies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from numpy.typing import NDArray
from scipy.special import expit
from statsmodels.stats.sandwich_covariance import cov_cluster_2groups

from metrics.preference import two_way_rate, two_way_variances
from metrics.stats import wilson


def _study(
    rng: np.random.Generator, R: int, P: int, m: int, mu: float, rater_sd: float, prompt_sd: float, ties: float = 0
) -> tuple[NDArray[np.float64], NDArray[np.intp], NDArray[np.intp]]:
    a, b = rng.normal(0, rater_sd, R), rng.normal(0, prompt_sd, P)
    r = np.repeat(np.arange(R), m)
    p = np.concatenate([rng.permutation(P)[:m] for _ in range(R)])
    x = (rng.random(len(r)) < expit(mu + a[r] + b[p])).astype(float)
    x[rng.random(len(r)) < ties] = 0.5
    return x, r, p


def test_variances_are_statsmodels() -> None:
    x, r, p = _study(np.random.default_rng(0), 12, 20, 10, 0.3, 0.5, 1.0, ties=0.2)
    ours = two_way_variances(x, r, p)
    fit = sm.OLS(x, np.ones((len(x), 1))).fit()
    both, by_rater, by_prompt = cov_cluster_2groups(fit, r, p, use_correction=False)
    factor = {"raters": 12 / 11, "prompts": 20 / 19}
    assert ours["raters"] == pytest.approx(by_rater[0, 0] * factor["raters"])
    assert ours["prompts"] == pytest.approx(by_prompt[0, 0] * factor["prompts"])
    cells = len(x) / (len(x) - 1) * ((x - x.mean()) ** 2).sum() / len(x) ** 2  # no rater saw a prompt twice
    assert ours["both"] == pytest.approx(ours["raters"] + ours["prompts"] - cells)
    plain = by_rater[0, 0] + by_prompt[0, 0] - ((x - x.mean()) ** 2).sum() / len(x) ** 2
    assert both[0, 0] == pytest.approx(plain)


@pytest.mark.parametrize(
    ("R", "P", "m", "mu", "sd", "ties"),
    [(30, 40, 20, 0, (0, 0), 0), (30, 40, 20, 0, (0.5, 1.0), 0), (8, 10, 10, 0, (0.5, 0.5), 0),
     (30, 40, 20, 3.2, (0.5, 0.5), 0), (30, 40, 20, 0, (0.5, 0.5), 0.3)],
)  # fmt: skip
def test_intervals_cover_and_the_test_keeps_its_size(
    R: int, P: int, m: int, mu: float, sd: tuple[float, float], ties: float
) -> None:
    rng = np.random.default_rng(1)
    truth = expit(mu + np.hypot(*sd) * rng.normal(size=100_000)).mean() * (1 - ties) + ties / 2
    found = []
    for _ in range(300):
        x, r, p = _study(rng, R, P, m, mu, *sd, ties)
        found.append(two_way_rate(x, r.astype(str).tolist(), p.astype(str).tolist()))
    covered = np.mean([rate.low <= truth <= rate.high for rate in found])
    assert 0.92 <= covered <= 0.995
    if mu == 0:
        assert np.mean([rate.p_value < 0.05 for rate in found]) <= 0.08


def test_independent_votes_are_far_too_sure_where_prompts_matter() -> None:
    rng = np.random.default_rng(2)
    outside = 0
    for _ in range(100):
        x, _, _ = _study(rng, 30, 40, 20, 0, 0.5, 1.0)
        interval = wilson(float(x.sum()), len(x))
        outside += not interval.low <= 0.5 <= interval.high
    assert outside > 15  # of 100, where 5 are allowed


def test_votes_of_one_rater_and_one_prompt_are_wilson_s() -> None:
    rate = two_way_rate([1, 0, 1, 1, 0, 1], ["ann"] * 6, ["p"] * 6)
    assert rate.widest == "votes"
    assert rate.low < wilson(4, 6).low  # Student's t, and the sample's variance
    assert (rate.num_raters, rate.num_prompts) == (1, 1)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_unanimous_votes_leave_doubt(value: float) -> None:
    raters, prompts = [f"r{i % 5}" for i in range(50)], [f"p{i // 5}" for i in range(50)]
    rate = two_way_rate([value] * 50, raters, prompts)
    assert rate.high - rate.low > 0.3
    assert rate.design_effect == 10  # five raters: five votes


def test_ties_alone_say_neither() -> None:
    rate = two_way_rate([0.5] * 40, [f"r{i % 8}" for i in range(40)], [f"p{i // 8}" for i in range(40)])
    assert (rate.value, rate.p_value) == (0.5, 1.0)
    assert 0.2 < rate.low < 0.5 < rate.high < 0.8


def test_copies_of_a_rater_s_votes_add_nothing() -> None:
    rng = np.random.default_rng(3)
    once = rng.integers(0, 2, 20).astype(float)
    raters, prompts = [f"r{i}" for i in range(20)], ["p"] * 20
    single = two_way_rate(once, raters, prompts)
    tenfold = two_way_rate(np.repeat(once, 10), np.repeat(raters, 10).tolist(), ["p"] * 200)
    assert tenfold.widest == "raters"
    assert (tenfold.low, tenfold.high) == pytest.approx((single.low, single.high), abs=0.01)


def test_p_agrees_with_the_interval() -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        x, r, p = _study(rng, 10, 12, 8, 0.5, 0.5, 0.5)
        rate = two_way_rate(x, r.astype(str).tolist(), p.astype(str).tolist())
        assert (rate.p_value < 0.05) == (not rate.low <= 0.5 <= rate.high)


@pytest.mark.parametrize("scores", [[], [1.5], [float("nan")], [-0.1]])
def test_what_is_no_score_is_refused(scores: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"scores"):
        two_way_rate(scores, ["r"] * len(scores), ["p"] * len(scores))
