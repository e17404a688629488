"""How far raters agree: Krippendorff's alpha, percent agreement, test-retest; numpy only.

Intervals are bootstraps over clusters (prompts, or raters for test-retest): percentiles of the resampled statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metrics.stats import CONFIDENCE

NUM_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Agreement:
    """A measure with its interval; NaN where it is not defined (nobody rated an item twice, one label only).

    n: labels that count, or pairs of labels for test-retest.
    """

    value: float
    low: float
    high: float
    n: int
    num_clusters: int


def krippendorff_alpha(
    labels: Sequence[str],
    items: Sequence[str],
    raters: Sequence[str],
    clusters: Sequence[str] | None = None,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Agreement:
    """Alpha of nominal labels (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section D).

    labels, items, raters: (n,), one entry for each label given. Items with one label don't count. The interval
    resamples clusters of items (their prompts); items themselves unless given. A rater gives an item one label.
    """
    counts, groups = _counts(labels, items, raters, clusters)
    units = counts.sum(axis=1)
    agreeing = (counts * (counts - 1)).sum(axis=1) / (units - 1)  # o_cc summed over c, by item

    def alpha(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        w = weights[:, groups]
        n_c = w @ counts
        n = n_c.sum(axis=1)
        observed = n - w @ agreeing
        expected = (n**2 - (n_c**2).sum(axis=1)) / (n - 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(expected > 0, 1 - observed / expected, np.nan)

    return _bootstrapped(alpha, groups, int(units.sum()), num_resamples, seed, confidence)


def percent_agreement(
    labels: Sequence[str],
    items: Sequence[str],
    raters: Sequence[str],
    clusters: Sequence[str] | None = None,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Agreement:
    """Share of the pairs of raters of an item that gave it the same label; arguments as of ``krippendorff_alpha``."""
    counts, groups = _counts(labels, items, raters, clusters)
    units = counts.sum(axis=1)
    agreeing, pairs = (counts * (counts - 1)).sum(axis=1), units * (units - 1)

    def share(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        w = weights[:, groups]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((w @ agreeing) / (w @ pairs))

    return _bootstrapped(share, groups, int(units.sum()), num_resamples, seed, confidence)


def retest(
    first: Sequence[str],
    second: Sequence[str],
    raters: Sequence[str],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Agreement:
    """Share of items that a rater labelled the same again; the interval resamples raters."""
    if not len(first) == len(second) == len(raters):
        raise ValueError("needs two labels and a rater for each item")
    same = np.asarray([a == b for a, b in zip(first, second, strict=True)], np.float64)
    groups = np.unique(np.asarray(raters), return_inverse=True)[1] if len(raters) else np.zeros(0, np.intp)

    def share(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        w = weights[:, groups]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((w @ same) / w.sum(axis=1))

    return _bootstrapped(share, groups, len(same), num_resamples, seed, confidence)


def leave_one_out_agreement(
    scores: ArrayLike, items: Sequence[str], raters: Sequence[str]
) -> dict[str, tuple[float, int]]:
    """How often each rater agrees with the majority of the others: (share, items counted), by rater.

    scores: (n,), 1 for a, 0 for b, 0.5 for a tie. Ties of the rater, items nobody else rated, and items on which the
    others are evenly split don't count; a rater with none of the rest has (NaN, 0).
    """
    lean = np.sign(np.asarray(scores, np.float64) - 0.5)
    item = np.unique(np.asarray(items), return_inverse=True)[1] if len(items) else np.zeros(0, np.intp)
    others = np.sign(np.bincount(item, weights=lean)[item] - lean) if len(items) else lean
    counted = (lean != 0) & (others != 0)
    names = np.asarray(raters)
    found = {}
    for name in dict.fromkeys(raters):
        mine = counted & (names == name)
        num = int(mine.sum())
        found[name] = (float((lean == others)[mine].mean()) if num else float("nan"), num)
    return found


def _counts(
    labels: Sequence[str], items: Sequence[str], raters: Sequence[str], clusters: Sequence[str] | None
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Labels by item (U, C), for items with at least two, and the cluster number of each item (U,)."""
    if len({len(labels), len(items), len(raters), len(labels if clusters is None else clusters)}) > 1:
        raise ValueError("needs an item and a rater, and a cluster if any, for each label")
    if len(set(zip(items, raters, strict=True))) < len(labels):
        raise ValueError("a rater gave an item two labels")
    if not labels:
        return np.zeros((0, 0)), np.zeros(0, np.intp)
    names, first, item = np.unique(np.asarray(items), return_index=True, return_inverse=True)
    kinds, label = np.unique(np.asarray(labels), return_inverse=True)
    counts = np.zeros((len(names), len(kinds)))
    np.add.at(counts, (item, label), 1)
    able = counts.sum(axis=1) >= 2
    cluster = np.asarray(items if clusters is None else clusters)[first][able]
    groups = np.unique(cluster, return_inverse=True)[1] if able.any() else np.zeros(0, np.intp)
    return counts[able], groups


def _bootstrapped(
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    groups: NDArray[np.intp],
    n: int,
    num_resamples: int,
    seed: int,
    confidence: float,
) -> Agreement:
    """The statistic at weights of one, and percentiles of it over multinomial weights of clusters."""
    if not len(groups):
        return Agreement(np.nan, np.nan, np.nan, n, 0)
    G = int(groups.max()) + 1
    value = float(statistic(np.ones((1, G)))[0])
    if G < 2:
        return Agreement(value, np.nan, np.nan, n, G)
    weights = np.random.default_rng(seed).multinomial(G, np.full(G, 1 / G), num_resamples).astype(np.float64)
    resampled = statistic(weights)
    resampled = resampled[np.isfinite(resampled)]
    if not len(resampled) or not np.isfinite(value):
        return Agreement(value, np.nan, np.nan, n, G)
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Agreement(value, float(low), float(high), n, G)
