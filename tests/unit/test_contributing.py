"""CONTRIBUTING.md is true: its metric, taken from the page as it stands, works as the page says."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import hypersd_bench
from hypersd_bench import registry
from hypersd_bench.cli.main import main
from hypersd_bench.contracts import ImageMetric, MetricContext
from hypersd_bench.errors import HypersdBenchError

ROOT = Path(hypersd_bench.__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()


def block(language: str) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(found) == 1, f"CONTRIBUTING.md has {len(found)} {language} blocks; this test follows the only one"
    return str(found[0])


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's package, installed as pip would: the module, and its entry points in a dist-info folder."""
    (tmp_path / "brightness.py").write_text(block("python"))
    info = tmp_path / "brightness-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brightness\nVersion: 1.0\n")
    groups = tomllib.loads(block("toml"))["project"]["entry-points"]
    lines = [f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in rows.items()) for group, rows in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.rows.cache_clear()
    yield info
    registry.rows.cache_clear()
    sys.modules.pop("brightness", None)


def test_the_pages_metric_works(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factory = registry.resolve("metric", "brightness/mean")
    assert factory.info.id == "brightness/mean"
    metric = factory(MetricContext())
    assert isinstance(metric, ImageMetric)
    images = torch.stack([torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (0, 51, 255)])
    np.testing.assert_allclose(metric.score(images, ["a fox"] * 3), [0, 0.2, 1])

    assert main(["list", "metrics", "--json"]) == 0
    assert "brightness/mean" in [item["name"] for item in json.loads(capsys.readouterr().out)]


def test_a_taken_name_is_refused(installed: Path) -> None:
    (installed / "entry_points.txt").write_text("[hypersd_bench.metric]\nfid/lite0 = brightness:Brightness\n")
    registry.rows.cache_clear()
    with pytest.raises(HypersdBenchError, match="brightness adds a metric named 'fid/lite0', but that name is taken"):
        registry.rows("metric")


def test_the_page_names_files_that_exist() -> None:
    named = re.findall(r"`((?:hypersd_bench|distill|metrics|reports|user_study)/[\w/]*(?:\.py)?)`", PAGE)
    assert len(named) >= 5
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_names_verbs_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    named = re.findall(r"^hypersd-bench (\w+)", readme, re.MULTILINE)
    assert len(named) >= 5
    assert set(named) <= set(registry.rows("verb"))
