"""Statistics of a run: prompts are clusters, seeds are replicates, models share their noise.

Levels carry cluster-robust intervals, differences are paired by prompt (Miller, arXiv 2411.00640); several comparisons
are corrected together. Missing values are the caller's to leave out: nothing here turns a missing score into a number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

CONFIDENCE = 0.95
GROUPING_SEED = 0  # of the jackknife's groups: part of the definition, so that everyone gets the same interval


@dataclass(frozen=True, slots=True)
class Estimate:
    """A level with its interval, from ``n`` values in ``num_clusters`` prompts; NaN ends where one prompt is all."""

    value: float
    low: float
    high: float
    n: int
    num_clusters: int


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired difference with its interval and the two-sided p-value of "no difference"."""

    value: float
    low: float
    high: float
    n: int
    num_clusters: int
    p_value: float


def clustered_mean(values: ArrayLike, clusters: Sequence[str], confidence: float = CONFIDENCE) -> Estimate:
    """Mean of all values with a cluster-robust t interval on G - 1 degrees of freedom (Miller, eq. 4, times G/(G-1)).

    With one value per cluster this is the ordinary t interval. Raises ValueError for no values or non-finite ones.
    """
    x, group = _checked(values, clusters)
    G, n = int(group.max()) + 1, len(x)
    u = np.bincount(group, weights=x - x.mean())  # u_g: the sum of cluster g's residuals
    half = np.nan if G < 2 else _t(confidence, G - 1) * np.sqrt(G / (G - 1) * np.sum(u**2)) / n
    return Estimate(float(x.mean()), float(x.mean() - half), float(x.mean() + half), n, G)


def paired_difference(
    a: ArrayLike, b: ArrayLike, clusters: Sequence[str], confidence: float = CONFIDENCE
) -> Difference:
    """Mean over prompts of d_p = mean over seeds of (a - b), by a paired t test; a[i] and b[i] share prompt and noise.

    One prompt gives a NaN interval and p = 1: a difference that can't be shown.
    """
    difference, group = _checked(np.asarray(a, np.float64) - np.asarray(b, np.float64), clusters)
    d = np.bincount(group, weights=difference) / np.bincount(group)
    P = len(d)
    error = float(np.std(d, ddof=1) / np.sqrt(P)) if P > 1 else np.nan
    return _difference(float(d.mean()), error, P - 1, len(difference), P, confidence)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979)."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(p) for p in adjusted]


def wilson(successes: float, n: int, confidence: float = CONFIDENCE) -> Estimate:
    """Wilson's score interval for a rate of independent trials; half successes (ties) are allowed."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"a rate needs 0 <= successes <= n and n >= 1, not {successes} of {n}")
    return Estimate(successes / n, *_wilson_interval(successes / n, n, confidence), n, n)


def clustered_rate(values: ArrayLike, clusters: Sequence[str], confidence: float = CONFIDENCE) -> Estimate:
    """Mean of values in [0, 1] with Wilson's interval at the effective number of independent values.

    n_eff = p (1 - p) / se^2 with the cluster-robust se (Korn and Graubard 1998), at least one value a cluster. Unlike
    the t interval it stays inside [0, 1], and 64 of 64 right is not taken for certainty.
    """
    mean = clustered_mean(values, clusters, confidence)
    p, G = mean.value, mean.num_clusters
    se = (mean.high - mean.value) / _t(confidence, G - 1) if G > 1 else 0.0
    n_eff = float(np.clip(p * (1 - p) / se**2, G, mean.n)) if se > 0 else float(G)
    low, high = _wilson_interval(p, n_eff, confidence)
    return Estimate(p, low, high, mean.n, G)


def grouped_jackknife(
    statistic: Callable[[NDArray[np.intp]], float],
    clusters: Sequence[str],
    num_groups: int = 20,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Interval of a set metric by the delete-a-group jackknife over groups of prompts.

    ``statistic`` takes indices into the images. Not the bootstrap: a resample repeats images, which shrinks its
    covariance and moves a Fréchet distance by more than its spread; the jackknife only ever leaves images out, the
    same number each time, so the bias of small samples is (nearly) the same in all replicates and drops out of
    their spread. It errs on the wide side (Efron and Stein 1981), the more so with few images for the dimensions.
    The interval is about the distance at this number of images, not about its limit.
    """
    value, error, groups, num_clusters = _jackknife(statistic, clusters, num_groups)
    half = _t(confidence, groups - 1) * error if groups > 1 else np.nan
    return Estimate(value, value - half, value + half, len(clusters), num_clusters)


def jackknife_difference(
    statistic: Callable[[NDArray[np.intp]], float],
    clusters: Sequence[str],
    num_groups: int = 20,
    confidence: float = CONFIDENCE,
) -> Difference:
    """Judge a difference of set metrics by the same jackknife: ``statistic`` gives the difference for the indices.

    Both sides lose the same prompts at once, so what they share (prompt difficulty, noise, bias) cancels.
    """
    value, error, groups, num_clusters = _jackknife(statistic, clusters, num_groups)
    return _difference(value, error, groups - 1, len(clusters), num_clusters, confidence)


def minimum_detectable_difference(sd: float, n: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest true difference a two-sided paired test shows with ``power``; sd is that of the n differences."""
    return float((stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)) * sd / np.sqrt(n))


def _checked(values: ArrayLike, clusters: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or len(x) != len(clusters) or not len(x):
        raise ValueError(f"needs as many values as clusters and at least one, not {x.shape} and {len(clusters)}")
    if not np.isfinite(x).all():
        raise ValueError("non-finite values: leave missing scores out and count them")
    return x, np.unique(np.asarray(clusters), return_inverse=True)[1]


def _wilson_interval(p: float, n: float, confidence: float) -> tuple[float, float]:
    """Wilson 1927, eq. for the limits; exactly 0 and 1 at the ends, where rounding would leave 1e-17."""
    z = float(stats.norm.ppf((1 + confidence) / 2))
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * float(np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)))
    return centre - half if p > 0 else 0.0, centre + half if p < 1 else 1.0


def _t(confidence: float, degrees: int) -> float:
    return float(stats.t.ppf((1 + confidence) / 2, degrees))


def _difference(value: float, error: float, degrees: int, n: int, num_clusters: int, confidence: float) -> Difference:
    if np.isnan(error):
        return Difference(value, np.nan, np.nan, n, num_clusters, 1.0)
    half = _t(confidence, degrees) * error
    if error == 0:  # every prompt differs by the same amount
        return Difference(value, value, value, n, num_clusters, 1.0 if value == 0 else 0.0)
    p_value = float(2 * stats.t.sf(abs(value) / error, degrees))
    return Difference(value, value - half, value + half, n, num_clusters, p_value)


def _jackknife(
    statistic: Callable[[NDArray[np.intp]], float], clusters: Sequence[str], num_groups: int
) -> tuple[float, float, int, int]:
    """Value on all images, standard error, number of groups used, number of clusters."""
    cluster = np.unique(np.asarray(clusters), return_inverse=True)[1]
    num_clusters = int(cluster.max()) + 1
    g = min(num_groups, num_clusters)
    shuffled = np.random.default_rng(GROUPING_SEED).permutation(num_clusters)
    group = (shuffled % g)[cluster]
    value = float(statistic(np.arange(len(cluster))))
    if g < 2:
        return value, np.nan, g, num_clusters
    left_out = np.array([statistic(np.flatnonzero(group != j)) for j in range(g)])
    return value, float(np.sqrt((g - 1) / g * np.sum((left_out - left_out.mean()) ** 2))), g, num_clusters
