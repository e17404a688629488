"""What every test runs under: offline, seeded, without a screen."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings

_CACHE = tempfile.TemporaryDirectory(prefix="hypersd-bench-tests-")  # the user's own is not for tests to fill
# before any library of ours is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads are slower, and xdist has the other cores
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    GRADIO_ANALYTICS_ENABLED="False",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    NO_COLOR="1",
    TQDM_MININTERVAL="5",
    HYPERSD_BENCH_CACHE=_CACHE.name,
)
settings.register_profile("house", deadline=None)  # a busy machine is no failure
settings.load_profile("house")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same global seeds, of the libraries it has imported."""
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out nightly tests unless they are asked for, and GPU tests where there is none."""
    asked = config.getoption("markexpr")
    for item in items:
        if item.get_closest_marker("nightly") and "nightly" not in asked:
            item.add_marker(pytest.mark.skip(reason="nightly; run with -m nightly"))
        if item.get_closest_marker("gpu") and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture
def toy_metrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Register the metrics of ``tests.toy_metric``."""
    from hypersd_bench import registry

    for name in ("brightness", "spread", "darker", "colour", "redness", "absent"):
        monkeypatch.setitem(registry.METRICS, f"toy/{name}", f"tests.toy_metric:{name.upper()}")
    registry.rows.cache_clear()
    yield
    registry.rows.cache_clear()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server; skips where PostgreSQL is not installed."""
    from tests.postgres import postgres_server, server_programs

    if server_programs() is None:
        pytest.skip("no PostgreSQL server found; install it with: apt-get install postgresql")
    with postgres_server() as url:
        yield url
