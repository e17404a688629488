"""A run's ledger as data frames."""

from __future__ import annotations

from dataclasses import asdict

import pandas as pd

from hypersd_bench.store import RunStore


def tables(store: RunStore) -> dict[str, pd.DataFrame]:
    """``images`` (one row an image, one column a per-image metric), ``set_scores`` and ``timings``."""
    images = pd.DataFrame([asdict(row) for row in store.images()])
    for metric in store.scored_metrics():
        scores = store.scores(metric)
        if scores:
            images[metric] = [scores[i].value if i in scores else None for i in images["id"]]
    return {
        "images": images,
        "set_scores": pd.DataFrame([asdict(row) for row in store.set_scores()]),
        "timings": pd.DataFrame([asdict(row) for row in store.timings()]),
    }
