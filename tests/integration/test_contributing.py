"""CONTRIBUTING.md is true: its metric, method and model, taken from the page as they stand, work as the page says."""

from __future__ import annotations

import json
import re
import subprocess
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
from hypersd_bench.pipelines import HUB_BASES
from hypersd_bench.sampling import ddim_trailing
from hypersd_bench.store import RunStore
from tests.hub import StandInHub, environment
from tests.tiny_base import make_tiny_base
from tests.tiny_lora import make_lora
from tests.tiny_sdxl import make_tiny_sdxl

ROOT = Path(hypersd_bench.__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
PACKAGES = {"metric": "brightness", "method": "guided", "model": "fox"}  # what each guide's file is called


def block(guide: str, language: str) -> str:
    """The only code block of a language under the heading ``## A <guide>``."""
    text = PAGE.partition(f"\n## A {guide}\n")[2].partition("\n## ")[0]
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(found) == 1, f"the guide has {len(found)} {language} blocks; this test follows the only one"
    return str(found[0])


def install(guide: str, folder: Path) -> Path:
    """Put the guide's package where pip would: the module, and its entry points in a dist-info folder."""
    name = PACKAGES[guide]
    assert f"the whole of `{name}.py`" in " ".join(PAGE.split())
    (folder / f"{name}.py").write_text(block(guide, "python"))
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    groups = tomllib.loads(block(guide, "toml"))["project"]["entry-points"]
    lines = [f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in rows.items()) for group, rows in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return info


@pytest.fixture
def installed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The dist-info folder of a guide's package, installed for this process."""
    info = install(request.param, tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.rows.cache_clear()
    yield info
    registry.rows.cache_clear()
    sys.modules.pop(PACKAGES[request.param], None)


def guide(name: str) -> pytest.MarkDecorator:
    """What a test needs of its guide: the package installed."""
    return pytest.mark.parametrize("installed", [name], indirect=True)


@guide("metric")
def test_the_pages_metric_works(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factory = registry.resolve("metric", "brightness/mean")
    assert factory.info.id == "brightness/mean"
    metric = factory(MetricContext())
    assert isinstance(metric, ImageMetric)
    images = torch.stack([torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (0, 51, 255)])
    np.testing.assert_allclose(metric.score(images, ["a fox"] * 3), [0, 0.2, 1])

    assert main(["list", "metrics", "--json"]) == 0
    assert "brightness/mean" in [item["name"] for item in json.loads(capsys.readouterr().out)]


@guide("method")
def test_the_pages_method_trains_and_its_student_is_sampled(
    installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", "methods", "--json"]) == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert listed["guided"]["summary"].startswith("Guidance distillation")

    base, out = make_tiny_base(tmp_path / "base"), tmp_path / "student"
    train = ["distill", "guided", "--base", str(base), "--data", "scenes", "--preset", "tiny", "--out", str(out)]
    assert main([*train, "--images", "64"]) == 0
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert min(row["loss"] for row in rows) > 0
    assert min(row["grad_norm"] for row in rows) > 0
    run = [
        "run",
        "--base",
        str(base),
        "--models",
        str(out / "guided.safetensors"),
        "--steps",
        "8",
        "--num-prompts",
        "2",
    ]
    assert main([*run, "--metrics", "", "--no-timing", "--out", str(tmp_path / "run")]) == 0
    assert len(RunStore.open(tmp_path / "run").images()) == 2


def test_the_pages_model_is_sampled_from_the_hub(tmp_path: Path) -> None:
    install("model", tmp_path)
    base = make_tiny_sdxl(tmp_path / "sdxl")
    files = {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()}
    loras = {}
    for steps in (2, 4):
        name = f"fox-{steps}step.safetensors"
        card = {"method": "hyper-sd", "preset": "sdxl", "trained_on": ["aesthetic/laion-v2"]}
        loras[name] = make_lora(base, tmp_path / name, ddim_trailing((steps,)), card).read_bytes()
    with StandInHub() as hub:
        hub.add(HUB_BASES["sdxl"], files)
        hub.add("somebody/fox", loras)
        env = environment(hub, tmp_path / "home", PYTHONPATH=f"{tmp_path}:{ROOT}", OMP_NUM_THREADS="1")
        words = ["run", "--base", "sdxl", "--models", "fox", "--steps", "2,4", "--prompts", "pocket/held-out"]
        words += ["--num-prompts", "1", "--metrics", "", "--no-timing", "--device", "cpu", "--dtype", "float32"]
        done = subprocess.run(
            [sys.executable, "-m", "hypersd_bench", *words, "--out", str(tmp_path / "run")],
            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = RunStore.open(tmp_path / "run")
    assert run.manifest["models"][0]["trained_on"] == ["aesthetic/laion-v2"]  # which its entry does not say
    rows = run.images()
    assert {(row.model, row.checkpoint, row.steps) for row in rows} == {
        ("fox", "fox-2step-lora", 2), ("fox", "fox-4step-lora", 4),
    }  # fmt: skip


@guide("metric")
def test_a_taken_name_is_refused(installed: Path) -> None:
    (installed / "entry_points.txt").write_text("[hypersd_bench.metric]\nfid/lite0 = brightness:Brightness\n")
    registry.rows.cache_clear()
    with pytest.raises(HypersdBenchError, match="brightness adds a metric named 'fid/lite0', but that name is taken"):
        registry.rows("metric")


def test_the_page_names_files_that_exist() -> None:
    named = re.findall(r"`((?:hypersd_bench|distill|metrics|reports|user_study)/[\w/]*(?:\.py|\.js)?)`", PAGE)
    assert len(named) >= 5
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_names_verbs_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    named = re.findall(r"^hypersd-bench (\w+)", readme, re.MULTILINE)
    assert len(named) >= 5
    assert set(named) <= set(registry.rows("verb"))
