"""What a training step costs: every method on the miniature, and what each trick of the loop gives.

Run with: pytest benchmarks/test_training.py --benchmark-only -s

A trick is measured on two runs of the real loop that differ in it alone. They take steps in turn, so that a busy
machine slows both, and the median of the ratios is reported: above 1, the trick pays. Memory is the most bytes that
tensors held during a step, counted operation by operation, plus the UNets' weights; the allocator's doing is not in
it. ``HYPERSD_BENCH_BATCH`` sets another batch than 64. docs/speed.md is the table.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from distill.batch import Condition
from distill.checkpoint import RunFolder
from distill.loop import Trainer
from distill.metering import Meter
from distill.presets import Preset, find_preset
from distill.roles import Roles
from distill.schedule import NoiseSchedule
from distill.settings import Settings
from distill.sources.pictures import DataSettings
from distill.stages import Stage
from hypersd_bench import registry
from hypersd_bench.host import keep_freed_memory
from hypersd_bench.pipelines import load_base
from hypersd_bench.pocket import WEIGHTS
from hypersd_bench.pocket.training import fast_bf16

BATCH = int(os.environ.get("HYPERSD_BENCH_BATCH", "64"))
IMAGES = 2 * BATCH
ROUNDS = 5
MIB = 2**20
built = pytest.mark.skipif(not (WEIGHTS / "base").is_dir(), reason="the miniature is not built")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of scenes: decoding and encoding are part of what is measured."""
    from PIL import Image

    from hypersd_bench.pocket.scenes import render, scenes

    folder = tmp_path_factory.mktemp("pictures")
    with (folder / "metadata.jsonl").open("w") as lines:
        for scene in scenes(0, IMAGES):
            Image.fromarray(render(scene).image).save(folder / f"{scene.seed}.jpg", quality=95)
            lines.write(json.dumps({"file_name": f"{scene.seed}.jpg", "text": scene.caption}) + "\n")
    return folder


class Run:
    """A training run of a method's first stage that takes a step when it is asked to."""

    def __init__(self, out: Path, method: str, data: DataSettings, **changes: Any) -> None:
        preset = replace(_preset(), **changes)
        settings = Settings(method, "pocket", preset, data=data)
        stages: tuple[Stage, ...] = registry.resolve("method", method)().stages(preset)
        self.trainer = Trainer(settings, RunFolder.open(out, settings, {}, fresh=True), stages, "cpu")
        self.trainer._begin(stages[0], None)
        self._stage = stages[0]

    def step(self) -> None:
        """Take an optimizer step, with the data, the opponents and the running mean that belong to it."""
        self.trainer._step(self._stage, 1.0)

    def peak_mib(self) -> float:
        """The most that tensors hold in a step, with the weights of the UNets."""
        networks = {id(unet): unet for unet in map(self.trainer.roles.network, self.trainer.roles._members)}.values()
        weights = [*(p for unet in networks for p in unet.parameters())]
        pipe = self.trainer.pipe
        resident = [*weights, *pipe.vae.parameters(), *pipe.text_encoder.parameters(), *pipe.text_encoder.buffers()]
        meter = Meter()
        meter.reset(resident)
        with meter:
            self.step()
        return float(meter.peak + sum(p.numel() * p.element_size() for p in weights)) / MIB


def _preset() -> Preset:
    return replace(
        find_preset("pocket"), images=1000 * BATCH, batch_size=BATCH, resolution=64, scoreboard=(), sample_every_s=0.0
    )


def _data(pictures: Path, **changes: Any) -> DataSettings:
    chosen: dict[str, Any] = {"source": str(pictures), "square": True, "cache_latents": True, "cache_prompts": True}
    return DataSettings(**{**chosen, **changes})


@built
@pytest.mark.parametrize("method", sorted(registry.METHODS))
def test_images_per_second(benchmark: BenchmarkFixture, pictures: Path, tmp_path: Path, method: str) -> None:
    """An optimizer step of the method's first stage."""
    run = Run(tmp_path / "run", method, _data(pictures))
    benchmark.pedantic(run.step, rounds=3, warmup_rounds=1)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["images_per_s"] = BATCH / benchmark.stats.stats.mean


# what a step is without a trick; each changes a run that has them all


def two_forwards(run: Run) -> None:
    roles = run.trainer.roles

    def guided(x: Tensor, t: Tensor, cond: Condition, uncond: Condition, g: Tensor) -> Tensor:
        eps_u = roles.predict("teacher", x, t, replace(uncond.expand(len(x)), time_ids=cond.time_ids))
        eps_c = roles.predict("teacher", x, t, cond)
        return eps_u + g.reshape(-1, 1, 1, 1) * (eps_c - eps_u)

    roles.guided = guided  # type: ignore[method-assign]


def fused_attention(run: Run) -> None:
    run.trainer.pipe.unet.set_attn_processor(AttnProcessor2_0())


def full_precision(run: Run) -> None:
    run.trainer.accelerator.autocast = nullcontext


def plain_adam(run: Run) -> None:
    for optimizer in run.trainer.optimizers.values():
        for group in optimizer.param_groups:
            group["fused"] = False


def no_thread(run: Run) -> None:
    run.trainer.data = run.trainer.data.data  # type: ignore[assignment]


def second_unet(run: Run) -> None:
    run.trainer.roles._members["teacher"].unet = load_base("pocket").unet


@dataclass(frozen=True)
class Trick:
    """How a run with a trick and one without differ: in preset and data, or by a change of the run without.

    both: a change of both, which the trick is measured under.
    """

    without: Callable[[Run], None] | None = None
    both: Callable[[Run], None] | None = None
    data: dict[str, Any] = field(default_factory=dict)  # of both
    data_without: dict[str, Any] = field(default_factory=dict)
    preset: dict[str, Any] = field(default_factory=dict)  # of the run with it


TRICKS = {
    "latents cached": Trick(data={"cache_prompts": False}, data_without={"cache_latents": False}),
    "embeddings cached": Trick(data_without={"cache_prompts": False}),
    "both caches": Trick(data_without={"cache_latents": False, "cache_prompts": False}),
    "a thread loads ahead": Trick(no_thread, data={"cache_latents": False, "cache_prompts": False}),
    "both halves of guidance in one forward": Trick(two_forwards),
    "plain attention": Trick(fused_attention),
    "plain attention, in float32": Trick(fused_attention, both=full_precision),
    "bf16 autocast": Trick(full_precision),
    "fused AdamW": Trick(plain_adam),
    "teacher is the student's UNet": Trick(second_unet),
    "gradient checkpointing": Trick(preset={"gradient_checkpointing": True}),
}


@built
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("trick", TRICKS)
def test_trick(benchmark: BenchmarkFixture, pictures: Path, tmp_path: Path, trick: str) -> None:
    """LCM's step with a trick and without."""
    chosen = TRICKS[trick]
    data = _data(pictures, **chosen.data)
    if trick == "bf16 autocast" and not fast_bf16(torch.device("cpu")):
        pytest.skip("this CPU has no bf16 instructions, and the loop uses none")
    given = Run(tmp_path / "with", "lcm", data, **chosen.preset)
    lacking = Run(tmp_path / "without", "lcm", replace(data, **chosen.data_without))
    if chosen.without is not None:
        chosen.without(lacking)
    for run in (given, lacking):
        if chosen.both is not None:
            chosen.both(run)
        run.step()
    pairs: list[tuple[tuple[float, float], tuple[float, float]]] = []
    benchmark.pedantic(lambda: pairs.append((_timed(given), _timed(lacking))), rounds=ROUNDS)
    wall, cpu = (statistics.median(b[i] / a[i] for a, b in pairs) for i in (0, 1))
    memory = given.peak_mib(), lacking.peak_mib()
    report = {
        "speed-up": wall, "speed-up in CPU time": cpu, "cpu_ms": 1000 * statistics.median(a[1] for a, _ in pairs),
        "mib": memory[0], "mib_without": memory[1], "batch": BATCH,
    }  # fmt: skip
    benchmark.extra_info.update(report)
    print(f"\n| {trick} | {wall:.2f} | {cpu:.2f} | {memory[0]:.0f} | {memory[1]:.0f} |")


def _timed(run: Run) -> tuple[float, float]:
    """Seconds of a step: of the clock, and of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    run.step()
    return time.perf_counter() - wall, time.process_time() - cpu


@built
@pytest.mark.timeout(1800)
def test_allocator(benchmark: BenchmarkFixture, pictures: Path, tmp_path: Path) -> None:
    """The step with glibc's own settings, and with ``keep_freed_memory``; each in a process of its own, in turn."""

    def measure() -> dict[str, dict[str, float]]:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        command = [sys.executable, __file__, str(pictures), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        rows: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
        return rows

    rows = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info.update(rows)
    print(f"\nallocator: {json.dumps(rows)}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("method", ["hyper-sd", "lcm"])
def test_sdxl_on_cuda(benchmark: BenchmarkFixture, method: str, checkpointing: bool) -> None:
    """Losses and gradients of a step on SDXL's UNet with random weights: 1024 px, one image, bf16."""
    from diffusers import UNet2DConditionModel

    from distill.architectures import KNOWN
    from distill.batch import Batch

    parts, preset = KNOWN["sdxl"], replace(find_preset("sdxl-24gb"), gradient_checkpointing=checkpointing)
    stage: Stage = registry.resolve("method", method)().stages(preset)[0]
    torch.manual_seed(0)
    with torch.device("cuda"):
        unet = UNet2DConditionModel.from_config(dict(parts["unet"])).to(torch.bfloat16).eval()
        cond = Condition(
            torch.randn(1, 77, 2048), torch.randn(1, 1280), torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]])
        )
        batch = Batch(torch.randn(1, 4, 128, 128), cond, cond, ["a fox"], ["random"], (4, 128, 128))
    schedule = NoiseSchedule.from_config(parts["scheduler"], set_alpha_to_one=True, device=torch.device("cuda"))
    roles = Roles(unet.to(memory_format=torch.channels_last), schedule, preset.rank)
    roles.add("previous")
    if checkpointing:
        roles.enable_checkpointing()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = stage.losses(batch, roles, torch.Generator().manual_seed(0)).student
        assert loss is not None
        loss.backward()
        for parameter in roles.parameters("student"):
            parameter.grad = None
        torch.cuda.synchronize()

    torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(step, rounds=5, warmup_rounds=2)
    peak = torch.cuda.max_memory_allocated() / 2**30
    benchmark.extra_info.update({"peak_gib": peak, "device": torch.cuda.get_device_name()})
    if benchmark.stats is not None:
        benchmark.extra_info["images_per_s"] = 1 / benchmark.stats.stats.mean
    if checkpointing:
        assert peak < 22, "the goal for SDXL on a card of 24 GB"


# the allocator's child: two processes that share what is imported, and nothing of the heap's settings


def _take_turns(keep: bool, pictures: Path, out: Path, pipe: Connection) -> None:
    if keep:
        keep_freed_memory()
    run = Run(out, "lcm", _data(pictures))
    for _ in range(2):
        run.step()
    pipe.send(())
    while pipe.recv():
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        run.step()
        wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
        pipe.send((wall, after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime, after.ru_maxrss / 1024))


def main() -> None:
    """Print, per setting of the allocator, medians of a step's wall, user and system seconds and the peak in MiB."""
    pictures, out = Path(sys.argv[1]), Path(sys.argv[2])
    context = multiprocessing.get_context("fork")
    pipes: dict[str, Connection] = {}
    for name in ("default", "kept"):
        pipes[name], other = context.Pipe()
        context.Process(target=_take_turns, args=(name == "kept", pictures, out / name, other), daemon=True).start()
        pipes[name].recv()
    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in pipes}
    for _ in range(ROUNDS):
        for name, pipe in pipes.items():
            pipe.send(True)
            rows[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    names = ("wall_s", "user_s", "system_s", "peak_mib")
    medians = {
        name: dict(zip(names, map(statistics.median, zip(*taken, strict=True)), strict=True))
        for name, taken in rows.items()
    }
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
