"""What is measured of a configuration's cost: in which order, and which of the timed batches count."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hypersd_bench.catalog.spec import ModelSpec
from hypersd_bench.runner import timing
from hypersd_bench.runner.plan import Configuration
from hypersd_bench.runner.spec import Timing
from hypersd_bench.runner.timing import Measured
from hypersd_bench.sampling import ddim_trailing
from hypersd_bench.store import TimingRow

SECONDS = {1: 0.1, 4: 0.2, 16: 0.79}  # of a batch; no more than 3 % is gained from 4 to 16


def configuration(name: str) -> Configuration:
    return Configuration(name, ModelSpec(name, name, "pocket", "lora", ddim_trailing((1,))), 1, "pocket")


def test_every_other_round_goes_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    def measured(plan: Any, chosen: Any, bench: Any, batches: Any, loads: Any, of: Configuration, n: int) -> Measured:
        seen.append((of.label, n))
        return Measured(str(of), n + 1)

    monkeypatch.setattr(timing, "_measure", measured)
    monkeypatch.setattr(timing, "Bench", lambda device: SimpleNamespace(clear=lambda: None))
    plan: Any = SimpleNamespace(spec=SimpleNamespace(timing=Timing(rounds=3), batch_size=None))
    todo = [(configuration("a"), 0), (configuration("b"), 1), (configuration("c"), 0)]
    list(timing.measure(plan, todo, "cpu"))
    assert seen == [("a", 0), ("c", 0), ("c", 1), ("b", 1), ("a", 1), ("a", 2), ("b", 2), ("c", 2)]


class FakeClock(timing.Clock):
    """Batches that take ``SECONDS``, the first of them a hundred times as long; denoising is half of it."""

    def run(self, pipe: Any, batch_size: int, repeat: int) -> list[TimingRow]:
        seconds = SECONDS[batch_size] * (100 if repeat < 0 else 1)
        spans = {"denoise": seconds / 2, "total": seconds}
        return [TimingRow("a", 1, stage, repeat, batch_size, took, "cpu") for stage, took in spans.items()]


def test_throughput_is_of_whole_batches_after_a_warm_up() -> None:
    of = configuration("a")
    clock = FakeClock(SimpleNamespace(), of, "cpu")  # type: ignore[arg-type]
    found = Measured(str(of), 1, timings=[row for repeat in range(3) for row in clock.run(None, 1, repeat)])
    batches: Any = SimpleNamespace(size=lambda of: 64)
    timing._measure_throughput(clock, None, Timing(), batches, found)
    rates = {cost.batch_size: cost.value for cost in found.costs if cost.name == "images-per-second"}
    assert rates == {size: pytest.approx(size / SECONDS[size]) for size in (1, 4, 16)}  # and 64 is not tried
    assert {row.repeat for row in found.timings} == {0, 1, 2}
