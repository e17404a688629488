"""This project's own cache folder, beside those of the libraries."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "HYPERSD_BENCH_CACHE"


def own_cache() -> Path:
    """HYPERSD_BENCH_CACHE, or a folder among the user's caches."""
    import pooch

    return Path(os.environ.get(CACHE_VARIABLE) or pooch.os_cache("hypersd-bench")).expanduser()
