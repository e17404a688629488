"""Preference along the step and the latency axis: what the votes say per denoising step and per second."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

from hypersd_bench.store import RunStore
from user_study.analysis.rates import split


def axes(rates: Sequence[dict[str, Any]], run: RunStore | None) -> list[dict[str, Any]]:
    """For each comparison with votes: steps and latency (s per image, median) of both sides, beside the rate.

    ``equal_steps``: both took the same number of steps. ``latency_ratio``: a's over b's; None without timings.
    """
    latency = _latencies(run)
    found = []
    for row in rates:
        if row["rate"] is None:
            continue
        steps = [int(name.rpartition("@")[2]) for name in split(row["comparison"])]
        a, b = (latency.get(name) for name in split(row["comparison"]))
        found.append(
            {
                "comparison": row["comparison"],
                "steps_a": steps[0],
                "steps_b": steps[1],
                "equal_steps": steps[0] == steps[1],
                "latency_a": a,
                "latency_b": b,
                "latency_ratio": a / b if a and b else None,
                "rate": {name: row["rate"][name] for name in ("value", "low", "high", "n")},
            }
        )
    return sorted(found, key=lambda row: (not row["equal_steps"], row["steps_a"], row["comparison"]))


def _latencies(run: RunStore | None) -> dict[str, float]:
    if run is None:
        return {}
    times: dict[str, list[float]] = defaultdict(list)
    for row in run.timings():
        if row.stage == "total" and row.batch_size == 1:
            times[f"{row.model}@{row.steps}"].append(row.seconds)
    return {name: median(seconds) for name, seconds in times.items()}
