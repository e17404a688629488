"""`hypersd-bench run` with published checkpoints, against a stand-in for the hub: what is made, kept and refused."""

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

from hypersd_bench.provenance import sha256
from tests.hub import StandInHub, environment
from tests.published_hub import Files, repositories

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:1"  # nobody listens there
PROMPTS = "a fox on a blue background\na car left of a tree on a pink background\na pizza on a gray background\n"
TIMING = {"repeats": 1, "warmup": 0, "rounds": 1, "throughput": False}
# Importing takes most of the time of a command: a process imports once, and each command runs in a fork of it.
COMMANDS = """
import json, os, sys
from hypersd_bench.cli.main import main
from hypersd_bench.cli.quiet import quiet_libraries
quiet_libraries()
import hypersd_bench.runner.benchmark
from diffusers import StableDiffusionXLPipeline
for line in sys.stdin:
    arguments, output = json.loads(line)
    child = os.fork()
    if not child:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os._exit(main(arguments))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Ended(NamedTuple):
    """A command's exit code, and what it said."""

    code: int
    said: str

    def refuses(self, *words: str) -> bool:
        """Whether it ended as bad input does, with one line that has these words, and nothing after it."""
        *before, last = self.said.splitlines()
        assert self.code == 2, self.said
        assert not [line for line in before if line.startswith(("error", "Traceback", "  File"))], self.said
        assert [word for word in words if word not in last] == [], last
        return last.startswith("error: ")


@dataclass(frozen=True)
class Program:
    """The program with a hub and a cache of its own."""

    hub: StandInHub
    home: Path
    repositories: dict[str, Files]
    process: subprocess.Popen[str]

    def run(self, folder: Path, models: list[Any], **settings: Any) -> Ended:
        """`hypersd-bench run`, with the run directory ``folder``/run."""
        spec, output = write_spec(folder, models, **settings), folder / "output.txt"
        assert self.process.stdin
        assert self.process.stdout
        arguments = ["run", str(spec), "--out", str(folder / "run"), "--device", "cpu"]
        self.process.stdin.write(json.dumps([arguments, str(output)]) + "\n")
        self.process.stdin.flush()
        code = self.process.stdout.readline()
        return Ended(int(code), output.read_text())

    def blob(self, repo: str, file: str) -> Path:
        """Where the cache keeps a file's content."""
        (found,) = (self.home / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots").glob(f"*/{file}")
        return found.resolve()


def write_spec(folder: Path, models: list[Any], **settings: Any) -> Path:
    (folder / "prompts.txt").write_text(PROMPTS)
    spec = {"base": "sdxl", "models": models, "prompts": "prompts.txt", "timing": None, **settings}
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    return folder / "spec.yaml"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    folder = tmp_path_factory.mktemp("published")
    found = repositories(folder / "tiny")
    with StandInHub() as hub:
        for repo, files in found.items():
            hub.add(repo, files)
        process = subprocess.Popen(
            [sys.executable, "-c", COMMANDS], cwd=ROOT, env=environment(hub, folder / "home"), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdin
        assert process.stdout
        with process, closing(process.stdin):
            yield Program(hub, folder / "home", found, process)


def command(spec: Path, env: dict[str, str]) -> Ended:
    """`hypersd-bench run` in a process of its own."""
    arguments = ["-m", "hypersd_bench", "run", str(spec), "--out", str(spec.parent / "run"), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, text=True, timeout=300, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout)


def images(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted((folder / "run").rglob("*.png"))}


def test_a_run_of_published_models_and_the_same_again_offline(program: Program, tmp_path: Path) -> None:
    models = ["hyper-sd@1,4", "lightning@4", "lcm@4"]
    ended = program.run(tmp_path, models, timing=TIMING)
    assert ended.code == 0, ended.said
    assert "12 images" in ended.said
    made = images(tmp_path)
    assert len({content for _, content in made.values()}) == len(made) == 12

    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    used = {
        ("hyper-sd", "1"): ("ByteDance/Hyper-SD", "Hyper-SDXL-1step-Unet.safetensors"),
        ("hyper-sd", "4"): ("ByteDance/Hyper-SD", "Hyper-SDXL-4steps-lora.safetensors"),
        ("lightning", "4"): ("ByteDance/SDXL-Lightning", "sdxl_lightning_4step_unet.safetensors"),
        ("lcm", "4"): ("latent-consistency/lcm-lora-sdxl", "pytorch_lora_weights.safetensors"),
    }
    repos = {"stabilityai/stable-diffusion-xl-base-1.0", *(repo for repo, _ in used.values())}
    pins = {f"{repo}@main": program.hub.add(repo, program.repositories[repo]) for repo in repos}
    assert manifest["pins"] == pins
    checkpoints = {
        (model["name"], steps): checkpoint
        for model in manifest["models"]
        for steps, checkpoint in model["checkpoints"].items()
    }
    assert checkpoints.keys() == used.keys()
    for key, (repo, file) in used.items():
        blob = program.blob(repo, file)
        assert blob.read_bytes() == program.repositories[repo][file]
        found = {name: checkpoints[key][name] for name in ("repo", "file", "sha256", "commit")}
        assert found == {"repo": repo, "file": file, "sha256": sha256(blob), "commit": pins[f"{repo}@main"]}

    asked = len(program.hub.requests)
    offline = environment(program.hub, program.home, HF_HUB_OFFLINE="1")
    again = command(tmp_path / "spec.yaml", offline)
    assert again.code == 0, again.said
    assert images(tmp_path) == made
    assert len(program.hub.requests) == asked


def test_nothing_is_asked_for_that_nobody_loads(program: Program, tmp_path: Path) -> None:
    assert program.run(tmp_path, ["teacher@1"]).code == 0
    asked = {request.path for request in program.hub.requests if "/resolve/" in request.path}
    assert asked
    assert not [path for path in asked if "fp16" in path or "non_ema" in path or "one_file" in path]
    assert not [path for path in asked if "safety_checker" in path or "vae_1_0" in path]


def test_without_a_hub_and_a_cache_the_remedies_are_named(program: Program, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, ["lcm@4"])
    ended = command(spec, environment(program.hub, tmp_path / "home", HF_ENDPOINT=NOWHERE))
    assert ended.refuses("stabilityai/stable-diffusion-xl-base-1.0", "127.0.0.1:1", "HF_ENDPOINT", "HF_HUB_OFFLINE=1")
    assert not (tmp_path / "run").exists()


def test_a_gated_repository_without_a_token(program: Program, tmp_path: Path) -> None:
    repo = "h1t/TCD-SDXL-LoRA"
    program.hub.add(repo, program.repositories[repo], gated_token="hf_known")
    assert program.run(tmp_path, ["tcd@4"]).refuses(f"{repo} is gated", f"licence at {program.hub.url}", "HF_TOKEN")
    assert not (tmp_path / "run").exists()


def test_tampered_weights_are_refused_and_the_run_goes_on_with_the_right_ones(program: Program, tmp_path: Path) -> None:
    repo, file = "ByteDance/Hyper-SD", "Hyper-SDXL-2steps-lora.safetensors"
    assert program.run(tmp_path, ["teacher@1"]).code == 0
    made = images(tmp_path)
    program.hub.tamper(file)
    ended = program.run(tmp_path, ["teacher@1", "hyper-sd@2"])
    blob = program.blob(repo, file)
    announced = blob.name  # the cache names a file by what was announced
    assert sha256(blob) != announced
    assert ended.refuses(file, f"its SHA-256 is {sha256(blob)}", f"announced was {announced}", f"delete {blob} ")
    assert images(tmp_path) == made

    program.hub.heal()
    blob.unlink()
    assert program.run(tmp_path, ["teacher@1", "hyper-sd@2"]).code == 0
    assert {path: made_at for path, made_at in images(tmp_path).items() if path in made} == made
    assert len(images(tmp_path)) == 6


def test_a_truncated_file_is_refused_and_can_be_had_again(program: Program, tmp_path: Path) -> None:
    repo, file = "ByteDance/SDXL-Lightning", "sdxl_lightning_8step_lora.safetensors"
    assert program.run(tmp_path, ["lightning-lora@8"]).code == 0
    blob = program.blob(repo, file)
    blob.write_bytes(blob.read_bytes()[:-100])
    assert program.run(tmp_path, ["lightning-lora@8"]).refuses("not a whole safetensors file", f"delete {blob} ")
    blob.unlink()
    assert program.run(tmp_path, ["lightning-lora@8"]).code == 0


def test_an_unknown_revision(program: Program, tmp_path: Path) -> None:
    ended = program.run(tmp_path, [{"name": "dmd2", "steps": [4], "revision": "v9"}])
    assert ended.refuses("tianweiy/DMD2 has no revision 'v9'", "name a branch, a tag or a whole commit")
    assert not (tmp_path / "run").exists()


def test_a_lora_of_another_base(program: Program, tmp_path: Path) -> None:
    program.hub.add("jasperai/flash-sdxl", program.repositories["jasperai/flash-sd"])
    ended = program.run(tmp_path, ["flash@4"])
    assert ended.refuses("flash-sdxl: ", "pytorch_lora_weights.safetensors does not fit base 'sdxl'")
