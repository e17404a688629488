"""A run's ledger as data frames."""

from __future__ import annotations

from dataclasses import asdict, fields

import pandas as pd

from hypersd_bench.store import RunStore, TimingRow


def tables(store: RunStore) -> dict[str, pd.DataFrame]:
    """``images`` (one row an image, one column a per-image metric), ``set_scores``, ``timings`` (one row a repeat),
    ``latency`` (their percentiles) and ``costs`` (memory, cold start, images per second).
    """
    timings = pd.DataFrame([asdict(row) for row in store.timings()], columns=[f.name for f in fields(TimingRow)])
    images = pd.DataFrame([asdict(row) for row in store.images()])
    for metric in store.scored_metrics():
        scores = store.scores(metric)
        if scores:
            images[metric] = [scores[i].value if i in scores else None for i in images["id"]]
    return {
        "images": images,
        "set_scores": pd.DataFrame([asdict(row) for row in store.set_scores()]),
        "timings": timings,
        "latency": _percentiles(timings),
        "costs": pd.DataFrame([asdict(row) for row in store.costs()]),
    }


def _percentiles(timings: pd.DataFrame) -> pd.DataFrame:
    """Seconds per batch by stage: p50, p90 and p99 over the repeats (linear between them), and how many there are."""
    by = ["model", "steps", "stage", "batch_size", "device"]
    found = timings.groupby(by)["seconds"].agg(
        n="count",
        p50=lambda seconds: seconds.quantile(0.5),
        p90=lambda seconds: seconds.quantile(0.9),
        p99=lambda seconds: seconds.quantile(0.99),
    )
    return found.reset_index()
