"""Rates of preference from votes, clustered by rater and by prompt; numpy and scipy only, for the study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from metrics.stats import CONFIDENCE


@dataclass(frozen=True, slots=True)
class Rate:
    """A share of votes with its interval and the two-sided p-value of ``value = null``.

    design_effect: the variance used over that of n independent votes without ties, value (1 - value) / n; ties alone
    make it less than 1. widest: which variance was used, "votes", "raters", "prompts" or "both".
    """

    value: float
    low: float
    high: float
    n: int
    num_raters: int
    num_prompts: int
    p_value: float
    design_effect: float
    widest: str


def two_way_rate(
    scores: ArrayLike,
    raters: Sequence[str],
    prompts: Sequence[str],
    null: float = 0.5,
    confidence: float = CONFIDENCE,
) -> Rate:
    """Mean of scores (n,) in [0, 1] (1 for a, 0.5 a tie, 0 for b), votes of a rater and of a prompt being alike.

    The variance is the largest of: independent votes, clustered by rater, by prompt, and by both as V_r + V_p - V_rp
    (Cameron, Gelbach and Miller 2011, eq. 2.9, each with its factor G/(G-1)). It becomes a design effect, and the
    interval is Wilson's with n / design effect votes and Student's t on min(G_r, G_p) - 1 degrees of freedom in place
    of z; p inverts the same score test. One rater, or one prompt, says nothing about others: then only the other way
    is clustered, and where both are one, votes count as independent. Where all votes agree the variance would be zero;
    then a cluster counts as one vote. Raises ValueError for no scores, or for ones outside [0, 1].
    """
    x = np.asarray(scores, np.float64)
    if x.ndim != 1 or not len(x) or len(x) != len(raters) or len(x) != len(prompts):
        raise ValueError("needs scores, and a rater and a prompt for each")
    if not (np.isfinite(x).all() and (x >= 0).all() and (x <= 1).all()):
        raise ValueError("scores must be in [0, 1]")
    (r, G_r), (p, G_p) = _codes(raters), _codes(prompts)
    n, value = len(x), float(x.mean())
    variances = two_way_variances(x, r, p)
    widest = max(variances, key=lambda name: variances[name])
    if variances["votes"] > 0:
        design_effect = variances[widest] * n / (value * (1 - value))
    elif 0 < value < 1:  # ties alone: they say that neither is preferred, as sure as so many coins would
        design_effect, widest = 1.0, "votes"
    else:  # all votes alike: nothing tells how alike a cluster's votes are, so they may be copies of one
        groups = min((G for G in (G_r, G_p) if G > 1), default=n)
        design_effect, widest = n / groups, "votes" if groups == n else "raters" if groups == G_r else "prompts"
    degrees = max(min((G for G in (G_r, G_p) if G > 1), default=n) - 1, 1)
    n_eff = n / design_effect
    low, high = _wilson(value, n_eff, float(special.stdtrit(degrees, (1 + confidence) / 2)))
    p_value = 2 * float(special.stdtr(degrees, -abs(value - null) / np.sqrt(null * (1 - null) / n_eff)))
    return Rate(value, low, high, n, G_r, G_p, min(p_value, 1.0), design_effect, widest)


def two_way_variances(x: NDArray[np.float64], r: NDArray[np.intp], p: NDArray[np.intp]) -> dict[str, float]:
    """Variances of the mean of x (n,) by clustering: "votes", "raters", "prompts", "both"; r, p: cluster numbers.

    "votes" is that of independent votes, of their own spread (ties make it smaller than p (1 - p) / n).
    """
    residuals = x - x.mean()
    found = {"votes": float(residuals @ residuals) / max(len(x) - 1, 1) / len(x)}
    by_rater, by_prompt = _cluster_variance(residuals, r), _cluster_variance(residuals, p)
    if by_rater is not None:
        found["raters"] = by_rater
    if by_prompt is not None:
        found["prompts"] = by_prompt
    if by_rater is not None and by_prompt is not None:
        cells = np.unique(r * (int(p.max()) + 1) + p, return_inverse=True)[1]
        found["both"] = by_rater + by_prompt - (_cluster_variance(residuals, cells) or 0.0)
    return found


def _cluster_variance(residuals: NDArray[np.float64], group: NDArray[np.intp]) -> float | None:
    G = int(group.max()) + 1
    if G < 2:
        return None
    u = np.bincount(group, weights=residuals)
    return float(G / (G - 1) * (u @ u) / len(residuals) ** 2)


def _wilson(p: float, n: float, t: float) -> tuple[float, float]:
    centre, scale = (p + t**2 / (2 * n)), 1 + t**2 / n
    half = t * np.sqrt(p * (1 - p) / n + t**2 / (4 * n**2))
    return max(0.0, float((centre - half) / scale)), min(1.0, float((centre + half) / scale))


def _codes(names: Sequence[str]) -> tuple[NDArray[np.intp], int]:
    found, codes = np.unique(np.asarray(names), return_inverse=True)
    return codes, len(found)
