"""Davidson's model against statsmodels, choix, evalica and closed forms; known strengths recovered; finite always."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import choix
import evalica
import numpy as np
import pytest
import statsmodels.api as sm

from metrics.paired_comparison import Ranking, connected_components, davidson

NAMES = ("a", "b", "c", "d")
STRENGTH = np.array([0.8, 0.3, -0.2, -0.9])
Votes = tuple[list[str], list[str], list[float], list[str], list[str]]


def _votes(
    seed: int = 0, R: int = 20, P: int = 30, m: int = 30, side: float = 0.4, tie: float = -0.5,
    sd: tuple[float, float] = (0.0, 0.0),
) -> Votes:  # fmt: skip
    rng = np.random.default_rng(seed)
    by_rater, by_prompt = rng.normal(0, sd[0], (R, 4)), rng.normal(0, sd[1], (P, 4))
    columns: list[list[Any]] = [[], [], [], [], []]
    for r in range(R):
        for p in rng.permutation(P)[:m]:
            i, j = rng.permutation(4)[:2]
            x, y = (STRENGTH[k] + by_rater[r, k] + by_prompt[p, k] for k in (i, j))
            weights = np.exp([x + side / 2, tie + (x + y) / 2, y - side / 2])
            score = (1.0, 0.5, 0.0)[rng.choice(3, p=weights / weights.sum())]
            for column, value in zip(columns, (NAMES[i], NAMES[j], score, f"r{r}", f"p{p}"), strict=True):
                column.append(value)
    return tuple(columns)  # type: ignore[return-value]


def _by_name(ranking: Ranking) -> dict[str, float]:
    return {entry.name: entry.value for entry in ranking.strengths}


def _decided(votes: Votes) -> Votes:
    keep = [i for i, score in enumerate(votes[2]) if score != 0.5]
    return tuple([column[i] for i in keep] for column in votes)  # type: ignore[return-value]


def test_without_ties_it_is_statsmodels_logit() -> None:
    left, right, scores, raters, prompts = _decided(_votes())
    ours = davidson(left, right, scores, raters, prompts, num_resamples=5, prior_sd=1e4)
    X = np.zeros((len(left), 4))
    X[:, 0] = 1  # the side effect
    for row, (i, j) in enumerate(zip(left, right, strict=True)):
        for name, sign in ((i, 1), (j, -1)):
            if name != "a":
                X[row, NAMES.index(name)] = sign
    fit = sm.Logit(np.asarray(scores), X).fit(disp=0)
    strength = np.array([0, *fit.params[1:]])
    assert _by_name(ours) == pytest.approx(dict(zip(NAMES, strength - strength.mean(), strict=True)), abs=1e-4)
    assert ours.side_bias.value == pytest.approx(fit.params[0], abs=1e-4)


def test_with_ties_it_maximises_davidson_s_likelihood() -> None:
    """Against a general optimiser on the likelihood written out term by term."""
    from scipy.optimize import minimize

    left, right, scores, raters, prompts = _votes(m=15)
    ours = davidson(left, right, scores, raters, prompts, num_resamples=5, prior_sd=2.0)

    def loss(theta: np.ndarray) -> float:
        total = float((theta**2).sum()) / (2 * 2.0**2)
        for i, j, score in zip(left, right, scores, strict=True):
            x, y = theta[NAMES.index(i)], theta[NAMES.index(j)]
            weights = np.exp([x + theta[4] / 2, theta[5] + (x + y) / 2, y - theta[4] / 2])
            total -= float(np.log(weights[round((1 - score) * 2)] / weights.sum()))
        return total

    best = minimize(loss, np.zeros(6), tol=1e-10).x
    centred = best[:4] - best[:4].mean()
    assert _by_name(ours) == pytest.approx(dict(zip(NAMES, centred, strict=True)), abs=1e-3)
    assert (ours.side_bias.value, ours.tie.value) == pytest.approx(tuple(best[4:]), abs=1e-3)


def test_with_both_orders_alike_it_is_choix_and_evalica() -> None:
    left, right, scores, raters, prompts = _decided(_votes(side=0))
    both = (left + right, right + left, scores + [1 - s for s in scores], raters * 2, prompts * 2)  # no side effect
    ours = _by_name(davidson(*both, num_resamples=5, prior_sd=1e4))
    wins = [(i, j) if s else (j, i) for i, j, s in zip(*both[:3], strict=True)]
    theirs = choix.opt_pairwise(4, [(NAMES.index(i), NAMES.index(j)) for i, j in wins], alpha=1e-8)
    assert ours == pytest.approx(dict(zip(NAMES, theirs - theirs.mean(), strict=True)), abs=1e-3)
    found = evalica.bradley_terry(
        [i for i, _ in wins], [j for _, j in wins], [evalica.Winner.X] * len(wins), tolerance=1e-10, limit=10_000
    )
    logs = np.log(found.scores)
    assert ours == pytest.approx(dict(logs - logs.mean()), abs=1e-3)


def test_two_methods_have_a_closed_form() -> None:
    left, right = ["a"] * 30 + ["b"] * 30, ["b"] * 30 + ["a"] * 30
    scores = [1.0] * 20 + [0.0] * 10 + [1.0] * 10 + [0.0] * 20  # a wins 40 of 60, no side is favoured
    votes = davidson(left, right, scores, [str(i) for i in range(60)], ["p"] * 60, num_resamples=5, prior_sd=1e4)
    assert votes.strengths[0].value - votes.strengths[1].value == pytest.approx(np.log(2), abs=1e-4)
    assert votes.side_bias.value == pytest.approx(0, abs=1e-6)
    assert votes.left_rate == pytest.approx(0.5)
    (residual,) = votes.residuals
    assert residual.observed == pytest.approx(2 / 3)
    assert residual.n == 60
    assert residual.expected == pytest.approx(2 / 3, abs=1e-4)


@pytest.mark.parametrize("score", [1.0, 0.5])
def test_who_never_loses_is_finite_and_said_to_be(score: float) -> None:
    left, right = ["best", "a", "best", "b"] * 10, ["a", "best", "b", "a"] * 10
    scores = [1.0, 0.0, 1.0, 1.0] * 10 if score == 1 else [0.5] * 40
    raters, prompts = [f"r{i % 4}" for i in range(40)], [f"p{i % 5}" for i in range(40)]
    found = davidson(left, right, scores, raters, prompts)
    assert all(np.isfinite([s.value, s.low, s.high]).all() and s.low < s.high for s in found.strengths)
    if score == 1:
        assert found.strengths[0].name == "best"
        assert {s.name: s.flags for s in found.strengths}["best"] == ("never loses",)
    else:
        assert {s.rank_high - s.rank_low for s in found.strengths} == {2}


def test_known_strengths_are_covered() -> None:
    """The targets are fits to many more votes: spread between prompts pulls a marginal model towards 0."""
    sd = (0.3, 0.5)
    large = [davidson(*_votes(100 + s, 40, 150, 150, sd=sd), num_resamples=2) for s in range(4)]
    truth = {name: np.mean([_by_name(ranking)[name] for ranking in large]) for name in NAMES}
    covered, ranked = [], []
    for seed in range(60):
        found = davidson(*_votes(seed, sd=sd), num_resamples=200)
        covered += [s.low <= truth[s.name] <= s.high for s in found.strengths]
        order = sorted(NAMES, key=lambda name: -truth[name])
        ranked.append(all(s.rank_low <= order.index(s.name) + 1 <= s.rank_high for s in found.strengths))
    assert 0.89 <= np.mean(covered) <= 0.995
    assert np.mean(ranked) >= 0.93


def test_equals_share_all_ranks() -> None:
    rng = np.random.default_rng(0)
    n = 400
    pairs = [rng.permutation(4)[:2] for _ in range(n)]
    found = davidson(
        [NAMES[i] for i, _ in pairs], [NAMES[j] for _, j in pairs], rng.choice([0.0, 1.0], n),
        [f"r{i % 20}" for i in range(n)], [f"p{i % 21}" for i in range(n)],
    )  # fmt: skip
    assert [(s.rank_low, s.rank_high) for s in found.strengths] == [(1, 4)] * 4
    assert all(c.low < 0 < c.high for c in found.contrasts)


def test_the_same_votes_give_the_same_ranking_in_any_order() -> None:
    votes = _votes()
    turned = tuple(column[::-1] for column in votes)
    first, second = davidson(*votes, num_resamples=50), davidson(*turned, num_resamples=50)  # type: ignore[arg-type]
    assert _by_name(first) == pytest.approx(_by_name(second))


def test_what_no_votes_connect_is_refused() -> None:
    assert connected_components(["a", "b", "x"], ["b", "c", "y"]) == (("a", "b", "c"), ("x", "y"))
    with pytest.raises(ValueError, match="no votes connect a, b and x, y"):
        davidson(["a", "x"], ["b", "y"], [1, 0], ["r", "r"], ["p", "q"])


@pytest.mark.parametrize("scores", [[], [0.3], [2.0]])
def test_what_is_no_vote_is_refused(scores: Sequence[float]) -> None:
    n = len(scores)
    with pytest.raises(ValueError, match=r"votes|scores"):
        davidson(["a"] * n, ["b"] * n, scores, ["r"] * n, ["p"] * n)
