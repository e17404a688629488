"""Statistics of a set's features beside a reference's: what makes a number of features; numpy only, float64.

    frechet             Fréchet distance of Gaussians (Heusel et al. 2017), of any subset cheaply
    kid                 squared MMD under the cubic kernel (x.y / d + 1)^3, unbiased U-statistic over all pairs, x1000
                        (Binkowski et al. 2018; no random subsets, so no seed)
    cmmd                squared MMD under a Gaussian kernel of sigma 10 on L2-normalised features, biased V-statistic,
                        x1000 (Jayasumana et al. 2024 and their code)
    precision, recall   share of images inside the other set's 3-nearest-neighbour balls (Kynkäänniemi et al. 2019)
    density, coverage   the same with counts, and by the reference's 5-nearest-neighbour balls (Naeem et al. 2020)

A ball holds its border. Every statistic gives NaN for a set that is too small for it: two images, for balls k + 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from hypersd_bench.contracts import ReferenceMoments
from hypersd_bench.errors import InputError, unknown_name
from metrics.frechet import FrechetReference, SubsetDistance

Matrix = NDArray[np.float64]
Features = NDArray[np.floating]
Subset = Callable[[NDArray[np.intp] | None], float]  # indices into the features, each at most once; None: all
SCALE = 1000.0  # of KID and CMMD, as the CMMD authors have it
SIGMA = 10.0
PRECISION_NEIGHBOURS = 3
COVERAGE_NEIGHBOURS = 5
_BLOCK = 1024  # rows of a kernel or distance matrix that are formed at once
_KEPT = 64 * 2**20  # entries of a matrix between all pairs that are kept for the next subset: 512 MiB


class PreparedReference:
    """A reference set's features (M, d), or statistics of them, with what all sets compared to it share.

    Prepare it once where several sets are compared to one reference; each part is computed when first needed.
    """

    def __init__(self, reference: Features | ReferenceMoments) -> None:
        """Take the features or statistics."""
        self.moments = reference if isinstance(reference, ReferenceMoments) else None
        self._features = None if isinstance(reference, ReferenceMoments) else np.asarray(reference, np.float64)
        self._radii: dict[int, Matrix] = {}

    @property
    def dimensions(self) -> int:
        """Of a feature."""
        return len(self.moments.mean) if self.moments is not None else self.features("").shape[1]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what it was made of."""
        held = self.features("") if self.moments is None else np.vstack([self.moments.mean, self.moments.covariance])
        return hashlib.sha256(f"{held.shape}".encode() + np.ascontiguousarray(held).tobytes()).hexdigest()

    def features(self, name: str) -> Matrix:
        """The features (M, d) for the statistic of this name; InputError where only their statistics are known."""
        if self._features is None:
            raise InputError(f"{name} needs the reference's own images: statistics alone hold no features")
        return self._features

    @cached_property
    def frechet(self) -> FrechetReference:
        """Mean and factor of the covariance."""
        return FrechetReference.of(self.features("frechet") if self.moments is None else self.moments)

    @cached_property
    def polynomial_mean(self) -> float:
        """Mean of the cubic kernel over all pairs of two images."""
        y = self.features("kid")
        total = sum(float(block.sum()) for _, block in _blocks(_polynomial, y, y))
        return (total - float(np.sum(_polynomial_diagonal(y)))) / (len(y) * (len(y) - 1.0)) if len(y) > 1 else np.nan

    @cached_property
    def gaussian_mean(self) -> float:
        """Mean of the Gaussian kernel over all pairs, an image with itself among them."""
        y = _normalised(self.features("cmmd"))
        return sum(float(block.sum()) for _, block in _blocks(_gaussian, y, y)) / len(y) ** 2

    def squared_radii(self, neighbours: int, name: str) -> Matrix:
        """Squared distance of every reference image to its k-th nearest, (M,); M must be larger than k."""
        if neighbours not in self._radii:
            y = self.centred(name)
            found = [_kth_smallest(block, neighbours) for _, block in _blocks(_squared_distances, y, y)]
            self._radii[neighbours] = np.concatenate(found)
        return self._radii[neighbours]

    def centred(self, name: str) -> Matrix:
        """The features less their mean, which makes their distances lose fewer digits."""
        features = self.features(name)
        centred: Matrix = features - features.mean(axis=0)
        return centred


Reference = Features | ReferenceMoments | PreparedReference


def subset_statistic(name: str, features: Features, reference: Reference) -> Subset:
    """Build the function from indices into features (N, d) to the statistic of that subset.

    reference: features (M, d), statistics of them (``frechet`` alone takes these) or either prepared. Raises InputError
    for an unknown name, features of other dimensions, or statistics where features are needed.
    """
    if name not in STATISTICS:
        raise unknown_name("statistic", name, STATISTICS)
    prepared = reference if isinstance(reference, PreparedReference) else PreparedReference(reference)
    if features.ndim != 2 or features.shape[1] != prepared.dimensions:
        raise InputError(f"{name}: features {features.shape} and a reference of {prepared.dimensions} dimensions can't "
                         "be of one extractor; score the run again")  # fmt: skip
    return STATISTICS[name](features, prepared)


def evaluate(name: str, features: Features, reference: Reference) -> float:
    """The statistic of all features (N, d); NaN where they are too few. Raises as ``subset_statistic`` does."""
    return subset_statistic(name, features, reference)(None)


def _frechet(features: Features, reference: PreparedReference) -> Subset:
    return SubsetDistance(features, reference.frechet)


def _kid(features: Features, reference: PreparedReference) -> Subset:
    x, y = np.asarray(features, np.float64), reference.features("kid")
    pairs = _PairSums(_polynomial, x)
    diagonal, cross = _polynomial_diagonal(x), _row_means(_polynomial, x, y)

    def kid(indices: NDArray[np.intp] | None) -> float:
        chosen = _mask(len(x), indices)
        n = chosen.sum()
        if n < 2 or len(y) < 2:
            return np.nan
        within = (pairs(chosen) - diagonal @ chosen) / (n * (n - 1))
        return SCALE * float(within + reference.polynomial_mean - 2 * (cross @ chosen) / n)

    return kid


def _cmmd(features: Features, reference: PreparedReference) -> Subset:
    x, y = _normalised(np.asarray(features, np.float64)), _normalised(reference.features("cmmd"))
    pairs, cross = _PairSums(_gaussian, x), _row_means(_gaussian, x, y)

    def cmmd(indices: NDArray[np.intp] | None) -> float:
        chosen = _mask(len(x), indices)
        n = chosen.sum()
        if n < 2 or len(y) < 2:
            return np.nan
        return SCALE * float(pairs(chosen) / n**2 + reference.gaussian_mean - 2 * (cross @ chosen) / n)

    return cmmd


def _precision(features: Features, reference: PreparedReference) -> Subset:
    inside, enough = _reference_balls(features, reference, PRECISION_NEIGHBOURS, "precision")
    found = np.bincount(inside[0], minlength=len(features)) > 0
    return lambda indices: float(found[_chosen(indices)].mean()) if enough(indices) else np.nan


def _density(features: Features, reference: PreparedReference) -> Subset:
    inside, enough = _reference_balls(features, reference, COVERAGE_NEIGHBOURS, "density")
    count = np.bincount(inside[0], minlength=len(features)) / COVERAGE_NEIGHBOURS
    return lambda indices: float(count[_chosen(indices)].mean()) if enough(indices) else np.nan


def _coverage(features: Features, reference: PreparedReference) -> Subset:
    (image, ball), enough = _reference_balls(features, reference, COVERAGE_NEIGHBOURS, "coverage")
    num_balls = len(reference.features("coverage"))

    def coverage(indices: NDArray[np.intp] | None) -> float:
        chosen = _mask(len(features), indices) > 0
        return len(np.unique(ball[chosen[image]])) / num_balls if enough(indices) else np.nan

    return coverage


def _recall(features: Features, reference: PreparedReference) -> Subset:
    """Radii are those within the subset: recall is asked of the set that it is of."""
    y = reference.features("recall")
    x, y = np.asarray(features, np.float64) - y.mean(axis=0), reference.centred("recall")
    k, kept = PRECISION_NEIGHBOURS, len(x) * (len(x) + len(y)) <= _KEPT
    among, across = (_squared_distances(x, x), _squared_distances(x, y)) if kept else (None, None)

    def recall(indices: NDArray[np.intp] | None) -> float:
        chosen = np.arange(len(x)) if indices is None else indices
        if len(chosen) <= k or len(y) <= k:
            return np.nan
        found = np.zeros(len(y), bool)
        for start in range(0, len(chosen), _BLOCK):
            rows = chosen[start : start + _BLOCK]
            if among is not None and across is not None:
                mine, theirs = among[np.ix_(rows, chosen)], across[rows]
            else:
                mine, theirs = _squared_distances(x[rows], x[chosen]), _squared_distances(x[rows], y)
            found |= (theirs <= _kth_smallest(mine, k)[:, None]).any(axis=0)
        return float(found.mean())

    return recall


STATISTICS: Mapping[str, Callable[[Features, PreparedReference], Subset]] = MappingProxyType({
    "frechet": _frechet,
    "kid": _kid,
    "cmmd": _cmmd,
    "precision": _precision,
    "recall": _recall,
    "density": _density,
    "coverage": _coverage,
})  # fmt: skip


class _PairSums:
    """Sum of a kernel over all pairs of a subset, (w, K w) with w one for each chosen image; K is kept if small."""

    def __init__(self, kernel: Callable[[Matrix, Matrix], Matrix], x: Matrix) -> None:
        self._kernel, self._x = kernel, x
        self._kept = kernel(x, x) if len(x) ** 2 <= _KEPT else None

    def __call__(self, chosen: Matrix) -> float:
        if self._kept is not None:
            return float(chosen @ (self._kept @ chosen))
        x = self._x[chosen > 0]
        return sum(float(block.sum()) for _, block in _blocks(self._kernel, x, x))


def _reference_balls(
    features: Features, reference: PreparedReference, neighbours: int, name: str
) -> tuple[tuple[NDArray[np.intp], NDArray[np.intp]], Callable[[NDArray[np.intp] | None], bool]]:
    """Pairs (image, reference image whose ball it is in), and whether a subset is large enough for the statistic.

    About k pairs an image where the sets are alike: all that subsets need, instead of all distances.
    """
    origin = reference.features(name).mean(axis=0)
    x, y = np.asarray(features, np.float64) - origin, reference.centred(name)
    if len(y) <= neighbours:
        none = np.zeros(0, np.intp)
        return (none, none), lambda _: False
    radii = reference.squared_radii(neighbours, name)
    found = [
        (rows[i], j)
        for rows, block in _blocks(_squared_distances, x, y)
        for i, j in [np.nonzero(block <= radii)]
    ]  # fmt: skip
    pairs = np.concatenate([i for i, _ in found]), np.concatenate([j for _, j in found])
    return pairs, lambda indices: (len(x) if indices is None else len(indices)) > neighbours


def _blocks(
    between: Callable[[Matrix, Matrix], Matrix], x: Matrix, y: Matrix
) -> Iterator[tuple[NDArray[np.intp], Matrix]]:
    """Row numbers and rows of a matrix between all of x and all of y."""
    for start in range(0, len(x), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(x)))
        yield rows, between(x[rows], y)


def _row_means(kernel: Callable[[Matrix, Matrix], Matrix], x: Matrix, y: Matrix) -> Matrix:
    """Mean of a kernel over y for every row of x, (N,)."""
    return np.concatenate([block.mean(axis=1) for _, block in _blocks(kernel, x, y)])


def _polynomial(x: Matrix, y: Matrix) -> Matrix:
    base: Matrix = x @ y.T / x.shape[1] + 1.0
    return base * base * base


def _polynomial_diagonal(x: Matrix) -> Matrix:
    diagonal: Matrix = (np.sum(x**2, axis=1) / x.shape[1] + 1.0) ** 3
    return diagonal


def _gaussian(x: Matrix, y: Matrix) -> Matrix:
    kernel: Matrix = np.exp(_squared_distances(x, y) / (-2 * SIGMA**2))
    return kernel


def _normalised(x: Matrix) -> Matrix:
    """To length one; zero stays zero."""
    length = np.linalg.norm(x, axis=1, keepdims=True)
    unit: Matrix = x / np.where(length > 0, length, 1.0)
    return unit


def _squared_distances(x: Matrix, y: Matrix) -> Matrix:
    squares: Matrix = np.sum(x**2, axis=1)[:, None] + np.sum(y**2, axis=1) - 2 * x @ y.T
    return squares.clip(min=0)


def _kth_smallest(squares: Matrix, neighbours: int) -> Matrix:
    """Squared distance to the k-th nearest of each row, which is itself at distance zero among its columns."""
    found: Matrix = np.partition(squares, neighbours, axis=1)[:, neighbours]
    return found


def _mask(n: int, indices: NDArray[np.intp] | None) -> Matrix:
    """One for each chosen image, (N,)."""
    mask = np.ones(n) if indices is None else np.zeros(n)
    if indices is not None:
        mask[indices] = 1.0
    return mask


def _chosen(indices: NDArray[np.intp] | None) -> NDArray[np.intp] | slice:
    return slice(None) if indices is None else indices
