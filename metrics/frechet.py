"""The Fréchet distance of two Gaussians, from streamed moments or from features; numpy only, float64 throughout.

    d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)        (Dowson and Landau 1982; Heusel et al. 2017, eq. 6)

The trace term is the sum of square roots of eigenvalues of R S2 R with R = S1^(1/2), which is symmetric: no complex
numbers and no ``sqrtm``. With fewer images than dimensions it is the nuclear norm of the centred Gram matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Count, mean (d,) and scatter sum (x - mean)(x - mean)^T (d, d) of features; shards merge, runs extend freely."""

    n: int
    mean: Matrix
    scatter: Matrix

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> Moments:
        """Sum features (N, d), N >= 1."""
        x = np.asarray(features, np.float64)
        mean = x.mean(axis=0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def __add__(self, other: Moments) -> Moments:
        """Merge with the moments of other images (Chan, Golub and LeVeque 1979, eq. 2.1)."""
        n, delta = self.n + other.n, other.mean - self.mean
        between = np.outer(delta, delta) * (self.n * other.n / n)
        return Moments(n, self.mean + delta * (other.n / n), self.scatter + other.scatter + between)

    @cached_property
    def covariance(self) -> Matrix:
        """Unbiased covariance, (d, d)."""
        return self.scatter / (self.n - 1)

    @cached_property
    def root(self) -> Matrix:
        """R = covariance^(1/2), (d, d); computed once, the costly half of every distance to these moments."""
        return symmetric_root(self.covariance)


def frechet_distance(reference: Moments, other: Moments) -> float:
    """Fréchet distance of two sets of moments, each of at least two images."""
    return gaussian_distance(reference.mean, reference.covariance, other.mean, other.covariance, reference.root)


def gaussian_distance(m1: Matrix, S1: Matrix, m2: Matrix, S2: Matrix, R: Matrix | None = None) -> float:
    """Fréchet distance of N(m1, S1) and N(m2, S2); R is S1^(1/2) where it is known."""
    R = symmetric_root(S1) if R is None else R
    eigenvalues = np.linalg.eigvalsh(R @ S2 @ R)
    trace_root = np.sqrt(eigenvalues.clip(min=0)).sum()
    return _distance(m1 - m2, float(np.trace(S1) + np.trace(S2)), float(trace_root))


def feature_distance(features: NDArray[np.floating], reference: NDArray[np.floating]) -> float:
    """Fréchet distance of features (N, d) to reference features (M, d), by whichever route is cheaper."""
    if min(len(features), len(reference)) >= features.shape[1]:
        return frechet_distance(Moments.of(reference), Moments.of(features))
    return GramDistance(features, reference)()


class GramDistance:
    """Fréchet distance of any subset of features (N, d) to a reference (M, d); meant for N or M below d.

    tr (S1 S2)^(1/2) = |X1 X2^T|_* / sqrt((n1 - 1)(n2 - 1)) with centred X. The product is formed once, so that the
    jackknife's subsets only pay for a singular value decomposition of (n, M).
    """

    def __init__(self, features: NDArray[np.floating], reference: NDArray[np.floating]) -> None:
        """Keep what every subset shares: the centred features and their product with the reference."""
        reference = np.asarray(reference, np.float64)
        self._centre = reference.mean(axis=0)
        centred = reference - self._centre
        self._x = np.asarray(features, np.float64) - self._centre
        self._product = self._x @ centred.T
        self._reference_scatter = float(np.sum(centred**2))
        self._m = len(reference)

    def __call__(self, indices: NDArray[np.intp] | None = None) -> float:
        """Distance of the features with these indices; all of them when None."""
        x, product = (self._x, self._product) if indices is None else (self._x[indices], self._product[indices])
        n, m, mean = len(x), self._m, x.mean(axis=0)
        nuclear = np.linalg.svd(product - product.mean(axis=0), compute_uv=False).sum()
        traces = float(np.sum((x - mean) ** 2)) / (n - 1) + self._reference_scatter / (m - 1)
        return _distance(mean, traces, float(nuclear / np.sqrt((n - 1.0) * (m - 1.0))))


def subset_distance(
    features: NDArray[np.floating], reference: NDArray[np.floating]
) -> Callable[[NDArray[np.intp]], float]:
    """Build the function from indices into features (N, d) to their distance, NaN for fewer than two images."""
    if min(len(features), len(reference)) < features.shape[1]:
        gram = GramDistance(features, reference)
        return lambda indices: gram(indices) if len(indices) > 1 else np.nan
    moments = Moments.of(reference)
    return lambda indices: frechet_distance(moments, Moments.of(features[indices])) if len(indices) > 1 else np.nan


def symmetric_root(S: Matrix) -> Matrix:
    """S^(1/2) of a symmetric positive semi-definite matrix; eigenvalues below zero are rounding and count as zero."""
    eigenvalues, Q = np.linalg.eigh(S)
    root: Matrix = (Q * np.sqrt(eigenvalues.clip(min=0))) @ Q.T
    return root


def _distance(mean_difference: Matrix, traces: float, trace_root: float) -> float:
    """Put the terms together; identical sets can come out below zero by rounding, a distance is never negative."""
    return max(0.0, float(mean_difference @ mean_difference) + traces - 2 * trace_root)
