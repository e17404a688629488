"""Latent consistency distillation, LCM (2310.04378), as a LoRA (LCM-LoRA 2311.05556) or a full UNet told w.

    t' = max(t - 20, 0) on the grid 19, 39, ..., 999;  x' = DDIM(x_t, eps_tea(x_t, t, c; g), t -> t')
    f(x, t) = c_skip(t) x + c_out(t) x0hat(x, t),  c_skip and c_out in losses.py
    L       = mean(sqrt(d^2 + c^2) - c),  d = f_student(x_t, t) - stopgrad f_ema(x', t'),  c = 1e-3

Guidance is g everywhere here, eps_u + g (eps_c - eps_u); LCM writes eps_c + w (eps_c - eps_u), so w = g - 1, converted
once, where a full UNet is told w through its time embedding. A full UNet is sampled with its g told and no guidance
proper, a LoRA without either: it has no embedding, and learns the mean over the g that it saw.

Departures: g is drawn for every image from the preset's range, so that all methods share a teacher, where LCM-LoRA
fixes w = 7.5 (``guidance``); a LoRA's target is an EMA too, as LCM's, where LCM-LoRA has none (``target``); the EMA is
also what is exported.
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
    """One stage, one LoRA or UNet for 1 to 8 steps."""

    name = "lcm"

    def stages(self, preset: Preset) -> tuple[Stage, ...]:
        """The one stage; a full UNet's has a rate of its own and an embedding of w."""
        chosen, whole = preset.lcm, preset.student == "unet"
        rate = chosen.unet_learning_rate if whole else chosen.learning_rate
        guidance = chosen.guidance or preset.guidance
        return (
            Stage(
                name="consistency",
                images=preset.images,
                learning_rate=rate or preset.learning_rate,
                contract=lcm(STEPS, embedded_guidance=chosen.embedded_guidance if whole else None),
                export=self.name,
                losses=partial(consistency, guidance=guidance, settings=chosen, told_w=whole),
                embeds_guidance=whole,
            ),
        )


def consistency(
    batch: Batch, roles: Roles, rng: torch.Generator, *, guidance: tuple[float, float], settings: LCMSettings,
    told_w: bool = False,
) -> Losses:  # fmt: skip
    """The loss of one batch; told_w: whether the student is told w."""
    schedule, z0 = roles.schedule, batch.latents
    interval = draw_interval(len(z0), 1, schedule.num_train_timesteps, settings.grid, rng)
    t, t_prev = interval.t.to(z0.device), interval.t_prev.to(z0.device)
    g = draw_guidance(batch, guidance, rng)
    w = g - 1 if told_w else None
    x = schedule.add_noise(z0, draw_noise(z0, rng), t)
    with torch.no_grad():
        x_prev = schedule.ddim(x, roles.guided(x, t, batch.cond, batch.uncond, g), t, t_prev)
        eps_target = roles.predict(settings.target, x_prev, t_prev, batch.cond, w=w)
        target = consistency_function(x_prev, schedule.x0(x_prev, eps_target, t_prev), t_prev)
    x0_student = schedule.x0(x, roles.predict("student", x, t, batch.cond, w=w), t)
    return Losses(pseudo_huber(consistency_function(x, x0_student, t), target, settings.huber_c))


def consistency_function(x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """f(x, t) = c_skip x + c_out x0hat."""
    c_skip, c_out = boundary_scalings(t)
    return c_skip.to(x.dtype) * x + c_out.to(x.dtype) * x0
