"""Settings: what decides a run, what a command line can change, and that the command on a card repeats its run."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import pytest

from distill.cli import _settings, distill
from distill.overrides import override
from distill.presets import PRESETS, find_preset
from distill.settings import MANIFEST, Settings, decisive, read_settings
from distill.sources.pictures import DataSettings
from hypersd_bench.errors import InputError
from hypersd_bench.store import write_json

CHANGED = override(
    find_preset("tiny"),
    ["images=256", "student=unet", "hyper_sd.rewards=[]", "hyper_sd.perceptual=null", "hyper_sd.feedback_ratio=0.5"],
)


def parse(command: str) -> Settings:
    """What the program would train, told by a command line."""
    words = shlex.split(command)
    assert words[:2] == ["hypersd-bench", "distill"]
    training = distill.get_command(click.Context(distill), words[2])
    parameters = training.make_context(words[2], words[3:]).params
    settings = _settings(words[2], {"cache": None, **parameters})
    assert isinstance(settings, Settings)
    return settings


@pytest.mark.parametrize(
    "settings",
    [
        Settings("tcd", "pocket", find_preset("pocket"), seed=3),
        Settings("hyper-sd", "pocket", CHANGED),
        Settings("lcm", "sdxl", PRESETS["sdxl"], data=DataSettings(source="shards/{000..999}.tar", crop="random")),
    ],
    ids=["preset", "changed", "data"],
)
def test_the_command_on_the_card_repeats_the_run(settings: Settings) -> None:
    assert parse(settings.command) == settings


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("rnak=3", "did you mean 'rank'"),
        ("hyper_sd.feedback_rato=1", "did you mean 'hyper_sd.feedback_ratio'"),
        ("rank=abc", "rank: input should be a valid integer"),
        ("student=both", "student: input should be 'lora' or 'unet'"),
        ("images=100", "whole number of batches"),
        ("rank", "write --set NAME=VALUE"),
        ("rank=[", "not YAML"),
        ("rank.of=3", "unknown setting 'rank.of'"),
    ],
)
def test_an_assignment_that_cannot_be_is_one_line(assignment: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        override(find_preset("pocket"), [assignment])
    assert "\n" not in str(caught.value)


def test_assignments_keep_everything_else_and_read_numbers_as_people_write_them() -> None:
    changed = override(find_preset("sdxl"), ["learning_rate=1e-5", "hyper_sd.segments=[4, 1]"])
    assert changed.learning_rate == 1e-5
    assert changed.hyper_sd.segments == (4, 1)
    back = override(changed, ["learning_rate=1e-6", "hyper_sd.segments=[8, 4, 2, 1]"])
    assert back == find_preset("sdxl")


def test_what_only_watches_a_run_does_not_decide_it() -> None:
    preset = find_preset("pocket")
    watched = replace(preset, sample_every_s=1.0, checkpoint_every_s=9.0, scoreboard=(), trackers=("wandb",))
    stored, other = ({"method": "tcd", "preset": asdict(p)} for p in (preset, watched))
    assert decisive(stored) == decisive(other)
    assert decisive(stored) != decisive({"method": "tcd", "preset": asdict(replace(preset, rank=4))})


def write_manifest(folder: Path, settings: dict[str, Any]) -> None:
    write_json(folder / MANIFEST, {"settings": json.loads(json.dumps(settings)), "state": "running"})


def test_a_folder_gives_its_settings_back(tmp_path: Path) -> None:
    settings = Settings("hyper-sd", "pocket", CHANGED, seed=2, data=DataSettings(source="prompts.txt"))
    write_manifest(tmp_path, {**asdict(settings), "base_unet_sha256": "0"})
    assert read_settings(tmp_path, "hyper-sd") == settings


def test_what_cannot_be_gone_on_with_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no distillation there"):
        read_settings(tmp_path, "tcd")
    stored = asdict(Settings("hyper-sd", "pocket", CHANGED))
    write_manifest(tmp_path, stored)
    with pytest.raises(InputError, match="say: distill hyper-sd --resume"):
        read_settings(tmp_path, "tcd")
    write_manifest(tmp_path, {**stored, "preset": {**stored["preset"], "rank": "large"}})
    with pytest.raises(InputError, match="not this version's"):
        read_settings(tmp_path, "hyper-sd")
