"""The preference models from the hub, through huggingface_hub as users have it, from a stand-in hub on this machine.

huggingface_hub reads its environment when imported, so what is downloaded is downloaded in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from hypersd_bench import registry
from hypersd_bench.contracts import MetricContext
from metrics.preference_models import hps, image_reward, pick_score
from tests.hub import Request, StandInHub, environment
from tests.tiny_judges import PROMPTS, Blip, pictures, rewrite, sha256, tiny_config, write_hps, write_pick_score

ROOT = Path(__file__).parents[2]
NAMES = ("image-reward/v1", "pick-score/v1", "hps/v2.1")
CODE = """
import json, sys
from dataclasses import replace
import open_clip
from hypersd_bench import hub, registry
from hypersd_bench.contracts import MetricContext
from hypersd_bench.errors import InputError
from metrics.preference_models import hps, image_reward, pick_score
from tests.tiny_judges import PROMPTS, pictures, tiny_config
hub.PAUSES = (0.05, 0.05, 0.05)
open_clip.factory._MODEL_CONFIGS["ViT-H-14"] = tiny_config(48, quick_gelu=False)
for owner, pinned in json.loads(sys.argv[1]):
    pick_score.SHA256 = pinned["pick-score/v1"]
    for module, name in ((image_reward, "image-reward/v1"), (hps, "hps/v2.1"), (pick_score, "pick-score/v1")):
        repo = owner or module.WEIGHTS.repo.partition("/")[0]
        module.WEIGHTS = replace(module.WEIGHTS, repo=f"{repo}/{module.WEIGHTS.repo.partition('/')[2]}")
        if name != "pick-score/v1":
            module.WEIGHTS = replace(module.WEIGHTS, sha256=pinned[name])
        try:
            metric = registry.resolve("metric", name)(MetricContext())
            print(json.dumps([name, metric.score(pictures(40, 60), PROMPTS).tolist()]))
        except InputError as error:
            print(json.dumps([name, str(error)]))
"""


@dataclass
class Downloaded:
    """What a process scored from the hub, and what it said of the broken copies; ``home`` holds its cache."""

    home: Path
    pinned: dict[str, str]
    scores: dict[str, list[float]]
    errors: dict[str, str]
    asked: list[Request]


def write(folder: Path) -> dict[str, Path]:
    """The stand-ins' files; returns those with the weights."""
    Blip(folder / "blip")
    write_pick_score(folder)
    write_hps(folder)
    paths = ("blip/ImageReward.pt", "model/model.safetensors", "HPS_v2.1_compressed.pt")
    return dict(zip(NAMES, (folder / path for path in paths), strict=True))


def publish(hub: StandInHub, folder: Path, owner: str = "") -> None:
    """Put the stand-ins into the repositories of the real ones, or in those of another owner."""
    words = ("tokenizer.json", "tokenizer_config.json")
    blip, model, tokenizer = folder / "blip", folder / "model", folder / "tokenizer"
    hub.add(f"{owner or 'zai-org'}/ImageReward", {"ImageReward.pt": (blip / "ImageReward.pt").read_bytes()})
    hub.add("google-bert/bert-base-uncased", {name: (blip / name).read_bytes() for name in words})
    held = {name: (model / name).read_bytes() for name in ("config.json", "model.safetensors")}
    hub.add(f"{owner or 'yuvalkirstain'}/PickScore_v1", {**held, "pytorch_model.bin": b"not asked for"})
    hub.add("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", {name: (tokenizer / name).read_bytes() for name in words})
    weights = folder / "HPS_v2.1_compressed.pt"
    there = {weights.name: weights.read_bytes()} if weights.is_file() else {}
    hub.add(f"{owner or 'xswu'}/HPSv2", {**there, "HPS_v2_compressed.pt": b"v2.0"})


def break_(weights: dict[str, Path]) -> None:
    """One key of another name, twice, and one file that is gone."""
    state = torch.load(weights["image-reward/v1"], weights_only=True)
    state["blip.visual_encoder.blocks.0.attn.query.weight"] = state.pop("blip.visual_encoder.blocks.0.attn.qkv.weight")
    torch.save(state, weights["image-reward/v1"])
    rewrite(weights["pick-score/v1"], "visual_projection.weight", "visual_projector.weight")
    weights["hps/v2.1"].unlink()


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Downloaded]:
    folder = tmp_path_factory.mktemp("preference")
    with pytest.MonkeyPatch.context() as patch, StandInHub() as hub:
        patch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-H-14", tiny_config(48, quick_gelu=False))
        weights = write(folder)
        publish(hub, folder)
        pinned = {name: sha256(path) for name, path in weights.items()}
        break_(weights)
        publish(hub, folder, "broken")
        broken = {name: sha256(path) if path.is_file() else "0" for name, path in weights.items()}
        done = subprocess.run(
            [sys.executable, "-c", CODE, json.dumps([("", pinned), ("broken", broken)])],
            cwd=ROOT, env=environment(hub, folder / "home"), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        told = [json.loads(line) for line in done.stdout.splitlines()]
        yield Downloaded(folder / "home", pinned, dict(told[:3]), dict(told[3:]), list(hub.requests))


def test_they_come_from_the_hub_and_are_then_found_offline(
    downloaded: Downloaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [request.path for request in downloaded.asked if "/resolve/" in request.path or "/cdn/" in request.path]
    assert [path for path in asked if path.endswith("ImageReward.pt")]
    assert not [path for path in asked if path.endswith(("HPS_v2_compressed.pt", "pytorch_model.bin"))]
    # this process is offline, as all tests are; what it finds gives the same scores
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(downloaded.home / "hub"))
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-H-14", tiny_config(48, quick_gelu=False))
    monkeypatch.setattr(pick_score, "SHA256", downloaded.pinned["pick-score/v1"])
    for module, name in ((image_reward, "image-reward/v1"), (hps, "hps/v2.1")):
        monkeypatch.setattr(module, "WEIGHTS", replace(module.WEIGHTS, sha256=downloaded.pinned[name]))
    for name in NAMES:
        metric = registry.resolve("metric", name)(MetricContext())
        scores = metric.score(pictures(40, 60), PROMPTS)
        assert np.ptp(scores) > 0.01
        np.testing.assert_allclose(scores, downloaded.scores[name], atol=1e-4)


def test_a_wrong_key_and_a_missing_file_are_one_line(downloaded: Downloaded) -> None:
    said = downloaded.errors
    assert "can't load ImageReward from" in said["image-reward/v1"]
    assert said["image-reward/v1"].endswith("it has no encoder.layers.0.self_attn.qkv.weight; download it again")
    assert "can't load PickScore from" in said["pick-score/v1"]
    assert said["pick-score/v1"].endswith("it has no visual_projection.weight; download it again")
    assert said["hps/v2.1"].startswith("HPSv2.1: ")
    assert "HPS_v2.1_compressed.pt" in said["hps/v2.1"]
    assert "set HYPERSD_HPS_V2_1" in said["hps/v2.1"]
    assert not [line for line in said.values() if "\n" in line]
