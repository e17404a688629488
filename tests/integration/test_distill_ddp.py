"""Two processes train what one does: the same losses and weights, one writer, and a stop that both agree on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from distill import loop
from distill.loop import Trainer, train
from hypersd_bench.errors import InputError
from tests.tiny_base import make_tiny_base
from tests.tiny_cast import SD, tiny_unet
from tests.tiny_runs import pipe_of, tiny_preset, tiny_settings, trainer_of

ROOT = Path(__file__).parents[2]
BATCH = 4


def two_processes(
    base: Path, out: Path, interrupted_at: int = 0, method: str = "hyper-sd", student: str = "lora"
) -> list[subprocess.CompletedProcess[str]]:
    """Train in two processes joined by gloo; what each returned."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "OMP_NUM_THREADS": "1"}  # fmt: skip
    arguments = [method, str(base), str(out), str(BATCH), str(interrupted_at), student]
    command = [sys.executable, "-m", "tests.tiny_runs", *arguments]
    children = [
        subprocess.Popen(
            command, cwd=ROOT, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        ended = [child.communicate(timeout=800) for child in children]
    finally:
        for child in children:
            child.kill()
    return [
        subprocess.CompletedProcess(command, child.returncode, *texts)
        for child, texts in zip(children, ended, strict=True)
    ]


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]


@pytest.mark.timeout(1800)  # five starts of a process; a busy machine is no failure
def test_two_processes_train_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the second stage and resumed, against one process that accumulates the same parts."""
    base = make_tiny_base(tmp_path / "base")
    stopped = two_processes(base, tmp_path / "two", interrupted_at=4)
    assert [child.returncode for child in stopped] == [130, 130], stopped[0].stderr[-2000:] + stopped[1].stderr[-2000:]
    assert rows(tmp_path / "two")[-1]["images_seen"] == 4 * BATCH
    ended = two_processes(base, tmp_path / "two")
    assert [child.returncode for child in ended] == [0, 0], ended[0].stderr[-2000:] + ended[1].stderr[-2000:]
    assert "segments" in ended[0].stderr or "one-step" in ended[0].stderr
    assert "one-step" not in ended[1].stderr  # one speaks

    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    train(tiny_settings("hyper-sd", str(base), batch_size=BATCH, accumulate=2), tmp_path / "one")
    assert_same_rows(tmp_path / "one", tmp_path / "two", rel=1e-4)
    for a, b in exported(tmp_path / "one", tmp_path / "two"):
        for name in a:
            torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-5)


def assert_same_rows(first: Path, second: Path, rel: float) -> None:
    """The same figures within rounding, and a finished manifest."""
    one, two = rows(first), rows(second)
    assert [row["images_seen"] for row in two] == [row["images_seen"] for row in one]
    timed = {"images_per_s", "seconds"}
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - timed:
            wanted = pytest.approx(mine[name], rel=rel, abs=1e-7) if isinstance(mine[name], float) else mine[name]
            assert theirs[name] == wanted, (mine["stage"], mine["step"], name)
    assert json.loads((second / "distill.json").read_text())["state"] == "done"


def exported(first: Path, second: Path) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The weights of both runs' files, which must be the same files."""
    files = sorted(path.relative_to(first) for path in first.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(second) for path in second.rglob("*.safetensors"))
    return [(load_file(first / file), load_file(second / file)) for file in files]


@pytest.fixture
def _own_precision() -> Iterator[None]:
    """Let a test choose its precision: one process can't have accelerators of two."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("_own_precision")
def test_full_weights_in_shards_train_as_whole_ones_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP over two processes, interrupted and resumed, against one process with whole UNets."""
    base = make_tiny_base(tmp_path / "base")
    for interrupted_at, code in ((2, 130), (0, 0)):
        ended = two_processes(base, tmp_path / "two", interrupted_at, "lcm", "unet")
        assert [child.returncode for child in ended] == [code] * 2, ended[0].stderr[-2000:] + ended[1].stderr[-2000:]
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    monkeypatch.setattr(loop, "fast_bf16", lambda device: False)
    train(tiny_settings("lcm", str(base), batch_size=BATCH, accumulate=2, student="unet"), tmp_path / "one")
    # sums are in another order, and Adam's first step is of full size for gradients that are hardly more than rounding
    assert_same_rows(tmp_path / "one", tmp_path / "two", rel=5e-3)
    start = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    [(a, b)] = exported(tmp_path / "one", tmp_path / "two")
    shared = [name for name in start if name in a]
    moved = torch.cat([(a[name].float() - start[name]).flatten() for name in shared]).norm()
    apart = torch.cat([(a[name].float() - b[name].float()).flatten() for name in shared]).norm()
    assert apart < 0.2 * moved


def test_shards_of_a_lora_are_refused() -> None:
    with pytest.raises(InputError, match="fsdp spreads full UNets"):
        trainer_of("lcm", pipe_of(tiny_unet(), SD), fsdp=True)


def test_a_batch_that_processes_cant_share_is_refused() -> None:
    trainer: Any = object.__new__(Trainer)
    trainer.preset = tiny_preset("lcm", batch_size=4, accumulate=2)
    for processes in (1, 2):
        trainer.accelerator = SimpleNamespace(num_processes=processes)
        trainer._check_batch()
    trainer.accelerator = SimpleNamespace(num_processes=3)
    with pytest.raises(InputError, match="a number of processes that divides 2"):
        trainer._check_batch()
