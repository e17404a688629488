"""The Fréchet distance of two Gaussians, from streamed moments or from features; numpy only, float64 throughout.

    d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)        (Dowson and Landau 1982; Heusel et al. 2017, eq. 6)

The trace term is the sum of square roots of eigenvalues of R S2 R with R = S1^(1/2), which is symmetric: no complex
numbers and no ``sqrtm``. With fewer images than dimensions it is the nuclear norm of the centred Gram matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hypersd_bench.contracts import ReferenceMoments

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
    traces = float(np.trace(S1) + np.trace(S2))
    return _distance(m1 - m2, traces, _sum_of_roots(R @ S2 @ R))


@dataclass(frozen=True, eq=False)
class FrechetReference:
    """What every distance to a reference shares: mean (d,), trace of the covariance S, and a factor F with F F^T = S.

    factor: (d, k), k the smaller of d and the number of the reference's images.
    """

    mean: Matrix
    trace: float
    factor: Matrix

    @classmethod
    def of(cls, reference: NDArray[np.floating] | Moments | ReferenceMoments) -> FrechetReference:
        """Prepare features (M, d), M >= 2, or statistics of them."""
        if not isinstance(reference, Moments | ReferenceMoments):
            if len(reference) >= reference.shape[1]:
                return cls.of(Moments.of(reference))
            x = np.asarray(reference, np.float64)
            factor = (x - x.mean(axis=0)).T / np.sqrt(len(x) - 1.0)
            return cls(x.mean(axis=0), float(np.sum(factor**2)), factor)
        root = reference.root if isinstance(reference, Moments) else symmetric_root(reference.covariance)
        return cls(reference.mean, float(np.trace(reference.covariance)), root)


class SubsetDistance:
    """Fréchet distance of any subset of features (N, d) to a reference.

    tr (S1 S2)^(1/2) is the nuclear norm of X F / sqrt(n - 1), X the subset's centred features. X F is formed once for
    all subsets, so that one pays for a Gram matrix and its eigenvalues, n x n or k x k, whichever is smaller.
    """

    def __init__(
        self,
        features: NDArray[np.floating],
        reference: NDArray[np.floating] | Moments | ReferenceMoments | FrechetReference,
    ) -> None:
        """Keep what every subset shares."""
        known = reference if isinstance(reference, FrechetReference) else FrechetReference.of(reference)
        self._trace = known.trace
        self._x = np.asarray(features, np.float64) - known.mean
        self._product = self._x @ known.factor

    def __call__(self, indices: NDArray[np.intp] | None = None) -> float:
        """Distance of the features with these indices, all of them when None; NaN for fewer than two."""
        x, product = (self._x, self._product) if indices is None else (self._x[indices], self._product[indices])
        if len(x) < 2:
            return np.nan
        mean, centred = x.mean(axis=0), product - product.mean(axis=0)
        gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
        trace = float(np.sum((x - mean) ** 2)) / (len(x) - 1)
        return _distance(mean, trace + self._trace, _sum_of_roots(gram / (len(x) - 1)))


def feature_distance(
    features: NDArray[np.floating], reference: NDArray[np.floating] | Moments | ReferenceMoments
) -> float:
    """Fréchet distance of features (N, d) to a reference: features (M, d), or statistics; NaN for fewer than two."""
    return SubsetDistance(features, reference)()


def symmetric_root(S: Matrix) -> Matrix:
    """S^(1/2) of a symmetric positive semi-definite matrix; eigenvalues below zero are rounding and count as zero."""
    eigenvalues, Q = np.linalg.eigh(S)
    root: Matrix = (Q * np.sqrt(eigenvalues.clip(min=0))) @ Q.T
    return root


def _sum_of_roots(S: Matrix) -> float:
    """tr S^(1/2)."""
    return float(np.sqrt(np.linalg.eigvalsh(S).clip(min=0)).sum())


def _distance(mean_difference: Matrix, traces: float, trace_root: float) -> float:
    """Put the terms together; identical sets can come out below zero by rounding, a distance is never negative."""
    return max(0.0, float(mean_difference @ mean_difference) + traces - 2 * trace_root)
