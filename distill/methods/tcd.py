"""Trajectory consistency distillation, TCD (2402.19159), as a LoRA or a full UNet.

    t' = max(t - 20, 0) on the grid 19, 39, ..., 999;  x' = DDIM(x_t, eps_tea(x_t, t, c; g), t -> t')
    s  ~ U of 0 and the grid's points not above t'
    L  = || DDIM(x_t, eps_student(x_t, t, c), t -> s) - stopgrad DDIM(x', eps_ema(x', t', c), t' -> s) ||^2

The network is not told s (the paper's TCF without it is the best of its table). gamma belongs to sampling alone, where
it is the scheduler's eta. This is Hyper-SD's first idea without its segments: s may lie anywhere below t'.

Departures: g is drawn from the preset's range, so that all methods share a teacher (the paper's w in [2, 14] is
g in [3, 15], the range of the large presets); the student is a LoRA of the preset's rank; and the paper's learning rate
was not found, so the large presets take that of its community code.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from distill.batch import Batch
from distill.losses import mse
from distill.presets import Preset, TCDSettings
from distill.roles import Roles
from distill.segments import draw_interval
from distill.stages import Losses, Stage, draw_guidance, draw_noise
from hypersd_bench.sampling import tcd

STEPS = (1, 2, 4, 8)


class TCD:
    """One stage, one LoRA or UNet for 1 to 8 steps."""

    name = "tcd"

    def stages(self, preset: Preset) -> tuple[Stage, ...]:
        """The one stage."""
        return (
            Stage(
                name="trajectory-consistency",
                images=preset.images,
                learning_rate=preset.tcd.learning_rate or preset.learning_rate,
                contract=tcd(STEPS, eta=preset.tcd.eta),
                export=self.name,
                losses=partial(trajectory_consistency, guidance=preset.guidance, settings=preset.tcd),
            ),
        )


def trajectory_consistency(
    batch: Batch, roles: Roles, rng: torch.Generator, *, guidance: tuple[float, float], settings: TCDSettings
) -> Losses:
    """The loss of one batch."""
    schedule, z0 = roles.schedule, batch.latents
    interval = draw_interval(len(z0), 1, schedule.num_train_timesteps, settings.grid, rng)
    s = draw_end(interval.t_prev, schedule.num_train_timesteps // settings.grid, rng).to(z0.device)
    t, t_prev = interval.t.to(z0.device), interval.t_prev.to(z0.device)
    g = draw_guidance(batch, guidance, rng)
    x = schedule.add_noise(z0, draw_noise(z0, rng), t)
    with torch.no_grad():
        x_prev = schedule.ddim(x, roles.guided(x, t, batch.cond, batch.uncond, g), t, t_prev)
        target = schedule.ddim(x_prev, roles.predict("ema", x_prev, t_prev, batch.cond), t_prev, s)
    student = schedule.ddim(x, roles.predict("student", x, t, batch.cond), t, s)
    return Losses(mse(student, target))


def draw_end(t_prev: Tensor, skip: int, rng: torch.Generator) -> Tensor:
    """s uniform over 0 and the grid's points skip-1, 2 skip-1, ... up to t_prev: (B,) int64.

    0 stands for the clean end, where TCDScheduler's last step arrives.
    """
    choices = (t_prev + 1) // skip + 1  # how many points there are
    index = (torch.rand(len(t_prev), generator=rng, dtype=torch.float64) * choices).long()
    return (index * skip - 1).clamp(min=0)
