"""A ranking from votes on pairs: Davidson's model with ties and a side effect, clustered intervals, rank sets.

numpy and scipy only, for the study.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse, special
from scipy.sparse.csgraph import connected_components as _components

from metrics.stats import CONFIDENCE

NUM_RESAMPLES = 1000
PRIOR_SD = 3.0  # of every parameter, in log-odds: weak beside ten votes, enough where a method never loses
_DRAWS = 20_000  # for simultaneous intervals
_CHUNK = 200  # resamples at a time
_Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A parameter in log-odds, with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Strength:
    """A method's log-strength, centred to mean 0; rank_low, rank_high: its rank set, 1 the best; n: its votes."""

    name: str
    value: float
    low: float
    high: float
    rank_low: int
    rank_high: int
    n: int
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Contrast:
    """How much stronger ``a`` is than ``b``, with its simultaneous interval over all pairs of methods."""

    a: str
    b: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Residual:
    """How often ``a`` was preferred to ``b`` (ties half) in n votes, and how often the model expects it."""

    a: str
    b: str
    observed: float
    expected: float
    n: int


@dataclass(frozen=True, slots=True)
class Ranking:
    """Methods from the best to the worst. side_bias: log-odds of the left picture; tie: log nu; method: how, in words.

    left_rate: how often the left one of two equal pictures is preferred, ties half.
    """

    strengths: tuple[Strength, ...]
    contrasts: tuple[Contrast, ...]
    side_bias: Interval
    tie: Interval
    left_rate: float
    residuals: tuple[Residual, ...]
    n: int
    method: str


def davidson(
    left: Sequence[str],
    right: Sequence[str],
    scores: ArrayLike,
    raters: Sequence[str],
    prompts: Sequence[str],
    *,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    prior_sd: float = PRIOR_SD,
) -> Ranking:
    """Fit strengths lambda, a side effect gamma and ties nu to n votes; scores (n,): 1 left, 0.5 tie, 0 right.

    P(left) : P(tie) : P(right) = exp(lambda_l + gamma/2) : nu exp((lambda_l + lambda_r)/2) : exp(lambda_r - gamma/2)
    (Davidson 1970, with the order effect of Davidson and Beaver 1977 shared between the sides), fitted by penalised
    likelihood: every parameter has a Gaussian prior of sd ``prior_sd``, so that a method that never loses stays finite.

    Uncertainty: bootstraps over raters, over prompts and over their cells, combined as V_r + V_p - V_rp (Cameron,
    Gelbach and Miller 2011), never less than the largest of them or the curvature's; t on min(G_r, G_p) - 1 degrees
    of freedom. Rank sets come from simultaneous (max-t) intervals of all differences. Raises ValueError for no votes,
    other scores, and methods that no chain of votes connects.
    """
    votes = _Votes(left, right, scores, raters, prompts)
    if len(connected := connected_components(left, right)) > 1:
        raise ValueError(f"no votes connect {' and '.join(', '.join(part) for part in connected)}")
    theta, curvature = _fit(votes.counts[None], votes.design, prior_sd)
    V, clustering, degrees = _covariance(votes, theta[0], curvature[0], prior_sd, num_resamples, seed)
    K = len(votes.names)
    center = _centering(K)
    theta_c = center @ theta[0]
    errors = np.sqrt(np.diag(V))
    t = float(special.stdtrit(degrees, (1 + confidence) / 2))
    low, high = theta_c - t * errors, theta_c + t * errors
    contrasts, below, above = _contrasts(votes.names, theta_c[:K], V[:K, :K], degrees, confidence, seed)
    order = np.argsort(-theta_c[:K], kind="stable")
    strengths = tuple(
        Strength(
            votes.names[k], float(theta_c[k]), float(low[k]), float(high[k]), 1 + int(above[k]), K - int(below[k]),
            votes.num(k), votes.flags(k),
        )
        for k in order
    )  # fmt: skip
    side, tie = (Interval(float(theta_c[i]), float(low[i]), float(high[i])) for i in (K, K + 1))
    return Ranking(
        strengths, contrasts, side, tie, _left_rate(side.value, tie.value), votes.residuals(theta[0]), votes.n,
        f"Davidson with side effect, Gaussian prior of sd {prior_sd:g}; {clustering}",
    )  # fmt: skip


def connected_components(left: Sequence[str], right: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Groups of methods that met, directly or by others, each sorted; the largest first."""
    names = sorted({*left, *right})
    index = {name: k for k, name in enumerate(names)}
    rows, columns = [index[name] for name in left], [index[name] for name in right]
    met = sparse.coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(names), len(names)))
    num, label = _components(met, directed=False)
    parts = [tuple(name for name, part in zip(names, label, strict=True) if part == p) for p in range(num)]
    return tuple(sorted(parts, key=lambda part: (-len(part), part)))


class _Votes:
    """Votes as counts over (who was left, who was right) and outcome (left, tie, right), whole and by cluster."""

    def __init__(
        self,
        left: Sequence[str],
        right: Sequence[str],
        scores: ArrayLike,
        raters: Sequence[str],
        prompts: Sequence[str],
    ) -> None:
        score = np.asarray(scores, np.float64)
        self.n = len(score)
        if not self.n or {len(left), len(right), len(raters), len(prompts)} != {self.n}:
            raise ValueError("needs votes, with a left, a right, a rater and a prompt for each")
        if not np.isin(score, (0, 0.5, 1)).all():
            raise ValueError("scores must be 0, 0.5 or 1")
        self.names = sorted({*left, *right})
        index = {name: k for k, name in enumerate(self.names)}
        sides = np.array([[index[a], index[b]] for a, b in zip(left, right, strict=True)])
        self.cells, cell = np.unique(sides, axis=0, return_inverse=True)
        outcome = np.rint((1 - score) * 2).astype(np.intp)  # left 0, tie 1, right 2
        self._entry = cell.ravel() * 3 + outcome
        self.counts = np.bincount(self._entry, minlength=3 * len(self.cells)).reshape(-1, 3).astype(np.float64)
        self.design = _design(self.cells, len(self.names))
        self.raters, self.prompts = (np.unique(np.asarray(c), return_inverse=True)[1] for c in (raters, prompts))

    def by_cluster(self, group: NDArray[np.intp]) -> sparse.csr_matrix:
        """Counts by cluster: (G, 3 cells)."""
        ones = np.ones(self.n)
        shape = (int(group.max()) + 1, 3 * len(self.cells))
        return sparse.coo_matrix((ones, (group, self._entry)), shape=shape).tocsr()

    def num(self, k: int) -> int:
        """Votes in which method k took part."""
        return int(self.counts[(self.cells == k).any(axis=1)].sum())

    def flags(self, k: int) -> tuple[str, ...]:
        """Where the data alone would put method k at infinity."""
        first, second = self.cells[:, 0] == k, self.cells[:, 1] == k
        wins = self.counts[first, 0].sum() + self.counts[second, 2].sum()
        losses = self.counts[first, 2].sum() + self.counts[second, 0].sum()
        ties = self.counts[first | second, 1].sum()
        if ties == 0 and wins and not losses:
            return ("never loses",)
        return ("never wins",) if ties == 0 and losses and not wins else ()

    def residuals(self, theta: _Array) -> tuple[Residual, ...]:
        """Observed and expected rates of each pair of methods that met."""
        p = _probabilities(self.design @ theta)
        total = self.counts.sum(axis=1)
        seen: dict[tuple[int, int], _Array] = {}
        for (i, j), count, expected, n in zip(self.cells, self.counts, p, total, strict=True):
            won, model = count[0] + count[1] / 2, n * (expected[0] + expected[1] / 2)
            first = (won, model) if i < j else (n - won, n - model)
            key = (min(i, j), max(i, j))
            seen[key] = seen.get(key, np.zeros(3)) + np.array([*first, n])
        return tuple(
            Residual(self.names[i], self.names[j], float(won / n), float(model / n), int(n))
            for (i, j), (won, model, n) in sorted(seen.items())
        )


def _design(cells: NDArray[np.intp], K: int) -> _Array:
    """x (cells, 3, K + 2): the log-weight of left, tie, right is x @ (lambda, gamma, log nu)."""
    x = np.zeros((len(cells), 3, K + 2))
    rows = np.arange(len(cells))
    x[rows, 0, cells[:, 0]] = 1
    x[rows, 2, cells[:, 1]] = 1
    x[:, 0, K], x[:, 2, K] = 0.5, -0.5
    x[:, 1] = (x[:, 0] + x[:, 2]) / 2
    x[:, 1, K + 1] = 1
    return x


def _fit(counts: _Array, x: _Array, prior_sd: float, start: _Array | None = None) -> tuple[_Array, _Array]:
    """Penalised maximum likelihood of counts (B, cells, 3) by Newton, all B at once: theta (B, D), curvature (B, D, D).

    The likelihood is a conditional logit's, concave, and the prior makes it strictly so; steps are kept below 2.
    """
    B, M, _ = counts.shape
    D = x.shape[-1]
    flat = x.reshape(3 * M, D)
    squares = np.einsum("od,oe->ode", flat, flat).reshape(3 * M, D * D)
    n = counts.sum(axis=2)
    theta = np.zeros((B, D)) if start is None else np.tile(start, (B, 1))
    prior = np.eye(D) / prior_sd**2
    for _ in range(100):
        p = _probabilities((theta @ flat.T).reshape(B, M, 3))
        gradient = (counts - n[..., None] * p).reshape(B, -1) @ flat - theta / prior_sd**2
        mean = np.einsum("bmo,mod->bmd", p, x)
        H = ((n[..., None] * p).reshape(B, -1) @ squares).reshape(B, D, D) + prior
        H -= np.einsum("bm,bmd,bme->bde", n, mean, mean, optimize=True)
        step = np.linalg.solve(H, gradient[..., None])[..., 0]
        step *= np.minimum(1, 2 / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-12))
        theta = theta + step
        if np.abs(step).max() < 1e-9:
            break
    return theta, H


def _probabilities(eta: _Array) -> _Array:
    weights = np.exp(eta - eta.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def _covariance(
    votes: _Votes, theta: _Array, curvature: _Array, prior_sd: float, num_resamples: int, seed: int
) -> tuple[_Array, str, int]:
    """Covariance of the centred parameters, what it is clustered by, and its degrees of freedom."""
    center = _centering(len(votes.names))
    V = {"votes": center @ np.linalg.inv(curvature) @ center.T}
    both = np.unique(votes.raters * (int(votes.prompts.max()) + 1) + votes.prompts, return_inverse=True)[1]
    groups = {"raters": votes.raters, "prompts": votes.prompts, "cells": both}
    sizes = {name: int(group.max()) + 1 for name, group in groups.items()}
    for number, (name, group) in enumerate(groups.items()):
        if sizes[name] > 1:
            drawn = _resampled(votes, group, theta, prior_sd, num_resamples, seed + number)
            V[name] = np.cov(drawn @ center.T, rowvar=False) * sizes[name] / (sizes[name] - 1)
    degrees = max(min((sizes[name] for name in ("raters", "prompts") if sizes[name] > 1), default=2) - 1, 1)
    single = [V[name] for name in ("votes", "raters", "prompts") if name in V]
    names = [name for name in ("raters", "prompts") if name in V]
    combined = V["raters"] + V["prompts"] - V["cells"] if len(names) == 2 else single[-1]
    values, vectors = np.linalg.eigh(combined)
    combined = (vectors * np.maximum(values, 0)) @ vectors.T
    floor = np.max([np.diag(v) for v in single], axis=0)
    scale = np.sqrt(np.maximum(floor / np.maximum(np.diag(combined), 1e-300), 1))
    combined = combined * scale[:, None] * scale[None, :]
    if not np.isfinite(combined).all() or (np.diag(combined) <= 0).any():
        combined = V["votes"]
    words = f"clustered by {' and '.join(names)}" if names else "votes taken as independent"
    return combined, f"{words}, {num_resamples} resamples of each" if names else words, degrees


def _resampled(votes: _Votes, group: NDArray[np.intp], theta: _Array, prior_sd: float, num: int, seed: int) -> _Array:
    """Fits (num, D) to multinomial resamples of clusters."""
    by_cluster = votes.by_cluster(group)
    G = by_cluster.shape[0]
    rng = np.random.default_rng(seed)
    fits = []
    for begin in range(0, num, _CHUNK):
        weights = rng.multinomial(G, np.full(G, 1 / G), min(_CHUNK, num - begin)).astype(np.float64)
        counts = np.asarray((by_cluster.T @ weights.T).T).reshape(len(weights), -1, 3)
        fits.append(_fit(counts, votes.design, prior_sd, theta)[0])
    return np.concatenate(fits)


def _contrasts(
    names: Sequence[str], strength: _Array, V: _Array, degrees: int, confidence: float, seed: int
) -> tuple[tuple[Contrast, ...], NDArray[np.intp], NDArray[np.intp]]:
    """All differences with max-t intervals; how many methods are surely below, and surely above, each."""
    K = len(names)
    i, j = np.triu_indices(K, 1)
    below, above = np.zeros(K, np.intp), np.zeros(K, np.intp)
    if not len(i):
        return (), below, above
    rng = np.random.default_rng(seed)
    values, vectors = np.linalg.eigh(V)
    draws = rng.standard_normal((_DRAWS, K)) @ (vectors * np.sqrt(np.maximum(values, 0))).T
    draws /= np.sqrt(rng.chisquare(degrees, _DRAWS) / degrees)[:, None]
    errors = np.sqrt(np.maximum(V[i, i] + V[j, j] - 2 * V[i, j], 1e-300))
    worst = np.zeros(_DRAWS)
    for a, b, error in zip(i.tolist(), j.tolist(), errors, strict=True):
        np.maximum(worst, np.abs(draws[:, a] - draws[:, b]) / error, out=worst)
    critical = float(np.quantile(worst, confidence))
    difference = strength[i] - strength[j]
    low, high = difference - critical * errors, difference + critical * errors
    for a, b, least, most in zip(i.tolist(), j.tolist(), low, high, strict=True):
        if least > 0 or most < 0:
            below[a if least > 0 else b] += 1
            above[b if least > 0 else a] += 1
    found = (
        Contrast(names[a], names[b], float(d), float(lo), float(hi))
        for a, b, d, lo, hi in zip(i.tolist(), j.tolist(), difference, low, high, strict=True)
    )
    return tuple(found), below, above


def _centering(K: int) -> _Array:
    """The matrix that subtracts the mean strength and leaves gamma and log nu."""
    center = np.eye(K + 2)
    center[:K, :K] -= 1 / K
    return center


def _left_rate(gamma: float, log_nu: float) -> float:
    left, tie, _ = _probabilities(np.array([gamma / 2, log_nu, -gamma / 2]))
    return float(left + tie / 2)
