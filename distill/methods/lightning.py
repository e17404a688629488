"""SDXL-Lightning's progressive adversarial distillation (2402.13929), as LoRAs or full UNets.

The teacher takes small DDIM steps from x_t, the student of n steps one over the same span t -> s = t - T/n:

    0.  128 -> 32  MSE; the teacher is the base with guidance, which later stages inherit (section 3.6)
    then 32 -> 8 -> 4 -> 2 -> 1, the teacher being a student of before, without guidance:
    -   MSE                warm-up, ours, by default left out
    a.  conditional        real = teacher's x_s, fake = student's; D(x_t, x_s, t, s, c)               (section 3.2)
    b.  unconditional      D'(x_s, s, c), which removes ghosted double images                         (section 3.4)
    c.  full weights       as b, further, by option (``merge``)                                       (section 3.6)

    L_D = -log p_real - log(1 - p_fake),  L_G = -log p_fake           a new discriminator for every stage

At t = T the student and its teacher start from sigma_T eps, without the alpha_T z0 that real noise never holds, while
abar_T stays as it is (section 3.5, eq. 24, says eps): exactly what Euler's trailing schedule feeds at inference.

Two steps and one are held stable (sections 3.4 and 3.7) by
    - a skip-level teacher in b and c: the student of 8 steps for 2, of 4 for 1
    - training at t of {250, 500, 750, 1000}, spans that would pass the clean end stopping there
    - for one step, noising real and fake x0 with one new eps* to t* of {10, 250, 500, 750} before the discriminator
      looks (eqs. 25, 26), weights 1:1:1:1 in a, 5:1:1:1 in b and c
    - for one step, x0 form: L_convert = || f(x_t, t, c) - x0(x_t, eps_frozen(x_t, t, c), t) ||^2 (eq. 29), then a to c,
      with teachers in their own form; sampled by Euler with prediction type "sample"

Departures: a LoRA of one step stays in eps form, since x0 form is too far from the base for it (the paper publishes
none); a run trains either LoRAs or full weights throughout, so c is for full UNets alone and merges nothing; what
becomes a teacher or is exported is the student's EMA; the discriminator is also new for b, whose head has other inputs;
weight decay is the preset's, the paper has none; the discriminator's own departures are in its file. The miniature's
preset starts from 64 steps and warms up by MSE, for reasons given there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import lcm
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from distill.batch import Batch
from distill.discriminator import ADAM_BETAS, opponent, play
from distill.losses import mse
from distill.presets import LightningSettings, Preset
from distill.roles import Roles
from distill.stages import Losses, LossFunction, Stage, draw_noise, split_images
from hypersd_bench.errors import InputError
from hypersd_bench.sampling import euler_trailing, trailing

STABILISED = 2  # steps; students of so few need the help of sections 3.4 and 3.7

Objective = Literal["convert", "mse", "conditional", "unconditional", "full"]
Before = Literal["previous", "older"]


class Span(NamedTuple):
    """A batch at the start of its span: noisy latents x_t, the student's t and s, the teacher's stops (B, n + 1)."""

    x: Tensor
    t: Tensor
    s: Tensor
    stops: Tensor


class Part(NamedTuple):
    """One objective of a step count, and its share of the images."""

    n: int
    objective: Objective
    share: float


class Lightning:
    """Progressive distillation over 32, 8, 4, 2 and 1 steps; a LoRA or UNet for each of the last four."""

    name = "lightning"

    def stages(self, preset: Preset) -> tuple[Stage, ...]:
        """A guided stage, then for each step count those of its objectives that have a share of the images."""
        chosen, first = preset.lightning, preset.lightning.chain[0]
        if chosen.merge and preset.student == "lora":
            raise InputError(
                "Lightning's merge is for full weights, this run trains a LoRA: --student unet or no merge"
            )
        parts = [part for n in chosen.chain[1:] for part in objectives(preset, n)]
        shares = split_images(preset.images, preset.batch_size, [chosen.first_share, *(part.share for part in parts)])
        guided = Stage(
            name=f"{first}-guided-mse",
            images=shares[0],
            learning_rate=chosen.first_learning_rate or preset.learning_rate,
            contract=euler_trailing((first,)),
            export=f"stages/{self.name}-{first}steps",
            losses=partial(guided_mse, settings=chosen),
        )
        stages, before = [guided], None
        for part, images, after in zip(parts, shares[1:], [*parts[1:], None], strict=True):
            name = f"{self.name}-{part.n}steps"
            last = after is None or after.n != part.n
            stage = _stage(preset, part, images, name if last else f"stages/{name}-{part.objective}")
            stages.append(replace(stage, new_previous=before is None or before.n != part.n))
            before = part
        return tuple(stages)


def objectives(preset: Preset, n: int) -> list[Part]:
    """What a student of n steps is trained on, in order, without what has no share."""
    chosen = preset.lightning
    warm_up, conditional, unconditional = chosen.shares
    parts = [
        Part(n, "convert", chosen.convert_share if in_x0_form(preset, n) else 0.0),
        Part(n, "mse", warm_up),
        Part(n, "conditional", conditional),
        Part(n, "unconditional", unconditional),
        Part(n, "full", chosen.merge_share if chosen.merge else 0.0),
    ]
    return [part for part in parts if part.share > 0]


def in_x0_form(preset: Preset, n: int) -> bool:
    """Whether the student of n steps predicts x0: the one-step full UNet."""
    return n == 1 and preset.student == "unet" and preset.lightning.one_step_x0


def _stage(preset: Preset, part: Part, images: int, export: str) -> Stage:
    """The stage of a part: a regression, or a game against a new discriminator."""
    x0_form = in_x0_form(preset, part.n)
    contract = euler_trailing((part.n,))
    stage = Stage(
        name=f"{part.n}-{part.objective}",
        images=images,
        learning_rate=preset.learning_rate,
        contract=replace(contract, prediction_type="sample") if x0_form else contract,
        export=export,
        losses=_losses(preset.lightning, part),
        prediction_type="sample" if x0_form else None,
    )
    if part.objective in ("convert", "mse"):
        return stage
    own_rate = preset.lightning.unet_learning_rate if preset.student == "unet" else None
    player = opponent(preset, conditional=part.objective == "conditional")
    return replace(
        stage,
        learning_rate=own_rate or preset.adversarial_learning_rate,
        betas=ADAM_BETAS,
        opponents=(replace(player, learning_rate=own_rate or player.learning_rate),),
        older=_skips_level(preset.lightning, part),
    )


def _losses(settings: LightningSettings, part: Part) -> LossFunction:
    """The loss of a part, with its teacher's steps."""
    place, older = settings.chain.index(part.n), _skips_level(settings, part)
    before = settings.chain[place - (2 if older else 1)]
    if part.objective in ("convert", "mse"):
        loss: Callable[..., Losses] = convert if part.objective == "convert" else progressive_mse
        return partial(loss, before=before, n=part.n, settings=settings)
    weights = settings.conditional_weights if part.objective == "conditional" else settings.unconditional_weights
    return partial(
        adversarial, before=before, n=part.n, settings=settings, teacher="older" if older else "previous",
        noise_weights=weights if part.n == 1 else None,
    )  # fmt: skip


def _skips_level(settings: LightningSettings, part: Part) -> bool:
    """Whether a part looks past the student before its own, and there is one before that."""
    stabilised = part.objective in ("unconditional", "full") and part.n <= STABILISED
    return settings.skip_level and stabilised and settings.chain.index(part.n) >= 2


def guided_mse(batch: Batch, roles: Roles, rng: torch.Generator, *, settings: LightningSettings) -> Losses:
    """The first stage: the base's guided steps in one, by MSE."""
    span = draw_span(batch, roles, rng, settings.teacher_steps, settings.chain[0])
    target = walk(batch, roles, span, torch.full((len(batch),), settings.guidance, device=span.x.device))
    return Losses(mse(student_step(batch, roles, span), target))


def progressive_mse(
    batch: Batch, roles: Roles, rng: torch.Generator, *, before: int, n: int, settings: LightningSettings
) -> Losses:
    """The warm-up of a step count: the previous student's steps in one, by MSE."""
    span = draw_span(batch, roles, rng, before, n, settings.train_points)
    return Losses(mse(student_step(batch, roles, span), walk(batch, roles, span)))


def convert(
    batch: Batch, roles: Roles, rng: torch.Generator, *, before: int, n: int, settings: LightningSettings
) -> Losses:
    """The switch to x0 form: the student's x0 to what the previous student's eps implies (eq. 29)."""
    span = draw_span(batch, roles, rng, before, n, settings.train_points)
    x0_frozen = roles.schedule.x0(span.x, roles.predict("previous", span.x, span.t, batch.cond), span.t)
    x0_student = roles.schedule.x0(span.x, roles.predict("student", span.x, span.t, batch.cond), span.t)
    return Losses(mse(x0_student, x0_frozen))


def adversarial(
    batch: Batch, roles: Roles, rng: torch.Generator, *, before: int, n: int, settings: LightningSettings,
    teacher: Before = "previous", noise_weights: tuple[float, ...] | None = None,
) -> Losses:  # fmt: skip
    """Both players' losses of one batch, from one student forward.

    before: steps of ``teacher``. noise_weights: of t*, where the discriminator is to see noised latents.
    """
    span = draw_span(batch, roles, rng, before, n, settings.train_points)
    real, fake, s = walk(batch, roles, span, teacher=teacher), student_step(batch, roles, span), span.s
    if noise_weights is not None:
        s = draw_noise_level(len(batch), settings.discriminator_timesteps, noise_weights, rng).to(s.device)
        eps = draw_noise(real, rng)
        real, fake = (roles.schedule.add_noise(x, eps, s) for x in (real, fake))
    match = play(roles, real, fake, s, batch.cond, origin=(span.x, span.t))
    return Losses(match.generator, {"discriminator": match.discriminator}, match.logs)


def draw_noise_level(
    batch_size: int, timesteps: tuple[int, ...], weights: tuple[float, ...], rng: torch.Generator
) -> Tensor:
    """Draw t* from timesteps by weight: (B,) int64."""
    index = torch.multinomial(torch.tensor(weights), batch_size, replacement=True, generator=rng)
    return torch.tensor(timesteps)[index]


def draw_span(batch: Batch, roles: Roles, rng: torch.Generator, before: int, n: int, train_points: int = 1) -> Span:
    """Draw a span of the student of n steps for every image, with the ``before`` / n steps of its teacher inside.

    Spans start at the n timesteps of inference; of fewer than ``train_points`` steps, at so many timesteps. What would
    lie past the clean end, -1, is the clean end.
    """
    starts = max(n, train_points)
    grid = lcm(before, starts)  # so fine that it holds the student's starts and the teacher's steps
    edges = torch.tensor([*trailing(grid), -1])
    first = torch.randint(starts, (len(batch),), generator=rng) * (grid // starts)
    places = first[:, None] + torch.arange(before // n + 1) * (grid // before)
    stops = edges[places.clamp(max=grid)].to(batch.latents.device)
    t = stops[:, 0]
    eps = draw_noise(batch.latents, rng)
    pure = (t == roles.schedule.num_train_timesteps - 1).reshape(-1, 1, 1, 1)
    x = roles.schedule.add_noise(torch.where(pure, torch.zeros_like(batch.latents), batch.latents), eps, t)
    return Span(x, t, stops[:, -1], stops)


@torch.no_grad()
def walk(batch: Batch, roles: Roles, span: Span, g: Tensor | None = None, teacher: Before = "previous") -> Tensor:
    """Where the teacher's small steps lead: the base's with guidance g (B,), or without it a frozen student's."""
    x = span.x
    for t, s in pairwise(span.stops.unbind(1)):
        moving, t = t > s, t.clamp(min=0)  # who has arrived at the clean end stays
        if not bool(moving.any()):
            break
        eps = roles.predict(teacher, x, t, batch.cond) if g is None else roles.guided(x, t, batch.cond, batch.uncond, g)
        x = torch.where(moving.reshape(-1, 1, 1, 1), roles.schedule.ddim(x, eps, t, s), x)
    return x


def student_step(batch: Batch, roles: Roles, span: Span) -> Tensor:
    """The student's one step over the span."""
    return roles.schedule.ddim(span.x, roles.predict("student", span.x, span.t, batch.cond), span.t, span.s)
