"""The statistics at the size of a large benchmark: 5,000 prompts, 40 configurations, 10,000 resamples.

To hold on two cores: intervals and p-values of all against one in less than 10 seconds.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from metrics.set_statistics import STATISTICS, PreparedReference, subset_statistic
from metrics.stats import NUM_RESAMPLES, bootstrap_means, jackknife, paired_differences
from metrics.tradeoff import joint_means, judge_losses

PROMPTS, CONFIGURATIONS, IMAGES, DIMENSIONS = 5000, 40, 1000, 1280
LIMIT = 10.0  # seconds


def _values(missing: float = 0.0) -> NDArray[np.float64]:
    rng = np.random.default_rng(0)
    values = (
        rng.normal(0, 2, (PROMPTS, 1)) + rng.normal(0, 1, (PROMPTS, CONFIGURATIONS)) + np.arange(CONFIGURATIONS) / 50
    )
    return np.where(rng.random(values.shape) < missing, np.nan, values)


def slowest(benchmark: BenchmarkFixture) -> float:
    assert benchmark.stats is not None
    return float(benchmark.stats.stats.max)


@pytest.mark.parametrize("missing", [0.0, 0.01], ids=["all scored", "1 % missing"])
def test_all_against_one(benchmark: BenchmarkFixture, missing: float) -> None:
    assert NUM_RESAMPLES == 10_000
    values = _values(missing)
    found = benchmark.pedantic(paired_differences, [values[:, 1:] - values[:, :1]], rounds=3, warmup_rounds=1)
    assert len(found) == CONFIGURATIONS - 1
    assert slowest(benchmark) < LIMIT


def test_resampled_means(benchmark: BenchmarkFixture) -> None:
    means = benchmark.pedantic(bootstrap_means, [_values()], rounds=3, warmup_rounds=1)
    assert means.shape == (NUM_RESAMPLES, CONFIGURATIONS)


def test_cheapest_within(benchmark: BenchmarkFixture) -> None:
    values, costs = _values(), [(("model", c), float(c)) for c in range(CONFIGURATIONS)]
    losses = benchmark.pedantic(lambda: judge_losses(costs, *joint_means(values), 0.1), rounds=3, warmup_rounds=1)
    assert len(losses) == CONFIGURATIONS
    assert slowest(benchmark) < LIMIT


@pytest.mark.parametrize("name", STATISTICS)
def test_replicates_of_a_set(benchmark: BenchmarkFixture, name: str) -> None:
    """One configuration's value and jackknife, the reference prepared."""
    rng = np.random.default_rng(1)
    features = rng.normal(0.05, 1, (IMAGES, DIMENSIONS)).astype(np.float32)
    reference = PreparedReference(rng.normal(0, 1, (2 * IMAGES, DIMENSIONS)))
    prompts = [f"p{i // 2}" for i in range(IMAGES)]
    subset_statistic(name, features[:10], reference)(None)  # what all configurations share
    found = benchmark.pedantic(lambda: jackknife(subset_statistic(name, features, reference), prompts), rounds=2)
    assert len(found.left_out) == 20
