"""Replicates of set metrics, computed once on a machine: minutes for each configuration at SDXL's size.

They are found by the content of what they are of (statistic, features, reference, prompts), so nothing can be stale.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hypersd_bench.cache import own_cache
from hypersd_bench.errors import InputError
from hypersd_bench.store import write_json
from metrics.stats import Replicates, jackknife, jackknife_subsets

_KNOWN: dict[str, Replicates] = {}  # of this process
SHOWN_AFTER = 2.0  # seconds that a computation may take without a bar


def replicates_of(
    digest: str, statistic: Callable[[], Callable[[NDArray[np.intp] | None], float]], clusters: list[str]
) -> Replicates:
    """The replicates of this content; ``statistic`` makes the function of indices, where they must be computed."""
    if digest not in _KNOWN:
        _KNOWN[digest] = _read(digest) or _computed(digest, statistic(), clusters)
    return _KNOWN[digest]


def _computed(digest: str, statistic: Callable[[NDArray[np.intp] | None], float], clusters: list[str]) -> Replicates:
    total = len(jackknife_subsets(clusters)) + 1
    with tqdm(total=total, desc="intervals of sets", delay=SHOWN_AFTER, leave=False) as bar:

        def counted(indices: NDArray[np.intp]) -> float:
            value = statistic(indices)
            bar.update()
            return value

        found = jackknife(counted, clusters)
    with suppress(InputError):  # a full or read-only cache costs time, no more
        write_json(_file(digest), {"value": found.value, "left_out": found.left_out.tolist(),
                                   "n": found.n, "num_clusters": found.num_clusters})  # fmt: skip
    return found


def _read(digest: str) -> Replicates | None:
    try:
        saved = json.loads(_file(digest).read_text(encoding="utf-8"))
        left_out = np.array(saved["left_out"], np.float64)
        return Replicates(float(saved["value"]), left_out, int(saved["n"]), int(saved["num_clusters"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _file(digest: str) -> Path:
    return own_cache() / "replicates" / digest[:2] / f"{digest}.json"
