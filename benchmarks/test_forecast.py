"""What ``plan`` predicts against what the run then takes, on the miniature.

Read ``predicted / real`` in the extra info, and whether the machine was quiet: the prediction is one of this moment.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from hypersd_bench.pocket import WEIGHTS
from hypersd_bench.runner.benchmark import run_benchmark
from hypersd_bench.runner.forecast import forecast
from hypersd_bench.runner.plan import Plan, make_plan
from hypersd_bench.runner.spec import load_spec

METRICS = ("clip-score/pocket", "aesthetic/pocket", "concept/pocket", "fid/lite0")
ROUNDS = 3
pytestmark = pytest.mark.skipif(not (WEIGHTS / "base").is_dir(), reason="the miniature is not built")


def plan_of(timed: bool, metrics: tuple[str, ...]) -> Plan:
    spec = load_spec(None, {"models": ["hyper-sd", "lcm", "teacher"], "steps": [1, 4], "num_prompts": 32,
                            "metrics": list(metrics)})  # fmt: skip
    return make_plan(spec if timed else spec.model_copy(update={"timing": None}))


@pytest.mark.parametrize("whole", [False, True], ids=["images", "images, timing and scores"])
def test_predicted_and_real(benchmark: BenchmarkFixture, tmp_path: Path, whole: bool) -> None:
    plan = plan_of(whole, METRICS if whole else ())
    run_benchmark(plan_of(False, METRICS if whole else ()), tmp_path / "warm-up", "cpu")
    predicted: list[float] = []

    def predict() -> tuple[tuple[Plan, Path, str], dict[str, object]]:
        out = tmp_path / f"run-{len(predicted)}"
        seconds = forecast(plan, out, "cpu").seconds
        assert seconds is not None
        predicted.append(seconds)
        return (plan, out, "cpu"), {}

    benchmark.pedantic(run_benchmark, setup=predict, rounds=ROUNDS)
    assert benchmark.stats
    real = benchmark.stats.stats.data
    benchmark.extra_info["predicted / real"] = [round(p / r, 3) for p, r in zip(predicted, real, strict=True)]
