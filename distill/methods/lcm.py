"""Latent consistency distillation, LCM (2310.04378) as a LoRA (LCM-LoRA 2311.05556).

    t' = max(t - 20, 0) on the grid 19, 39, ..., 999;  x' = DDIM(x_t, eps_tea(x_t, t, c; g), t -> t')
    f(x, t) = c_skip(t) x + c_out(t) x0hat(x, t),  c_skip and c_out in losses.py
    L       = mean(sqrt(d^2 + c^2) - c),  d = f_student(x_t, t) - stopgrad f_ema(x', t'),  c = 1e-3

Departures, so that all methods share teacher, data and budget: g is drawn from the preset's range for every image, as
diffusers' LoRA script does, without an embedding of it; the target is an EMA, as in LCM's full-UNet recipe.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from distill.batch import Batch
from distill.losses import boundary_scalings, pseudo_huber
from distill.presets import LCMSettings, Preset
from distill.roles import Roles
from distill.segments import draw_interval
from distill.stages import Losses, Stage, draw_guidance, draw_noise
from hypersd_bench.sampling import lcm

STEPS = (1, 2, 4, 8)


class LCM:
    """One stage, one LoRA for 1 to 8 steps."""

    name = "lcm"

    def stages(self, preset: Preset) -> tuple[Stage, ...]:
        """The one stage."""
        return (
            Stage(
                name="consistency",
                images=preset.images,
                learning_rate=preset.learning_rate,
                contract=lcm(STEPS),
                export=self.name,
                losses=partial(consistency, guidance=preset.guidance, settings=preset.lcm),
            ),
        )


def consistency(
    batch: Batch, roles: Roles, rng: torch.Generator, *, guidance: tuple[float, float], settings: LCMSettings
) -> Losses:
    """The loss of one batch."""
    schedule, z0 = roles.schedule, batch.latents
    interval = draw_interval(len(z0), 1, schedule.num_train_timesteps, settings.grid, rng)
    t, t_prev = interval.t.to(z0.device), interval.t_prev.to(z0.device)
    g = draw_guidance(batch, guidance, rng)
    x = schedule.add_noise(z0, draw_noise(z0, rng), t)
    with torch.no_grad():
        x_prev = schedule.ddim(x, roles.guided(x, t, batch.cond, batch.uncond, g), t, t_prev)
        eps_ema = roles.predict("ema", x_prev, t_prev, batch.cond)
        target = consistency_function(x_prev, schedule.x0(x_prev, eps_ema, t_prev), t_prev)
    x0_student = schedule.x0(x, roles.predict("student", x, t, batch.cond), t)
    return Losses(pseudo_huber(consistency_function(x, x0_student, t), target, settings.huber_c))


def consistency_function(x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """f(x, t) = c_skip x + c_out x0hat."""
    c_skip, c_out = boundary_scalings(t)
    return c_skip.to(x.dtype) * x + c_out.to(x.dtype) * x0
