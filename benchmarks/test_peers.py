"""Training images per second and memory: ours against diffusers' public LCM-LoRA script, the same work in one run.

The script is not part of this project: take ``examples/consistency_distillation/train_lcm_distill_lora_sd_wds.py``
from the repository huggingface/diffusers, ``pip install webdataset``, and run

    HYPERSD_PEER_LCM_SCRIPT=train_lcm_distill_lora_sd_wds.py pytest benchmarks/test_peers.py --benchmark-only -s

Its own ``main`` trains the miniature's LCM LoRA on shards in the LAION layout; so does our loop, with the same base,
shards, batch, resolution, rank, loss, solver grid and precision. Ours runs twice: ``encoding`` images and prompts in
every step as the script does, and ``cached``, as a user would. Each of the three is a process of its own; all are
started and warmed up, then they take turns of a few steps, so that a busy machine slows all alike. One probe, on the
optimizer's step that all three take through accelerate, notes time and memory and waits for the next turn. What comes
before the first step is not counted. Read the ratios, not the rates. ``HYPERSD_PEER_BATCH`` sets another batch than 64.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from hypersd_bench.pocket import WEIGHTS

SCRIPT = "HYPERSD_PEER_LCM_SCRIPT"
BATCH = int(os.environ.get("HYPERSD_PEER_BATCH", "64"))
RANK = 8
GRID = 50  # solver steps of the teacher: the default of both
IMAGES = 128  # in the shards
RESOLUTION = 64
WARM_STEPS, STEPS = 2, 2  # before the first turn; of a turn
ROUNDS = 3
RUNNERS = ("peer", "encoding", "cached")
PRECISIONS = ("fp32", "bf16")
MIB = 2**20


@pytest.fixture(scope="module")
def script() -> Path:
    name = os.environ.get(SCRIPT)
    if not name:
        pytest.skip(
            f"set {SCRIPT} to the file train_lcm_distill_lora_sd_wds.py of huggingface/diffusers "
            "(examples/consistency_distillation); it is not part of this project"
        )
    if importlib.util.find_spec("webdataset") is None:
        pytest.skip("diffusers' script reads its shards with webdataset; pip install webdataset")
    if not (WEIGHTS / "base").is_dir():
        pytest.skip("the miniature is not built")
    return Path(name).resolve(strict=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of scenes: key.jpg, key.txt and key.json side by side."""
    from PIL import Image

    from hypersd_bench.pocket.scenes import SIZE, render, scenes

    folder = tmp_path_factory.mktemp("shards")
    drawn = list(scenes(0, IMAGES))
    for number in range(2):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for scene in drawn[number::2]:
                picture = io.BytesIO()
                Image.fromarray(render(scene).image).save(picture, "JPEG", quality=95)
                facts = {"caption": scene.caption, "original_width": SIZE, "original_height": SIZE}
                content = {"jpg": picture.getvalue(), "txt": scene.caption.encode(), "json": json.dumps(facts).encode()}
                for suffix, data in content.items():
                    member = tarfile.TarInfo(f"{scene.seed:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_lcm_lora_on_the_miniature(
    benchmark: BenchmarkFixture, script: Path, shards: Path, tmp_path: Path, precision: str
) -> None:
    """Train with all three in turn, and compare the medians of the rounds."""
    if precision == "bf16":
        import torch

        from hypersd_bench.pocket.training import fast_bf16

        if not fast_bf16(torch.device("cpu")):
            pytest.skip("this CPU has no bf16 instructions")
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    with ExitStack() as stack:
        runners = {
            name: stack.enter_context(_Runner(name, script, shards, tmp_path / name, precision)) for name in RUNNERS
        }

        def one_round() -> None:
            for name, runner in runners.items():
                found[name].append(runner.turn())

        benchmark.pedantic(one_round, rounds=ROUNDS)
    medians = {
        runner: {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        for runner, rows in found.items()
    }
    trained = {row["trained"] for rows in found.values() for row in rows}
    assert len(trained) == 1, f"not the same LoRA: {trained} trained parameters"
    ratios = {
        runner: {
            "throughput": _ratio(found, "images_per_s", runner),
            "per_cpu_second": _ratio(found, "images_per_cpu_s", runner),
            "memory": _ratio(found, "above_imports_mib", runner),
            "process_memory": _ratio(found, "peak_mib", runner),
        }
        for runner in RUNNERS[1:]
    }
    benchmark.extra_info.update({"medians": medians, "ratios": ratios, "batch": BATCH, "rounds": len(found["peer"])})
    print(_table(medians, ratios, precision))


def _ratio(found: dict[str, list[dict[str, float]]], name: str, runner: str) -> float:
    """The median over rounds of ours divided by the peer's of the same round."""
    return statistics.median(a[name] / b[name] for a, b in zip(found[runner], found["peer"], strict=True))


def _table(medians: dict[str, dict[str, float]], ratios: dict[str, dict[str, float]], precision: str) -> str:
    columns = {
        "images_per_s": "images/s", "images_per_cpu_s": "images per CPU s", "peak_mib": "peak MiB",
        "above_imports_mib": "above imports MiB", "above_models_mib": "above models MiB", "start_s": "start s",
    }  # fmt: skip
    lines = ["", f"| {precision} | {' | '.join(columns.values())} |", "|---" * (1 + len(columns)) + "|"]
    for runner, row in medians.items():
        lines.append(f"| {runner} | {' | '.join(f'{row[name]:.3g}' for name in columns)} |")
    for runner, row in ratios.items():
        lines.append(f"{runner} / peer: " + ", ".join(f"{name} {value:.2f}" for name, value in row.items()))
    return "\n".join(lines)


class _Runner:
    """A process that trains when it is its turn."""

    def __init__(self, name: str, script: Path, shards: Path, out: Path, precision: str) -> None:
        out.mkdir()
        self._name, self._log = name, out / "log.txt"
        asked, self._ask = os.pipe()
        answers, answer = os.pipe()
        self._answers = os.fdopen(answers)
        command = [sys.executable, __file__, name, script, shards, out, precision, asked, answer]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1",
                       "PYTHONPATH": str(Path(__file__).parent.parent)}  # fmt: skip
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                list(map(str, command)), stdout=log, stderr=log, env=environment, pass_fds=(asked, answer)
            )
        os.close(asked)
        os.close(answer)

    def __enter__(self) -> _Runner:
        self._answer()  # warm
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._ask)  # at which the child stops
        self._process.wait()
        self._answers.close()

    def turn(self) -> dict[str, float]:
        """Let it take its steps; returns what its probe noted."""
        os.write(self._ask, b".")
        return self._answer()

    def _answer(self) -> dict[str, float]:
        line = self._answers.readline()
        assert line, f"{self._name} failed:\n{self._log.read_text()[-4000:]}"
        row: dict[str, float] = json.loads(line)
        return row


# what follows runs in the child


class Enough(BaseException):
    """Raised out of a step when no turn follows."""


class Probe:
    """Time, CPU time and memory of a process that trains through accelerate."""

    def __init__(self, asked: int, answer: int) -> None:
        from accelerate import Accelerator
        from accelerate.optimizer import AcceleratedOptimizer

        self._asked, self._answer = asked, answer
        self._began, self._imported, self._loaded, self._steps = time.perf_counter(), resident_bytes(), 0, 0
        self._start_s, self._turn = 0.0, (0.0, 0.0)
        init_trackers, step = Accelerator.init_trackers, AcceleratedOptimizer.step

        def before_training(accelerator: Any, *args: Any, **options: Any) -> Any:
            self._start_s = time.perf_counter() - self._began
            self._loaded = resident_bytes()
            forget_peak()
            return init_trackers(accelerator, *args, **options)

        def after_step(optimizer: Any, *args: Any, **options: Any) -> Any:
            result = step(optimizer, *args, **options)
            self._steps += 1
            if self._steps >= WARM_STEPS and (self._steps - WARM_STEPS) % STEPS == 0:
                self._end_turn(optimizer)
            return result

        Accelerator.init_trackers, AcceleratedOptimizer.step = before_training, after_step

    def _end_turn(self, optimizer: Any) -> None:
        """Answer with the turn's figures, and wait until the next one."""
        if self._steps > WARM_STEPS:
            wall, cpu = time.perf_counter() - self._turn[0], cpu_seconds() - self._turn[1]
        else:
            wall = cpu = float("inf")
        peak = peak_bytes()
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        row = {
            "images_per_s": BATCH * STEPS / wall,
            "images_per_cpu_s": BATCH * STEPS / cpu,
            "peak_mib": peak / MIB,
            "above_imports_mib": (peak - self._imported) / MIB,
            "above_models_mib": (peak - self._loaded) / MIB,
            "start_s": self._start_s,
            "trained": sum(p.numel() for p in parameters),
        }
        line = json.dumps(row)
        print(line, flush=True)  # also into its log
        os.write(self._answer, line.encode() + b"\n")
        if not os.read(self._asked, 1):
            raise Enough
        self._turn = time.perf_counter(), cpu_seconds()


def cpu_seconds() -> float:
    """What this process has used, in user code and in the kernel, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def resident_bytes() -> int:
    """Memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """The most that this process has held since ``forget_peak``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def forget_peak() -> None:
    """Count the peak from now on; encoding a cache once is not training."""
    Path("/proc/self/clear_refs").write_text("5")


def train_peer(script: Path, shards: Path, out: Path, precision: str, pipes: tuple[int, int]) -> None:
    """Run the script's own main on the same work."""
    spec = importlib.util.spec_from_file_location("peer", script)
    assert spec is not None
    assert spec.loader is not None
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    _fit(peer, precision)
    options = {
        "pretrained_teacher_model": WEIGHTS / "base", "output_dir": out, "seed": 0,
        "train_shards_path_or_url": shards / "{00000..00001}.tar", "max_train_samples": 1000 * BATCH,
        "dataloader_num_workers": 1, "resolution": RESOLUTION, "train_batch_size": BATCH, "max_train_steps": 10**6,
        "num_ddim_timesteps": GRID, "lora_rank": RANK, "lora_alpha": RANK, "loss_type": "huber",
        "adam_weight_decay": 0, "mixed_precision": {"fp32": "no"}.get(precision, precision),
        "checkpointing_steps": 10**6, "validation_steps": 10**6,
    }  # fmt: skip
    sys.argv = [str(script), *(f"--{name}={value}" for name, value in options.items())]
    Probe(*pipes)
    peer.main(peer.parse_args())


def _fit(peer: Any, precision: str) -> None:
    """Three changes of the loaded script, in memory, without which it can't do the same work here.

    It pads the empty prompt to 77 tokens where the miniature's text encoder takes 16; it does not know the end-of-shard
    marks of today's webdataset; and on a CPU its autocast for teacher and target is bf16 whatever was asked for, so
    that what it calls no mixed precision is not float32.
    """
    import torch
    from transformers import PreTrainedTokenizerBase

    call = PreTrainedTokenizerBase.__call__

    def within_limit(tokenizer: Any, *args: Any, **options: Any) -> Any:
        if "max_length" in options:
            options["max_length"] = min(options["max_length"], tokenizer.model_max_length)
        return call(tokenizer, *args, **options)

    PreTrainedTokenizerBase.__call__ = within_limit
    expand = peer.tar_file_expander
    peer.tar_file_expander = lambda *args, **options: (file for file in expand(*args, **options) if "fname" in file)
    if precision == "fp32":
        torch.set_autocast_dtype("cpu", torch.float32)  # with which autocast on a CPU does nothing


def train_ours(shards: Path, out: Path, precision: str, pipes: tuple[int, int], cached: bool) -> None:
    """Run our loop on the same work."""
    import torch

    import distill.loop
    from distill.presets import find_preset
    from distill.settings import Settings
    from distill.sources.pictures import DataSettings

    def wanted(device: torch.device) -> bool:
        return precision == "bf16"

    distill.loop.fast_bf16 = wanted  # type: ignore[attr-defined]  # what decides the loop's precision
    preset = find_preset("pocket")
    preset = replace(
        preset, images=BATCH * 1000, batch_size=BATCH, rank=RANK, resolution=RESOLUTION, checkpoint_every_s=1e9,
        sample_every_s=0.0, scoreboard=(), lcm=replace(preset.lcm, grid=GRID),
    )  # fmt: skip
    data = DataSettings(
        source=str(shards / "{00000..00001}.tar"), square=True, cache_latents=cached, cache_prompts=cached
    )
    Probe(*pipes)
    distill.loop.train(Settings("lcm", "pocket", preset, data=data), out / "run")


def main() -> None:
    """Be the child: RUNNER SCRIPT SHARDS OUT PRECISION and the ends of two pipes."""
    runner, precision = sys.argv[1], sys.argv[5]
    script, shards, out = map(Path, sys.argv[2:5])
    pipes = int(sys.argv[6]), int(sys.argv[7])
    try:
        if runner == "peer":
            train_peer(script, shards, out, precision, pipes)
        else:
            train_ours(shards, out, precision, pipes, cached=runner == "cached")
    except Enough:
        pass


if __name__ == "__main__":
    main()
