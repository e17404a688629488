"""`hypersd-bench reproduce` against a stand-in for the hub: one model's weights are there, another's are not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from hypersd_bench.pipelines import HUB_BASES
from metrics.reproduce.preset import FOLDER
from tests import published_hub
from tests.hub import StandInHub, environment
from tests.published_hub import Files, repositories

ROOT = Path(__file__).parents[2]
PROMPTS = "a fox on a blue background\na car left of a tree on a pink background\na pizza on a gray background\n"
FAMILIES = ("lcm", "tcd", "teacher")
ABSENT = "h1t/TCD-SDXL-LoRA"
# Importing takes most of the time of a command: a process imports once, and each command runs in a fork of it.
COMMANDS = """
import json, os, sys
from pathlib import Path
from hypersd_bench import registry
for name in ("brightness", "absent"):
    registry.METRICS[f"toy/{name}"] = f"tests.toy_metric:{name.upper()}"
import metrics.reproduce.preset
metrics.reproduce.preset.FOLDER = Path(sys.argv[1])
from hypersd_bench.cli.main import main
from hypersd_bench.cli.quiet import quiet_libraries
quiet_libraries()
import hypersd_bench.runner.benchmark
from diffusers import StableDiffusionXLPipeline
for line in sys.stdin:
    arguments, out, err = json.loads(line)
    child = os.fork()
    if not child:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os._exit(main(arguments))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
PRESET: dict[str, Any] = {
    "title": "A table of two models",
    "source": {"paper": "A paper", "arxiv": "", "table": "Table 1"},
    "protocol": {"prompts": "three scenes", "prompts_listed": True, "prompts_file": "the authors have them", "count": 3,
                 "resolution": "64 px", "pixels": 64, "sampler": "theirs", "guidance": "none", "unstated": []},
    "spec": {"base": "sdxl", "prompts": "not-here.txt", "models": ["lcm@4", "tcd@4"],
             "metrics": ["toy/brightness", "toy/absent"], "timing": False},
    "columns": {"Light": {"metric": "toy/brightness", "digits": 0}, "Other": {"metric": "toy/absent", "digits": 0},
                "FID": {"metric": None, "digits": 1, "reason": "its convention is unstated"}},
    "rows": [{"model": name, "steps": 4, "values": {"Light": 1000, "Other": 1, "FID": 20}} for name in ("lcm", "tcd")],
}  # fmt: skip


class Ended(NamedTuple):
    """A command's exit code, and what it said."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Program:
    """The program with a hub, a cache and presets of its own."""

    hub: StandInHub
    repositories: dict[str, Files]
    process: subprocess.Popen[str]

    def run(self, folder: Path, *arguments: str) -> Ended:
        """`hypersd-bench reproduce`, with the run directory ``folder``/run."""
        assert self.process.stdin
        assert self.process.stdout
        out, err = folder / "out.txt", folder / "err.txt"
        words = ["reproduce", *arguments, "--out", str(folder / "run")]
        self.process.stdin.write(json.dumps([words, str(out), str(err)]) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        return Ended(code, out.read_text(), err.read_text())


def mlperf_with_a_toy_metric() -> dict[str, Any]:
    """MLPerf's preset with its own sampler, three prompts and a metric that is here."""
    preset: dict[str, Any] = yaml.safe_load((FOLDER / "mlperf-sdxl.yaml").read_text())
    preset["protocol"] |= {"count": 3, "pixels": 64}
    del preset["protocol"]["prompts_sha256"]
    preset["spec"] |= {"metrics": ["toy/brightness"]}
    preset["columns"] = {"Light": {"metric": "toy/brightness", "digits": 0}}
    preset["rows"][0] |= {"values": {"Light": 128}, "windows": {"Light": [0, 255]}}
    return preset


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "presets").mkdir()
    of_another_base = {**PRESET, "spec": {**PRESET["spec"], "base": "sd15"}}
    presets = {"two-models": PRESET, "no-weights": of_another_base, "mlperf": mlperf_with_a_toy_metric()}
    for name, preset in presets.items():
        (folder / "presets" / f"{name}.yaml").write_text(yaml.safe_dump(preset))
    with pytest.MonkeyPatch.context() as patch, StandInHub() as hub:
        entries = tuple(model for model in published_hub.ENTRIES if model.family in FAMILIES and model.base == "sdxl")
        patch.setattr(published_hub, "ENTRIES", entries)
        patch.setattr(published_hub, "HUB_BASES", {"sdxl": HUB_BASES["sdxl"]})
        found = repositories(folder / "tiny")
        for repo, files in found.items():
            if repo != ABSENT:
                hub.add(repo, files)
        process = subprocess.Popen(
            [sys.executable, "-c", COMMANDS, str(folder / "presets")], cwd=ROOT, text=True,
            env=environment(hub, folder / "home"), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdin
        with process, closing(process.stdin):
            yield Program(hub, found, process)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return str(tmp_path / "prompts.txt")


def images(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted((folder / "run").rglob("*.png"))}


def test_what_can_be_had_is_run_and_the_rest_says_why(program: Program, tmp_path: Path, prompts: str) -> None:
    ended = program.run(tmp_path, "two-models", "--prompts", prompts, "--device", "cpu", "--json")
    assert ended.code == 0, ended.err
    assert "up to 6 images on cpu" in ended.err
    shown = json.loads(ended.out)
    verdicts = {(n["model"], n["column"]): (n["verdict"], n["reason"]) for n in shown["numbers"]}
    assert verdicts["lcm", "Light"] == ("outside", "")
    assert verdicts["lcm", "Other"] == ("not measured", "its weights are not here; put them there")
    assert verdicts["lcm", "FID"] == ("not comparable", "its convention is unstated")
    assert verdicts["tcd", "Light"][0] == verdicts["tcd", "Other"][0] == "not measured"
    assert ABSENT in verdicts["tcd", "Light"][1]
    assert list(shown["not_run"]) == ["tcd@4"]
    assert list(shown["not_scored"]) == ["toy/absent"]
    light = next(n for n in shown["numbers"] if (n["model"], n["column"]) == ("lcm", "Light"))
    assert light["ours"]["n"] == 3
    assert 0 < light["ours"]["value"] < 255
    assert light["window"]["low"] < 1000 < light["window"]["high"]
    made = images(tmp_path)
    assert len(made) == 3

    # what is there is shown without a run, in no more than 140 columns
    again = program.run(tmp_path, "two-models", "--only-show")
    assert again.code == 0, again.err
    assert max(map(len, again.out.splitlines())) <= 140
    assert "1 outside" in again.out
    assert images(tmp_path) == made

    # with the weights there, the run goes on
    program.hub.add(ABSENT, program.repositories[ABSENT])
    ended = program.run(tmp_path, "two-models", "--prompts", prompts, "--device", "cpu")
    assert ended.code == 0, ended.err
    assert "2 outside" in ended.out
    assert "not run" not in ended.out
    now = images(tmp_path)
    assert len(now) == 6
    assert {path: time for path, time in now.items() if path in made} == made


def test_where_nothing_can_be_had_the_table_is_shown(program: Program, tmp_path: Path, prompts: str) -> None:
    ended = program.run(tmp_path, "no-weights", "--prompts", prompts, "--device", "cpu")
    assert ended.code == 2
    assert "4 not measured" in ended.out
    *_, last = ended.err.splitlines()
    assert last.startswith("error: nothing could be measured: ")
    assert HUB_BASES["sd15"] in last
    assert not (tmp_path / "run").exists()


def test_without_the_prompts_it_says_where_they_are(program: Program, tmp_path: Path) -> None:
    ended = program.run(tmp_path, "two-models", "--device", "cpu")
    assert ended.code == 2
    assert "A table of two models" in ended.out
    assert "not-here.txt" in ended.err.splitlines()[-1]
    assert "the authors have them" in ended.err.splitlines()[-1]


def test_wrong_input_is_no_missing_weight(program: Program, tmp_path: Path, prompts: str) -> None:
    ended = program.run(tmp_path, "two-models", "--prompts", prompts, "--reference", str(tmp_path / "none"))
    assert ended.code == 2
    assert ended.out == ""
    assert str(tmp_path / "none") in ended.err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    ended = program.run(tmp_path, "two-models", "--prompts", prompts, "--device", "cpu")
    assert ended.code == 2
    assert "choose another --out" in ended.err


def test_mlperfs_sampler_is_run_as_it_says(program: Program, tmp_path: Path, prompts: str) -> None:
    ended = program.run(tmp_path, "mlperf", "--prompts", prompts, "--device", "cpu", "--json")
    assert ended.code == 0, ended.err
    (number,) = json.loads(ended.out)["numbers"]
    assert (number["verdict"], number["ours"]["n"]) == ("inside", 3)
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    sampler = manifest["configurations"]["teacher@20"]["sampler"]
    assert (sampler["scheduler"], sampler["guidance_scale"]) == ("EulerDiscreteScheduler", 8.0)
    assert sampler["timesteps"] == {"20": list(range(951, 0, -50))}
    assert manifest["models"][0]["breaches"]
