"""SDXL-Lightning's progressive adversarial distillation (2402.13929) as LoRAs.

The teacher takes n small DDIM steps from x_t, the student one step over the same span t -> t - ns:

    0.  64 -> 32   MSE; the teacher is the base with guidance, which later stages inherit (section 3.1)
    then 32 -> 8 -> 4 -> 2 -> 1, the teacher being the student of the step count before, without guidance:
    a.  MSE                warm-up, ours
    b.  conditional        real = teacher's x_{t-ns}, fake = student's; D(x_t, x_{t-ns}, t, t-ns, c)   (section 3.2)
    c.  unconditional      D'(x_{t-ns}, t-ns, c), which removes ghosted double images                  (section 3.4)

    L_D = -log p_real - log(1 - p_fake),  L_G = -log p_fake      (eqs. 4, 5), a new discriminator for every stage

At t = T the student and its teacher start from sigma_T eps, without the alpha_T z0 that real noise never holds, while
abar_T stays as it is (section 3.5, flawed schedules): exactly what Euler's trailing schedule feeds at inference.

Departures: the first stage starts from 64 steps, not 128 (half the teacher's cost, and on a small model DDIM is long
converged); the warm-up, because without it an adversarial loss at these budgets has nothing to hold on to; no merge
into the full UNet; and one step stays in eps form, which a LoRA on an eps base needs, where the paper switches to x0.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from distill.batch import Batch
from distill.discriminator import ADAM_BETAS, opponent, play
from distill.losses import mse
from distill.presets import LightningSettings, Preset
from distill.roles import Roles
from distill.stages import Losses, Stage, draw_noise, split_images
from hypersd_bench.sampling import euler_trailing, trailing


class Span(NamedTuple):
    """A batch at the start of its span: noisy latents x_t, the student's t and s, the teacher's stops (B, n + 1)."""

    x: Tensor
    t: Tensor
    s: Tensor
    stops: Tensor


class Lightning:
    """Progressive distillation over 32, 8, 4, 2 and 1 steps; a LoRA for each of the last four."""

    name = "lightning"

    def stages(self, preset: Preset) -> tuple[Stage, ...]:
        """A guided stage, then for each step count an MSE, a conditional and an unconditional stage."""
        chosen = preset.lightning
        weights = (chosen.first_share, *chosen.shares * (len(chosen.chain) - 1))
        shares = iter(split_images(preset.images, preset.batch_size, weights))
        first = chosen.chain[0]
        guided = Stage(
            name=f"{first}-guided-mse",
            images=next(shares),
            learning_rate=preset.learning_rate,
            contract=euler_trailing((first,)),
            export=f"stages/{self.name}-{first}steps",
            losses=partial(guided_mse, settings=chosen),
        )
        stages = [guided]
        for before, n in pairwise(chosen.chain):
            stages += self._step_count(preset, before, n, shares)
        return tuple(stages)

    def _step_count(self, preset: Preset, before: int, n: int, shares: Iterator[int]) -> list[Stage]:
        """MSE, conditional and unconditional stage of n steps, whose teacher takes ``before``."""
        name, contract = f"{self.name}-{n}steps", euler_trailing((n,))
        warm_up = Stage(
            name=f"{n}-mse",
            images=next(shares),
            learning_rate=preset.learning_rate,
            contract=contract,
            export=f"stages/{name}-mse",
            losses=partial(progressive_mse, before=before, n=n),
            new_previous=True,
        )
        players = [
            Stage(
                name=f"{n}-{kind}",
                images=next(shares),
                learning_rate=preset.adversarial_learning_rate,
                contract=contract,
                export=export,
                losses=partial(adversarial, before=before, n=n),
                betas=ADAM_BETAS,
                opponents=(opponent(preset, conditional=kind == "conditional"),),
            )
            for kind, export in (("conditional", f"stages/{name}-conditional"), ("unconditional", name))
        ]
        return [warm_up, *players]


def guided_mse(batch: Batch, roles: Roles, rng: torch.Generator, *, settings: LightningSettings) -> Losses:
    """The first stage: the base's guided steps in one, by MSE."""
    span = draw_span(batch, roles, rng, settings.teacher_steps, settings.chain[0])
    target = walk(batch, roles, span, torch.full((len(batch),), settings.guidance, device=span.x.device))
    return Losses(mse(student_step(batch, roles, span), target))


def progressive_mse(batch: Batch, roles: Roles, rng: torch.Generator, *, before: int, n: int) -> Losses:
    """The warm-up of a step count: the previous student's steps in one, by MSE."""
    span = draw_span(batch, roles, rng, before, n)
    target = walk(batch, roles, span)
    return Losses(mse(student_step(batch, roles, span), target))


def adversarial(batch: Batch, roles: Roles, rng: torch.Generator, *, before: int, n: int) -> Losses:
    """Both players' losses of one batch, from one student forward."""
    span = draw_span(batch, roles, rng, before, n)
    match = play(
        roles, walk(batch, roles, span), student_step(batch, roles, span), span.s, batch.cond, origin=(span.x, span.t)
    )
    return Losses(match.generator, {"discriminator": match.discriminator}, match.logs)


def draw_span(batch: Batch, roles: Roles, rng: torch.Generator, before: int, n: int) -> Span:
    """Draw one of the n spans of the student for every image, with the before/n steps of its teacher inside."""
    edges = torch.tensor([*trailing(before), -1])  # -1 is the clean end
    per_span = before // n
    first = torch.randint(n, (len(batch),), generator=rng) * per_span
    stops = edges[first[:, None] + torch.arange(per_span + 1)].to(batch.latents.device)
    t = stops[:, 0]
    eps = draw_noise(batch.latents, rng)
    pure = (t == roles.schedule.num_train_timesteps - 1).reshape(-1, 1, 1, 1)
    x = roles.schedule.add_noise(torch.where(pure, torch.zeros_like(batch.latents), batch.latents), eps, t)
    return Span(x, t, stops[:, -1], stops)


@torch.no_grad()
def walk(batch: Batch, roles: Roles, span: Span, g: Tensor | None = None) -> Tensor:
    """Where the teacher's small steps lead: the base's with guidance g (B,), or without it the previous student's."""
    x = span.x
    for i in range(span.stops.shape[1] - 1):
        t, s = span.stops[:, i], span.stops[:, i + 1]
        if g is None:
            eps = roles.predict("previous", x, t, batch.cond)
        else:
            eps = roles.guided(x, t, batch.cond, batch.uncond, g)
        x = roles.schedule.ddim(x, eps, t, s)
    return x


def student_step(batch: Batch, roles: Roles, span: Span) -> Tensor:
    """The student's one step over the span."""
    return roles.schedule.ddim(span.x, roles.predict("student", span.x, span.t, batch.cond), span.t, span.s)
