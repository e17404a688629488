"""The miniature's own recipe, made tiny: every stage runs, is recorded, and is not run again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hypersd_bench.errors import InputError
from hypersd_bench.pocket import build as builder
from hypersd_bench.pocket.build import SHIPPED, STAGES, build
from hypersd_bench.pocket.training import Schedule


def test_every_stage_is_built_once_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "run_check", lambda out, device: [])  # judged in test_pocket_check, on real weights
    tiny = {name: replace(getattr(SHIPPED, name), steps=2, batch_size=8, warmup=1) for name in STAGES}
    recipe = replace(SHIPPED, **tiny, pool_size=48)
    build(tmp_path, torch.device("cpu"), recipe)
    card = json.loads((tmp_path / "card.json").read_text())
    assert set(card["stages"]) == set(STAGES)
    assert all(facts["steps"] == 2 for facts in card["stages"].values())
    assert (tmp_path / "base" / "model_index.json").exists()
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(made) >= 7
    build(tmp_path, torch.device("cpu"), recipe)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert not any(str(tmp_path) in path.read_text() for path in tmp_path.glob("base/*/*.json"))
    assert "CC-BY" in (tmp_path / "README.md").read_text()
    with pytest.raises(InputError, match="did you mean 'teacher'"):
        build(tmp_path, torch.device("cpu"), recipe, only=("techer",))


def test_the_rate_rises_then_falls() -> None:
    schedule = Schedule(steps=100, batch_size=1, learning_rate=1.0, warmup=10)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert schedule.rate(55) == pytest.approx(0.51)  # half way down the cosine, between 1 and 0.02
