"""Statistics of feature sets against plain loops, torchmetrics, torch-fidelity, published expectations and points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hypersd_bench.contracts import ReferenceMoments
from hypersd_bench.errors import InputError
from metrics import set_statistics
from metrics.frechet import Moments, feature_distance
from metrics.set_statistics import STATISTICS, PreparedReference, evaluate, subset_statistic
from metrics.stats import jackknife

Points = NDArray[np.float64]
RNG = np.random.default_rng


def _sets(n: int = 40, m: int = 55, d: int = 6, seed: int = 0) -> tuple[Points, Points]:
    rng = RNG(seed)
    return rng.normal(0.3, 1.1, (n, d)), rng.normal(0, 1, (m, d))


def _plain_kid(x: Points, y: Points) -> float:
    def k(a: Points, b: Points) -> float:
        return float((np.dot(a, b) / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return 1000 * (within_x + within_y - 2 * float(np.mean([[k(a, b) for b in y] for a in x])))


def _plain_cmmd(x: Points, y: Points) -> float:
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))

    def mean(a: Points, b: Points) -> float:
        return float(np.mean([[np.exp(-np.sum((p - q) ** 2) / (2 * 10**2)) for q in b] for p in a]))

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def _distances(x: Points, y: Points) -> Points:
    return np.array([[np.linalg.norm(a - b) for b in y] for a in x])


def _radii(x: Points, k: int) -> Points:
    return np.array([sorted(row)[k] for row in _distances(x, x)])  # the smallest is the point itself


def _plain_precision(x: Points, y: Points) -> float:
    return float((_distances(x, y) <= _radii(y, 3)).any(axis=1).mean())


def _plain_recall(x: Points, y: Points) -> float:
    return _plain_precision(y, x)


def _plain_density(x: Points, y: Points) -> float:
    return float((_distances(x, y) <= _radii(y, 5)).sum() / (5 * len(x)))


def _plain_coverage(x: Points, y: Points) -> float:
    return float(np.mean([_distances(x, y[j : j + 1]).min() <= r for j, r in enumerate(_radii(y, 5))]))


PLAIN: dict[str, Callable[[Points, Points], float]] = {
    "kid": _plain_kid,
    "cmmd": _plain_cmmd,
    "precision": _plain_precision,
    "recall": _plain_recall,
    "density": _plain_density,
    "coverage": _plain_coverage,
    "frechet": feature_distance,  # itself tested against closed forms
}


def test_every_statistic_has_a_plain_one() -> None:
    assert PLAIN.keys() == STATISTICS.keys()


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("memory", ["kept", "blocks"])
def test_whole_and_subsets_are_the_plain_computation(name: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if memory == "blocks":
        monkeypatch.setattr(set_statistics, "_BLOCK", 7)
        monkeypatch.setattr(set_statistics, "_KEPT", 0)
    x, y = _sets()
    statistic = subset_statistic(name, x, y)
    assert statistic(None) == pytest.approx(PLAIN[name](x, y), rel=1e-9, abs=1e-9)
    kept = RNG(1).choice(len(x), 17, replace=False)
    assert statistic(kept) == pytest.approx(PLAIN[name](x[kept], y), rel=1e-9, abs=1e-9)
    assert statistic(None) == evaluate(name, x, y)


@pytest.mark.parametrize("name", STATISTICS)
def test_order_does_not_count_and_float32_will_do(name: str) -> None:
    x, y = _sets()
    rng = RNG(2)
    assert evaluate(name, rng.permutation(x), rng.permutation(y)) == pytest.approx(evaluate(name, x, y), rel=1e-9)
    assert evaluate(name, x.astype(np.float32), y.astype(np.float32)) == pytest.approx(evaluate(name, x, y), abs=1e-3)


@pytest.mark.parametrize("name", STATISTICS)
def test_a_prepared_reference_gives_the_same(name: str) -> None:
    (x, y), prepared = _sets(), PreparedReference(_sets()[1])
    assert [evaluate(name, z, prepared) for z in (x, x[:20])] == [evaluate(name, z, y) for z in (x, x[:20])]


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all")
def test_torchmetrics_and_torch_fidelity_agree_on_kid() -> None:
    torch = pytest.importorskip("torch")
    kid = pytest.importorskip("torchmetrics.image.kid")
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = _sets(50, 50, 16)
    extractor = torch.nn.Flatten()  # the "images" are features already
    extractor.num_features = 16
    metric = kid.KernelInceptionDistance(extractor, subsets=1, subset_size=50, normalize=True).set_dtype(torch.float64)
    metric.update(torch.from_numpy(y).reshape(-1, 1, 1, 16), real=True)
    metric.update(torch.from_numpy(x).reshape(-1, 1, 1, 16), real=False)
    ours = evaluate("kid", x, y)
    assert ours == pytest.approx(1000 * float(metric.compute()[0]), rel=1e-6)
    theirs = fidelity.kid_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), kid_subsets=1, kid_subset_size=50, verbose=False
    )
    assert ours == pytest.approx(1000 * theirs["kernel_inception_distance_mean"], rel=1e-9)


def test_torch_fidelity_agrees_on_precision_and_recall() -> None:
    torch = pytest.importorskip("torch")
    fidelity = pytest.importorskip("torch_fidelity.metric_prc")
    x, y = _sets(120, 90, 8, seed=3)
    theirs = fidelity.prc_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), verbose=False)
    assert evaluate("precision", x, y) == pytest.approx(theirs["precision"], abs=1e-6)
    assert evaluate("recall", x, y) == pytest.approx(theirs["recall"], abs=1e-6)
    assert theirs["precision"] != theirs["recall"]  # else nothing tells which is which


def test_kid_of_equal_distributions_has_mean_zero_and_cmmd_has_not() -> None:
    values: dict[str, list[float]] = {"kid": [], "cmmd": []}
    for seed in range(400):
        rng = RNG(seed)
        x, y = rng.normal(0, 1, (12, 4)), rng.normal(0, 1, (15, 4))
        for name, found in values.items():
            found.append(evaluate(name, x, y))
    kid = np.array(values["kid"])
    assert abs(kid.mean()) < 3 * kid.std(ddof=1) / np.sqrt(len(kid))
    assert min(kid) < 0 < max(kid)
    assert min(values["cmmd"]) > 0  # a V-statistic is a squared norm


def test_cmmd_by_hand() -> None:
    # unit vectors at right angles: |x - y|^2 = 2, k = exp(-2 / 200) = 0.99004983; both sets constant, k = 1 within
    x, y = np.tile([3.0, 0.0], (4, 1)), np.tile([0.0, 0.5], (3, 1))
    assert evaluate("cmmd", x, y) == pytest.approx(1000 * 2 * (1 - 0.9900498337), abs=1e-6)


def test_kid_by_hand() -> None:
    # d = 1: k(1, 1) = 8, k(0, .) = 1; all of x at 1 and all of y at 0: 8 + 1 - 2
    assert evaluate("kid", np.ones((5, 1)), np.zeros((4, 1))) == pytest.approx(7000)


def test_expected_density_and_coverage_of_equal_distributions() -> None:
    """Naeem et al. 2020, lemmas 1 and 2: density 1; coverage 1 - prod_{i=1..k} (M - i) / (N + M - i)."""
    k, n, m = 5, 40, 60
    got = np.array([
        [evaluate(name, *(RNG(seed).normal(0, 1, (n + m, 3))[s] for s in (slice(n), slice(n, None))))
         for name in ("density", "coverage")] for seed in range(300)
    ])  # fmt: skip
    error = got.std(axis=0, ddof=1) / np.sqrt(len(got))
    i = np.arange(1, k + 1)
    assert got[:, 0].mean() == pytest.approx(1, abs=3 * error[0])
    assert got[:, 1].mean() == pytest.approx(1 - np.prod((m - i) / (n + m - i)), abs=3 * error[1])


def _clusters(seed: int, *centres: float) -> Points:
    """Thirty points around each place on a line in 2-d."""
    rng = RNG(seed)
    return np.concatenate([rng.normal((centre, 0), 0.1, (30, 2)) for centre in centres])


def test_mode_collapse_has_high_precision_and_low_recall() -> None:
    reference, collapsed = _clusters(0, 0, 100, 200, 300), _clusters(1, 100)
    assert evaluate("precision", collapsed, reference) > 0.8
    assert evaluate("recall", collapsed, reference) < 0.25
    assert evaluate("density", collapsed, reference) > 0.7
    assert evaluate("coverage", collapsed, reference) <= 0.25


def test_stray_images_lower_precision_and_not_recall() -> None:
    reference, strayed = _clusters(0, 0, 100), _clusters(1, 0, 100, 500, 600)
    assert evaluate("precision", strayed, reference) <= 0.5
    assert evaluate("recall", strayed, reference) > 0.8
    assert evaluate("density", strayed, reference) < 0.6
    assert evaluate("coverage", strayed, reference) > 0.8


@pytest.mark.parametrize("name", ["kid", "cmmd", "precision", "coverage"])
def test_jackknife_intervals_of_paired_differences_cover(name: str) -> None:
    """Two models of one quality on the same 24 prompts, two seeds each, alike within a prompt."""
    clusters, reference = [f"p{i:02d}" for i in range(24) for _ in range(2)], RNG(99).normal(0, 1, (80, 4))
    prepared, found = PreparedReference(reference), []
    for seed in range(60):
        rng = RNG(seed)
        prompts = rng.normal(0, 0.6, (24, 1, 4))
        a, b = ((prompts + rng.normal(0, 0.8, (24, 2, 4))).reshape(48, 4) for _ in range(2))
        of_a, of_b = (jackknife(subset_statistic(name, x, prepared), clusters) for x in (a, b))
        found.append((of_a - of_b).difference())
    assert np.mean([d.low <= 0 <= d.high for d in found]) >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / 60)
    assert np.std([d.value for d in found], ddof=1) < 1.3 * np.mean([d.error for d in found])


@pytest.mark.parametrize("name", STATISTICS)
def test_a_set_beside_itself_is_perfect(name: str) -> None:
    _, y = _sets()
    best = {"precision": 1, "recall": 1, "coverage": 1, "frechet": 0, "cmmd": 0}
    if name == "density":
        assert evaluate(name, y, y) == pytest.approx(6 / 5)  # a point is in its own ball too: k + 1 of k on average
    elif name == "kid":
        assert evaluate(name, y, y) < 0
    else:
        assert evaluate(name, y, y) == pytest.approx(best[name], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "least"),
    [("frechet", 2), ("kid", 2), ("cmmd", 2), ("precision", 4), ("recall", 4), ("density", 6), ("coverage", 6)],
)
def test_too_small_a_subset_has_no_value(name: str, least: int) -> None:
    statistic = subset_statistic(name, *_sets())
    assert np.isnan(statistic(np.arange(least - 1)))
    assert np.isnan(statistic(np.arange(0)))
    assert np.isfinite(statistic(np.arange(least)))


@pytest.mark.parametrize("name", ["precision", "recall", "density", "coverage", "kid"])
def test_too_small_a_reference_gives_no_value(name: str) -> None:
    x, y = _sets()
    assert np.isnan(evaluate(name, x, y[: 1 if name == "kid" else 3]))


def test_statistics_alone_are_enough_for_frechet_and_for_nothing_else() -> None:
    x, y = _sets()
    moments = Moments.of(y)
    statistics = ReferenceMoments(moments.n, moments.mean, moments.covariance)
    assert evaluate("frechet", x, statistics) == pytest.approx(evaluate("frechet", x, y), rel=1e-9)
    half = np.arange(0, 40, 2)
    assert subset_statistic("frechet", x, statistics)(half) == pytest.approx(evaluate("frechet", x[half], y), rel=1e-9)
    for name in set(STATISTICS) - {"frechet"}:
        with pytest.raises(InputError, match=f"{name} needs the reference's own images: statistics alone"):
            evaluate(name, x, statistics)


def test_what_does_not_fit_is_refused() -> None:
    x, y = _sets()
    with pytest.raises(InputError, match="unknown statistic 'recal'; did you mean 'recall'"):
        subset_statistic("recal", x, y)
    for wrong in (y[:, :3], np.zeros(6)):
        values: Any = wrong
        with pytest.raises(InputError, match="dimensions can't be of one extractor"):
            evaluate("kid", values, y)
