"""A report about 40 configurations of 5,000 prompts each, with pictures of 1,024 px: ledger, statistics, page.

To hold on two cores: the whole report in less than a minute.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pytest_benchmark.fixture import BenchmarkFixture

from reports.data import ReportData
from reports.figures import all_figures
from reports.page import write_report
from reports.read import open_report
from tests.synthetic_run import make_run

MODELS = tuple(f"model-{i}" for i in range(10))
NUM_PROMPTS = 5000
LIMIT = 60.0  # seconds


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    pictures = [_picture(folder / f"{seed}.png", seed) for seed in range(10)]  # ext4 gives a file 65,000 names at most
    return make_run(folder / "run", MODELS, (1, 2, 4, 8), NUM_PROMPTS, 1, pictures).folder


def _picture(file: Path, seed: int) -> Path:
    """A picture of smooth patches and a little noise, which costs a decoder what a photograph does."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).resize((1024, 1024), Image.Resampling.BICUBIC)
    noisy = np.clip(np.asarray(smooth) + rng.normal(0, 3, (1024, 1024, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(file)
    return file


@pytest.fixture(scope="module")
def data(run: Path) -> ReportData:
    return open_report([run])[1]


def test_read(benchmark: BenchmarkFixture, run: Path) -> None:
    _, found = benchmark.pedantic(open_report, ([run],), rounds=1)
    assert len(found.cells) == 40 * 3


def test_figures(benchmark: BenchmarkFixture, data: ReportData) -> None:
    drawn = benchmark.pedantic(all_figures, (data,), rounds=1)
    assert sum(map(len, drawn.values())) == 12


def test_whole_report(benchmark: BenchmarkFixture, run: Path, tmp_path: Path) -> None:
    def report() -> Path:
        folders, found = open_report([run])
        return write_report(found, folders, tmp_path / "report")

    page = benchmark.pedantic(report, rounds=1)
    assert benchmark.stats is not None
    assert benchmark.stats.stats.max < LIMIT
    assert page.stat().st_size < 4 * 2**20
    assert len(list((page.parent / "images").rglob("*.webp"))) == 1200
