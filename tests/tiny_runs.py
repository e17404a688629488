"""Distillations of a few steps on tiny random bases, with every kind of stage that a method has."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator

from distill import loop
from distill.checkpoint import Position
from distill.loop import Trainer, train
from distill.presets import HyperSDSettings, LightningSettings, Preset, find_preset
from distill.roles import Kind
from distill.settings import Settings
from distill.stages import Stage
from hypersd_bench import registry
from hypersd_bench.pocket import WEIGHTS
from hypersd_bench.pocket.training import fast_bf16

STEPS = 3  # optimizer steps of every stage
BATCH = 2
# TSCD, feedback, TSCD with a discriminator, one step: all that Hyper-SD does, once
HYPER_SD = HyperSDSettings(
    segments=(2, 1), shares=(1.0, 1.0), feedback_shares=(1.0,), one_step_share=1.0, mse_weights=(1.0, 0.5),
    adversarial_weights=(0.0, 0.1), rewards=("aesthetic/pocket",), watched=("clip-score/pocket",), critic_updates=2,
    perceptual="pocket" if (WEIGHTS / "segmenter.safetensors").exists() else None,
)  # fmt: skip
# guided MSE, then one step by MSE, conditionally and unconditionally adversarial
LIGHTNING = LightningSettings(teacher_steps=4, chain=(2, 1), shares=(1.0, 1.0, 1.0))


def tiny_preset(method: str, steps: int = STEPS, batch_size: int = BATCH, **changes: Any) -> Preset:
    """A preset under which every stage of ``method`` has ``steps`` steps."""
    preset = replace(
        find_preset("tiny"), hyper_sd=HYPER_SD, lightning=LIGHTNING, discriminator_backbone="trained",
        batch_size=batch_size, images=batch_size * 1000, checkpoint_every_s=0.0, **changes,
    )  # fmt: skip
    stages: tuple[Stage, ...] = registry.resolve("method", method)().stages(preset)
    return replace(preset, images=batch_size * steps * len(stages))


def tiny_settings(method: str, base: str, **changes: Any) -> Settings:
    """What such a run is."""
    return Settings(method, base, tiny_preset(method, **changes))


def trainer_of(method: str, pipe: Any, kind: Kind = "lora", **changes: Any) -> Trainer:
    """A trainer with its cast, but without a run folder and data: for what happens at the start of a stage."""
    preset = tiny_preset(method, student=kind, **changes)
    trainer = object.__new__(Trainer)
    trainer.settings, trainer.preset, trainer.pipe = Settings(method, "none", preset), preset, pipe
    trainer.stages = registry.resolve("method", method)().stages(preset)
    trainer.device, trainer.main = torch.device("cpu"), True
    precision = "bf16" if fast_bf16(trainer.device) else "no"  # one process can't have accelerators of two
    trainer.accelerator = Accelerator(cpu=True, mixed_precision=precision)
    trainer.roles = trainer._cast()
    trainer.position = Position()
    return trainer


def pipe_of(unet: Any, config: dict[str, Any]) -> Any:
    """As much of a pipeline as a cast needs."""
    return SimpleNamespace(unet=unet, scheduler=SimpleNamespace(config=config))


def run_in_a_process(
    method: str, base: str, out: str, batch_size: str, interrupted_at: str, student: str = "lora"
) -> None:
    """Train with a log row a step; process 1 is sent Ctrl-C after ``interrupted_at`` steps, if that is not 0.

    student: ``lora``, or ``unet``, whose weights are then sharded, in float32.
    """
    loop.LOG_EVERY = 1
    if student == "unet":
        loop.fast_bf16 = lambda device: False  # type: ignore[attr-defined]
    step, done = Trainer._step, [0]

    def counted(self: Trainer, stage: Stage, factor: float) -> None:
        step(self, stage, factor)
        done[0] += 1
        if done[0] == int(interrupted_at) and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGINT)

    Trainer._step = counted  # type: ignore[method-assign]
    try:
        settings = tiny_settings(method, base, batch_size=int(batch_size), student=student, fsdp=student == "unet")
        train(settings, Path(out))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run_in_a_process(*sys.argv[1:])
