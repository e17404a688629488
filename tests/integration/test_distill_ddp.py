"""Two processes train what one does: the same losses and weights, one writer, and a stop that both agree on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill import loop
from distill.loop import Trainer, train
from hypersd_bench.errors import InputError
from tests.tiny_base import make_tiny_base
from tests.tiny_runs import tiny_preset, tiny_settings

ROOT = Path(__file__).parents[2]
BATCH = 4


def two_processes(base: Path, out: Path, interrupted_at: int = 0) -> list[subprocess.CompletedProcess[str]]:
    """Train in two processes joined by gloo; what each returned."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "tests.tiny_runs",
        "hyper-sd",
        str(base),
        str(out),
        str(BATCH),
        str(interrupted_at),
    ]
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
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["images_seen"] for row in two] == [row["images_seen"] for row in one]
    timed = {"images_per_s", "seconds"}
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - timed:
            wanted = pytest.approx(mine[name], rel=1e-4, abs=1e-7) if isinstance(mine[name], float) else mine[name]
            assert theirs[name] == wanted, (mine["stage"], mine["step"], name)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.safetensors"))
    assert files == sorted(path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*.safetensors"))
    for file in files:
        a, b = load_file(tmp_path / "one" / file), load_file(tmp_path / "two" / file)
        for name in a:
            torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-5)
    assert json.loads((tmp_path / "two" / "distill.json").read_text())["state"] == "done"


def test_a_batch_that_processes_cant_share_is_refused() -> None:
    trainer: Any = object.__new__(Trainer)
    trainer.preset = tiny_preset("lcm", batch_size=4, accumulate=2)
    for processes in (1, 2):
        trainer.accelerator = SimpleNamespace(num_processes=processes)
        trainer._check_batch()
    trainer.accelerator = SimpleNamespace(num_processes=3)
    with pytest.raises(InputError, match="a number of processes that divides 2"):
        trainer._check_batch()
