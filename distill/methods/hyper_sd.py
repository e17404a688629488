"""Hyper-SD's trajectory segmented consistency distillation, TSCD (2404.13686, section 3.1, algorithm 1).

For k = 8, 4, 2, 1 segments, each stage going on from the student of the stage before:

    x_{t_n}  = alpha z0 + sigma eps,  t_n on a solver grid;  t_end ~ U[t_b, t_{n-1}] in t_n's segment (segments.py)
    xhat     = DDIM(x_{t_n}, eps_tea(x_{t_n}, t_n, c; g), t_n -> t_{n-1}),  g ~ U[g_min, g_max]           (eq. 1)
    L        = d( DDIM(x_{t_n}, eps_stu(x_{t_n}, t_n, c),    t_n -> t_end),
                  DDIM(xhat,    eps_ema(xhat, t_{n-1}, c), t_{n-1} -> t_end) ),  target under stop-gradient (eq. 12)

With DDIM as the solver f(x, s -> s) = x holds by itself: no c_skip and c_out, no embedding of t_end or g. d is the
mean squared error. The student of k segments is sampled in k DDIM steps from boundary to boundary.
"""

from __future__ import annotations

from functools import partial

import torch

from distill.losses import mse
from distill.presets import Preset
from distill.roles import Roles
from distill.segments import check_grid, draw_interval
from distill.stages import Batch, Losses, Stage, draw_guidance, draw_noise, split_images
from hypersd_bench.sampling import NUM_TRAIN_TIMESTEPS, ddim_trailing

SEGMENTS = (8, 4, 2, 1)  # 2404.13686, section 3.1
SHARES = (1.0, 1.0, 2.0, 4.0)  # of the images; ours: the longer a segment, the longer consistency travels to its start
GRID = 40  # ours: LCM and TCD use 50, which misses boundaries of 8 and 4 segments


class HyperSD:
    """TSCD over 8, 4, 2 and 1 segments."""

    name = "hyper-sd"

    def stages(self, preset: Preset) -> tuple[Stage, ...]:
        """One stage and one LoRA for each number of segments."""
        check_grid(NUM_TRAIN_TIMESTEPS, GRID, SEGMENTS)
        shares = split_images(preset.images, preset.batch_size, SHARES)
        return tuple(
            Stage(
                name=f"{k}-segments",
                images=images,
                learning_rate=preset.learning_rate,
                contract=ddim_trailing((k,)),
                export=f"{self.name}-{k}steps",
                losses=partial(tscd, k=k, guidance=preset.guidance),
            )
            for k, images in zip(SEGMENTS, shares, strict=True)
        )


def tscd(batch: Batch, roles: Roles, rng: torch.Generator, *, k: int, guidance: tuple[float, float]) -> Losses:
    """The loss of one batch with k segments."""
    schedule, z0 = roles.schedule, batch.z0
    interval = draw_interval(len(z0), k, schedule.num_train_timesteps, GRID, rng)
    t, t_prev, t_end = (value.to(z0.device) for value in interval)
    g = draw_guidance(batch, guidance, rng)
    x = schedule.add_noise(z0, draw_noise(z0, rng), t)
    with torch.no_grad():
        x_hat = schedule.ddim(x, roles.guided(x, t, batch.text, batch.empty, g), t, t_prev)
        target = schedule.ddim(x_hat, roles.predict("ema", x_hat, t_prev, batch.text), t_prev, t_end)
    student = schedule.ddim(x, roles.predict("student", x, t, batch.text), t, t_end)
    return Losses(mse(student, target))
