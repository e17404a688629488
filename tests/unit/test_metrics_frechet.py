"""The Fréchet distance against closed forms, torchmetrics and torch-fidelity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from metrics.frechet import (
    Moments,
    SubsetDistance,
    feature_distance,
    frechet_distance,
    gaussian_distance,
)
from metrics.stats import jackknife


def _features(n: int, d: int, seed: int, rank: int | None = None) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    spread = rng.normal(0, 1, (rank or d, d))
    return (rng.normal(0, 1, (n, rank or d)) @ spread + rng.normal(0, 1, d)).astype(np.float32)


def test_equal_covariance_is_the_squared_distance_of_means() -> None:
    rng = np.random.default_rng(0)
    A = rng.normal(0, 1, (6, 6))
    m1, m2 = rng.normal(0, 1, (2, 6))
    assert gaussian_distance(m1, A @ A.T, m2, A @ A.T) == pytest.approx(np.sum((m1 - m2) ** 2), rel=1e-9)


def test_diagonal_covariances() -> None:
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.25])
    want = 1.0 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert gaussian_distance(np.zeros(3), np.diag(a), np.array([0, 1.0, 0]), np.diag(b)) == pytest.approx(want)


def test_scaled_covariance() -> None:
    A = np.random.default_rng(1).normal(0, 1, (5, 5))
    S = A @ A.T
    assert gaussian_distance(np.zeros(5), S, np.zeros(5), 9 * S) == pytest.approx(4 * np.trace(S), rel=1e-9)


@pytest.mark.parametrize(("n", "d", "rank"), [(80, 8, 8), (80, 8, 3), (10, 32, 32), (10, 32, 4)])
def test_identical_sets_are_at_zero(n: int, d: int, rank: int) -> None:
    x = _features(n, d, 2, rank)
    scale = float(x.var(axis=0).sum())
    assert feature_distance(x, x) == pytest.approx(0, abs=1e-6 * scale)
    assert frechet_distance(Moments.of(x), Moments.of(x)) == pytest.approx(0, abs=1e-6 * scale)


@pytest.mark.parametrize(
    ("n", "m", "d", "rank"), [(60, 90, 12, 12), (60, 90, 12, 5), (20, 90, 40, 40), (20, 25, 40, 9)]
)
def test_all_routes_agree(n: int, m: int, d: int, rank: int) -> None:
    x, y = _features(n, d, 3, rank), _features(m, d, 4, rank)
    symmetric = frechet_distance(Moments.of(y), Moments.of(x))
    assert SubsetDistance(x, y)() == pytest.approx(symmetric, rel=1e-7)
    assert feature_distance(x, y) == pytest.approx(symmetric, rel=1e-7)
    general = np.sqrt(np.linalg.eigvals(np.cov(x.T.astype(float)) @ np.cov(y.T.astype(float))).astype(complex)).real
    means = np.sum((x.mean(axis=0, dtype=float) - y.mean(axis=0, dtype=float)) ** 2)
    want = means + x.var(axis=0, ddof=1, dtype=float).sum() + y.var(axis=0, ddof=1, dtype=float).sum()
    assert symmetric == pytest.approx(want - 2 * general.sum(), rel=1e-5)


@pytest.mark.parametrize(("n", "d"), [(200, 16), (24, 48)])
def test_torchmetrics_and_torch_fidelity_agree_on_the_same_features(n: int, d: int) -> None:
    torch = pytest.importorskip("torch")
    fid = pytest.importorskip("torchmetrics.image.fid")
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = _features(n, d, 5), _features(n + 30, d, 6)
    extractor = torch.nn.Flatten()  # the "images" are (n, 1, 1, d) floats already: their features are themselves
    extractor.num_features = d
    metric = fid.FrechetInceptionDistance(extractor, normalize=True, input_img_size=(1, 1, d)).set_dtype(torch.float64)
    metric.update(torch.from_numpy(y).double().reshape(-1, 1, 1, d), real=True)
    metric.update(torch.from_numpy(x).double().reshape(-1, 1, 1, d), real=False)
    ours = feature_distance(x, y)
    assert ours == pytest.approx(float(metric.compute()), rel=1e-5)
    statistics = [fidelity.fid_features_to_statistics(torch.from_numpy(z).double()) for z in (x, y)]
    theirs = fidelity.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(theirs, rel=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 39), st.integers(1, 39), st.permutations(range(3)))
def test_merged_shards_are_the_whole(cut: int, other: int, order: list[int]) -> None:
    x = _features(40, 6, 7) + 1000  # a mean far from zero
    first, second = sorted((cut, other))
    shards = [part for part in (x[:first], x[first:second], x[second:]) if len(part)]
    merged, *rest = [Moments.of(shards[i]) for i in order if i < len(shards)]
    for moments in rest:
        merged = merged + moments
    whole = Moments.of(x)
    assert merged.n == whole.n
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=0, atol=1e-12 * whole.covariance.max())


def test_moments_are_numpys() -> None:
    x = _features(50, 7, 8)
    np.testing.assert_allclose(Moments.of(x).covariance, np.cov(x.T.astype(np.float64)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("n", "m", "d"), [(40, 30, 50), (60, 70, 8)])
def test_subsets_are_the_distance_of_the_subset(n: int, m: int, d: int) -> None:
    x, y = _features(n, d, 9), _features(m, d, 10)
    kept = np.arange(0, n, 2)
    assert SubsetDistance(x, y)(kept) == pytest.approx(feature_distance(x[kept], y), rel=1e-7)


def test_distance_grows_with_the_shift_and_is_symmetric() -> None:
    x, y = _features(100, 8, 11), _features(100, 8, 11)
    distances = [feature_distance(x + shift, y) for shift in (0.5, 1, 2)]
    assert distances == sorted(distances)
    z = _features(100, 8, 12)
    assert feature_distance(x, z) == pytest.approx(feature_distance(z, x), rel=1e-9)


def _few_images(seed: int, shift: float = 0.0) -> NDArray[np.float64]:
    """Two images of each of 30 prompts, 12-d, alike within a prompt."""
    rng = np.random.default_rng(seed)
    return (0.6 * rng.normal(shift, 1, (30, 1, 12)) + 0.8 * rng.normal(0, 1, (30, 2, 12))).reshape(60, 12)


def test_jackknife_interval_of_a_difference_covers_and_is_not_much_too_wide() -> None:
    clusters = [f"p{i}" for i in range(30) for _ in range(2)]
    reference = np.random.default_rng(99).normal(0, 1, (200, 12))
    differences = []
    for seed in range(40):
        a, b = (SubsetDistance(_few_images(2 * seed + k), reference) for k in (0, 1))
        differences.append((jackknife(a, clusters) - jackknife(b, clusters)).difference())
    assert np.mean([d.low <= 0 <= d.high for d in differences]) >= 0.9
    standard_error = np.mean([(d.high - d.value) / stats.t.ppf(0.975, 19) for d in differences])
    assert 0.85 < standard_error / np.std([d.value for d in differences], ddof=1) < 2


def test_bootstrap_moves_the_distance_by_more_than_its_spread() -> None:
    """Why the interval is no bootstrap: resamples repeat images, and the distance goes up."""
    reference = np.random.default_rng(99).normal(0, 1, (200, 12))
    distance, rng = SubsetDistance(_few_images(0), reference), np.random.default_rng(1)
    resampled = [distance(rng.integers(0, 60, 60)) for _ in range(100)]
    assert np.mean(resampled) - distance(np.arange(60)) > 2 * np.std(resampled)
