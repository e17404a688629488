"""Statistics against scipy, hand values, published values and simulation."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from metrics.preference import preference_rate
from metrics.stats import (
    clustered_mean,
    clustered_rate,
    grouped_jackknife,
    holm,
    jackknife_difference,
    minimum_detectable_difference,
    paired_difference,
    wilson,
)


def test_one_value_per_cluster_is_the_ordinary_t_interval() -> None:
    x = np.random.default_rng(0).normal(3, 2, 40)
    got = clustered_mean(x, [str(i) for i in range(40)])
    want = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (got.low, got.high) == pytest.approx((want.low, want.high), rel=1e-12)
    assert (got.n, got.num_clusters) == (40, 40)


def test_balanced_clusters_are_the_t_interval_of_their_means() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(0, 1, (15, 1)) + rng.normal(0, 0.3, (15, 4))
    got = clustered_mean(x.ravel(), [f"p{i}" for i in range(15) for _ in range(4)])
    want = stats.ttest_1samp(x.mean(axis=1), 0).confidence_interval(0.95)
    assert (got.low, got.high) == pytest.approx((want.low, want.high), rel=1e-12)


def test_unbalanced_clusters_by_hand() -> None:
    # values 1 2 | 6: mean 3, cluster residual sums -3 and 3, var = 2/1 * 18 / 9 = 4, t(0.975, 1) = 12.7062
    got = clustered_mean([1, 2, 6], ["a", "a", "b"])
    assert got.value == 3
    assert got.high - got.value == pytest.approx(12.7062047 * 2, rel=1e-7)


def test_clustered_intervals_cover_and_naive_ones_do_not() -> None:
    rng = np.random.default_rng(2)
    clusters, covered, naive, runs = [f"p{i}" for i in range(25) for _ in range(4)], 0, 0, 800
    for _ in range(runs):
        x = (rng.normal(0, 1, (25, 1)) + rng.normal(0, 0.5, (25, 4))).ravel()
        estimate = clustered_mean(x, clusters)
        covered += estimate.low <= 0 <= estimate.high
        naive += abs(x.mean()) <= stats.t.ppf(0.975, 99) * x.std(ddof=1) / 10
    assert 0.93 <= covered / runs <= 0.97  # three standard errors around 0.95
    assert naive / runs < 0.8


def test_one_cluster_has_no_interval() -> None:
    got = clustered_mean([1.0, 2.0], ["a", "a"])
    assert got.value == 1.5
    assert np.isnan([got.low, got.high]).all()


@pytest.mark.parametrize("values", [[], [float("nan")], [[1.0]]])
def test_missing_values_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="values"):
        clustered_mean(values, ["a"] * len(values))


def test_paired_difference_is_scipys_paired_t_over_prompt_means() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(0.4, 1, (20, 3)), rng.normal(0, 1, (20, 3))
    got = paired_difference(a.ravel(), b.ravel(), [f"p{i}" for i in range(20) for _ in range(3)])
    want = stats.ttest_rel(a.mean(axis=1), b.mean(axis=1))
    interval = want.confidence_interval(0.95)
    assert got.p_value == pytest.approx(want.pvalue, rel=1e-12)
    assert (got.low, got.high) == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert (got.n, got.num_clusters) == (60, 20)


def test_paired_difference_weighs_prompts_not_images() -> None:
    assert paired_difference([1, 1, 1, 5], [0, 0, 0, 0], ["a", "a", "a", "b"]).value == 3  # (1 + 5) / 2


def test_paired_difference_is_of_a_minus_b() -> None:
    got = paired_difference([3, 4, 6], [1, 1, 1], ["a", "b", "c"])
    assert got.value > 0
    assert paired_difference([1, 1, 1], [3, 4, 6], ["a", "b", "c"]).value == -got.value


def test_differences_without_spread() -> None:
    assert paired_difference([1, 2], [1, 2], ["a", "b"]).p_value == 1
    assert paired_difference([2, 3], [1, 2], ["a", "b"]).p_value == 0
    assert paired_difference([2, 3], [1, 2], ["a", "a"]).p_value == 1  # one prompt shows nothing


def test_holm_by_hand() -> None:
    # sorted 0.01 0.02 0.03 0.04 times 4 3 2 1: 0.04 0.06 0.06 0.04, made monotone
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_never_lowers_and_keeps_the_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(a >= p for a, p in zip(adjusted, p_values, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (81, 263)])
def test_wilson_is_scipys(k: int, n: int) -> None:
    want = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    got = wilson(k, n)
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=1e-12)


def test_wilson_published() -> None:
    # Newcombe 1998, table I, method 3: 81/263 gives 0.2553 to 0.3662; 15/148 gives 0.0624 to 0.1605; 1/29 to 0.1718
    assert (wilson(81, 263).low, wilson(81, 263).high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert (wilson(15, 148).low, wilson(15, 148).high) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert (wilson(1, 29).low, wilson(1, 29).high) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_wilson_needs_a_trial() -> None:
    with pytest.raises(ValueError, match="n >= 1"):
        wilson(0, 0)


def test_ties_count_half() -> None:
    assert preference_rate(6, 2, 2).value == 0.7
    assert preference_rate(0, 0, 4).value == 0.5


def test_clustered_rate_of_one_image_a_prompt_is_wilson() -> None:
    votes = [1.0] * 30 + [0.0] * 10
    got, want = clustered_rate(votes, [str(i) for i in range(40)]), wilson(30, 40)
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=1e-9)


def test_clustered_rate_counts_prompts_when_their_images_agree() -> None:
    votes = np.repeat([1.0] * 15 + [0.0] * 5, 4)
    got, want = clustered_rate(votes, [f"p{i}" for i in range(20) for _ in range(4)]), wilson(15, 20)
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=0.01)
    assert got.n == 80


def test_all_right_is_not_certainty() -> None:
    got = clustered_rate([1.0] * 64, [str(i // 2) for i in range(64)])
    assert (got.low, got.high) == pytest.approx((wilson(32, 32).low, 1.0))


def test_jackknife_of_a_mean_is_its_t_interval() -> None:
    x = np.random.default_rng(4).normal(0, 1, 20)
    got = grouped_jackknife(lambda i: float(x[i].mean()), [str(k) for k in range(20)], num_groups=20)
    want = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (got.low, got.high) == pytest.approx((want.low, want.high), rel=1e-9)


def test_jackknife_leaves_whole_prompts_out() -> None:
    clusters = [f"p{i}" for i in range(30) for _ in range(2)]
    seen: list[set[int]] = []
    grouped_jackknife(lambda i: seen.append(set(i)) or 0.0, clusters, num_groups=7)  # type: ignore[func-returns-value]
    assert len(seen) == 8
    for kept in seen[1:]:
        assert all((2 * p in kept) == (2 * p + 1 in kept) for p in range(30))
    assert all(sum(image not in kept for kept in seen[1:]) == 1 for image in range(60))


def test_jackknife_difference_covers() -> None:
    rng, covered, runs = np.random.default_rng(5), 0, 300
    clusters = [f"p{i}" for i in range(40) for _ in range(2)]
    for _ in range(runs):
        shared = rng.normal(0, 1, (40, 1))
        a, b = (np.exp(0.3 * (shared + rng.normal(0, 0.5, (40, 2))).ravel()) for _ in range(2))
        got = jackknife_difference(lambda i, a=a, b=b: float(a[i].std() - b[i].std()), clusters)  # type: ignore[misc]
        covered += got.low <= 0 <= got.high
    assert 0.91 <= covered / runs <= 0.99


def test_minimum_detectable_difference_published_table() -> None:
    # per-image sd 3.2 and correlation 0.7 between models: differences have sd 3.2 sqrt(2 (1 - 0.7))
    sd = 3.2 * np.sqrt(2 * 0.3)
    got = [minimum_detectable_difference(sd, n) for n in (100, 500, 1000, 5000)]
    assert got == pytest.approx([0.69, 0.31, 0.22, 0.10], abs=0.005)


def test_power_at_the_minimum_detectable_difference() -> None:
    rng, n, runs = np.random.default_rng(6), 60, 1000
    shift = minimum_detectable_difference(1.0, n)
    found = np.sum(stats.ttest_1samp(rng.normal(shift, 1, (runs, n)), 0, axis=1).pvalue < 0.05)
    assert 0.75 <= found / runs <= 0.85


def test_no_torch() -> None:
    code = (
        "import sys, metrics.stats, metrics.preference, metrics.comparison, metrics.cli; print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"
