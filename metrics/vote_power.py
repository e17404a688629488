"""How many votes a preference needs, and what so many votes can show; numpy and scipy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite, sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import ndtri


@dataclass(frozen=True, slots=True)
class VotePlan:
    """Votes that one comparison needs.

    independent: if votes were independent. votes: with clustering; None where R raters and P prompts can't show the
    rate however many votes they give, with the reason. design_effect, votes_per_rater, votes_per_prompt: at ``votes``.
    """

    rate: float
    alpha: float
    power: float
    independent: int
    votes: int | None
    design_effect: float | None
    votes_per_rater: int | None
    votes_per_prompt: float | None
    reason: str | None


def plan_votes(
    rate: float,
    num_raters: int,
    num_prompts: int,
    *,
    icc_rater: float,
    icc_prompt: float,
    num_comparisons: int = 1,
    alpha: float = 0.05,
    power: float = 0.8,
) -> VotePlan:
    """Votes after which a preference rate of ``rate`` is told from 50 % (two-sided, Holm's first step).

    n_0 = (z_{1 - alpha / 2m} / 2 + z_power sqrt(p (1 - p)))^2 / (p - 1/2)^2 independent votes, times the design effect
    1 + (n/R - 1) icc_rater + (n/P - 1) icc_prompt (Kish's, for both ways of clustering), solved for n. Raises
    ValueError for a rate of 0.5, or one not in (0, 1).
    """
    if not 0 < rate < 1 or rate == 0.5:
        raise ValueError(f"the rate must be in (0, 1) and not 0.5, not {rate}")
    exact = _independent(rate, num_comparisons, alpha, power)
    if not isfinite(exact):
        raise ValueError(f"no number of votes shows a rate of {rate}")
    n_0 = ceil(exact)
    R, P = num_raters, num_prompts
    slack = 1 - n_0 * icc_rater / R - n_0 * icc_prompt / P
    plan = VotePlan(rate, alpha, power, n_0, None, None, None, None, None)
    if slack <= 0:
        return _with_reason(plan, n_0, R, P, icc_rater, icc_prompt)
    n = max(n_0, ceil(n_0 * max(1 - icc_rater - icc_prompt, 0) / slack))
    return VotePlan(rate, alpha, power, n_0, n, n / n_0, ceil(n / R), n / P, None)


def smallest_rate(
    votes: int,
    num_raters: int,
    num_prompts: int,
    *,
    icc_rater: float,
    icc_prompt: float,
    num_comparisons: int = 1,
    alpha: float = 0.05,
    power: float = 0.8,
) -> float:
    """The smallest preference rate above 50 % that so many votes show; 1 where they can show none."""
    effect = 1 + max(votes / num_raters - 1, 0) * icc_rater + max(votes / num_prompts - 1, 0) * icc_prompt
    effective = votes / effect

    def shortfall(rate: float) -> float:
        return _independent(rate, num_comparisons, alpha, power) - effective

    high = 1 - 1e-9
    return 1.0 if shortfall(high) > 0 else float(brentq(shortfall, 0.5 + 1e-9, high))


def intraclass(scores: ArrayLike, clusters: Sequence[str]) -> float:
    """Intraclass correlation of scores (n,) within clusters: the ANOVA estimator, in [0, 1]; 0 where none is told.

    (MSB - MSW) / (MSB + (n_0 - 1) MSW) with n_0 = (n - sum n_g^2 / n) / (G - 1) (Donner 1986).
    """
    x = np.asarray(scores, np.float64)
    group = np.unique(np.asarray(clusters), return_inverse=True)[1]
    sizes = np.bincount(group)
    n, G = len(x), len(sizes)
    if G < 2 or n <= G:
        return 0.0
    means = np.bincount(group, weights=x) / sizes
    between = float(sizes @ (means - x.mean()) ** 2) / (G - 1)
    within = float(((x - means[group]) ** 2).sum()) / (n - G)
    size = (n - float((sizes**2).sum()) / n) / (G - 1)
    total = between + (size - 1) * within
    return min(max((between - within) / total, 0.0), 1.0) if total > 0 else 0.0


def _independent(rate: float, comparisons: int, alpha: float, power: float) -> float:
    z = float(-ndtri(alpha / comparisons / 2)) / 2 + float(ndtri(power)) * sqrt(rate * (1 - rate))
    distance = (rate - 0.5) ** 2
    return z**2 / distance if distance > 0 else np.inf


def _with_reason(plan: VotePlan, n_0: int, R: int, P: int, icc_rater: float, icc_prompt: float) -> VotePlan:
    """Say how many raters, or prompts, would be enough, each with half of what the sum may be."""
    raters, prompts = ceil(2 * n_0 * icc_rater) + 1, ceil(2 * n_0 * icc_prompt) + 1
    reason = (
        f"{R} raters and {P} prompts can't show {plan.rate:.1%} however many votes they give; "
        f"take at least {max(raters, R)} raters and {max(prompts, P)} prompts, or show a larger rate"
    )
    return VotePlan(plan.rate, plan.alpha, plan.power, n_0, None, None, None, None, reason)
