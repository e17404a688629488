"""The trace term of the Fréchet distance: the symmetric route against ``scipy.linalg.sqrtm``.

512 dimensions, so that it is done in seconds; ``HYPERSD_BENCH_DIMENSIONS=2048`` for Inception's.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import scipy.linalg
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from metrics.frechet import Moments, SubsetDistance, frechet_distance

DIMENSIONS = int(os.environ.get("HYPERSD_BENCH_DIMENSIONS", "512"))


def _features(n: int, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (rng.normal(0, 1, (n, DIMENSIONS)) * np.geomspace(1, 0.01, DIMENSIONS)).astype(np.float32)


@pytest.fixture(scope="module")
def moments() -> tuple[Moments, Moments]:
    return Moments.of(_features(2 * DIMENSIONS, 0)), Moments.of(_features(2 * DIMENSIONS, 1))


def test_symmetric(benchmark: BenchmarkFixture, moments: tuple[Moments, Moments]) -> None:
    _ = moments[0].root  # a reference's root is computed once for all models
    assert benchmark.pedantic(frechet_distance, moments, rounds=3, warmup_rounds=1) > 0


def test_scipy_sqrtm(benchmark: BenchmarkFixture, moments: tuple[Moments, Moments]) -> None:
    reference, other = moments
    product = reference.covariance @ other.covariance
    root = benchmark.pedantic(scipy.linalg.sqrtm, [product], rounds=1)
    traces = np.trace(reference.covariance) + np.trace(other.covariance)
    want = np.sum((reference.mean - other.mean) ** 2) + traces - 2 * np.trace(root).real
    assert frechet_distance(*moments) == pytest.approx(want, rel=1e-6)


def test_gram_of_few_images(benchmark: BenchmarkFixture) -> None:
    distance = SubsetDistance(_features(DIMENSIONS // 8, 2), _features(DIMENSIONS // 2, 3))
    assert benchmark.pedantic(distance, rounds=5, warmup_rounds=1) > 0
