"""Hyper-SD (2404.13686): segmented consistency, human feedback, distribution matching, one LoRA for 1 to 8 steps.

**TSCD** (section 3.1, algorithm 1) for k = 8, 4, 2, 1 segments, each stage going on from the student before:

    x_{t_n}  = alpha z0 + sigma eps,  t_n on a solver grid;  t_end ~ U[t_b, t_{n-1}] in t_n's segment (segments.py)
    xhat     = DDIM(x_{t_n}, eps_tea(x_{t_n}, t_n, c; g), t_n -> t_{n-1}),  g ~ U[g_min, g_max]           (eq. 1)
    L        = d( DDIM(x_{t_n}, eps_stu(x_{t_n}, t_n, c),    t_n -> t_end),
                  DDIM(xhat,    eps_ema(xhat, t_{n-1}, c), t_{n-1} -> t_end) ),  target under stop-gradient (eq. 12)
    d        = w_mse ||.||^2 + w_adv L_G,  real = the target, fake = the student, given (x_{t_n}, t_n)

With DDIM as the solver f(x, s -> s) = x holds by itself: no c_skip and c_out, no embedding of t_end or g. From k = 8
to 1 the weight moves from MSE to the adversarial loss. The student of k segments is sampled in k DDIM steps.

**Human feedback** (section 3.2): for k = 8, 4, 2 a second LoRA on the frozen student of k segments, trained on the
student's own k steps: without gradient to a step drawn from their later half, then x0' in one step with gradient,
decoded and judged (feedback.py). It is merged into the export, and the next TSCD stage goes on without it.

**One step** (section 3.3): on the k = 1 student, x = x0(z, eps_stu(z, t, c), t) of pure noise z at t = T, judged by
distribution matching (eq. 8; real score: the guided teacher; fake score: the critic, an online model of x), beside
TSCD's own loss at k = 1 ("MSE for stability") and the rewards. The result is the unified LoRA, sampled by TCD. The
dedicated UNet (full weights) is told t = 800 while z is pure noise, since 1/alpha there amplifies errors far less.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.batch import Batch
from distill.discriminator import opponent, play
from distill.losses import distribution_matching, mse, pseudo_huber
from distill.presets import HyperSDSettings, Preset
from distill.roles import Roles
from distill.segments import check_grid, draw_interval
from distill.stages import Losses, Opponent, Stage, draw_guidance, draw_noise, offset_noise, split_images
from hypersd_bench.sampling import NUM_TRAIN_TIMESTEPS, SamplerContract, ddim_trailing, lcm, tcd, trailing

UNIFIED_STEPS = (1, 2, 4, 8)
NOISE_RANGE = (0.02, 0.98)  # DMD2: share of T that the scores are compared at
PERCEPTUAL_MAX = 0.6  # ours: at more noise than this share of T a scene's layout is gone, and its masks prove nothing


class HyperSD:
    """TSCD at every number of segments, feedback LoRAs, and the one-step stage."""

    name = "hyper-sd"

    def stages(self, preset: Preset) -> tuple[Stage, ...]:
        """For each k a TSCD and, for LoRAs, a feedback stage; then one step, which gives the unified LoRA."""
        chosen = preset.hyper_sd
        check_grid(NUM_TRAIN_TIMESTEPS, chosen.grid, chosen.segments or (1,))
        feedback = list(chosen.segments[:-1]) if chosen.rewards and preset.student == "lora" else []
        plan = [("tscd", k, share) for k, share in zip(chosen.segments, chosen.shares, strict=True)]
        for k, share in zip(feedback, chosen.feedback_shares, strict=False):
            plan.insert(1 + next(i for i, row in enumerate(plan) if row[:2] == ("tscd", k)), ("feedback", k, share))
        images = split_images(preset.images, preset.batch_size, [*(row[2] for row in plan), chosen.one_step_share])
        stages = [
            _feedback_stage(preset, k, count) if kind == "feedback" else _tscd_stage(preset, k, count, k in feedback)
            for (kind, k, _), count in zip(plan, images, strict=False)
        ]
        return (*stages, _one_step_stage(preset, images[-1]))


def _tscd_stage(preset: Preset, k: int, images: int, feedback_follows: bool) -> Stage:
    chosen = preset.hyper_sd
    w_mse, w_adv = weights(chosen, k)
    name = f"hyper-sd-{k}steps"
    return Stage(
        name=f"{k}-segments",
        images=images,
        learning_rate=preset.learning_rate,
        contract=ddim_trailing((k,)),
        export=f"stages/{name}-tscd" if feedback_follows or k == 1 else name,
        losses=partial(tscd, k=k, guidance=preset.guidance, settings=chosen, w_mse=w_mse, w_adv=w_adv),
        opponents=(opponent(preset, conditional=True),) if w_adv else (),
    )


def _feedback_stage(preset: Preset, k: int, images: int) -> Stage:
    chosen = preset.hyper_sd
    return Stage(
        name=f"{k}-feedback",
        images=images,
        learning_rate=chosen.feedback_learning_rate,
        contract=ddim_trailing((k,)),
        export=f"hyper-sd-{k}steps",
        losses=partial(feedback, k=k, settings=chosen),
        trains="feedback",
        feedback_ratio=chosen.feedback_ratio,
        rewards=chosen.rewards,
        needs_images=False,
    )


def _one_step_stage(preset: Preset, images: int) -> Stage:
    chosen = preset.hyper_sd
    unified = preset.student == "lora"
    told = chosen.timestep if unified else chosen.unet_timestep
    return Stage(
        name="one-step",
        images=images,
        learning_rate=chosen.one_step_learning_rate,
        contract=tcd(UNIFIED_STEPS, eta=chosen.eta) if unified else one_step_contract(told),
        export="hyper-sd-unified" if unified else "hyper-sd-1step",
        losses=partial(one_step, told=told, guidance=preset.guidance, settings=chosen),
        practice=partial(practice, told=told),
        practice_steps=chosen.critic_updates - 1,
        opponents=(Opponent(name="critic", role="critic", learning_rate=chosen.critic_learning_rate),),
        rewards=chosen.rewards,
        needs_images=chosen.one_step_mse_weight > 0,
    )


def one_step_contract(timestep: int) -> SamplerContract:
    """The dedicated one-step UNet: LCM's scheduler at one explicit timestep."""
    contract = lcm((1,))
    return SamplerContract(scheduler=contract.scheduler, timesteps={1: (timestep,)})


def weights(settings: HyperSDSettings, k: int) -> tuple[float, float]:
    """How much of d is MSE and how much adversarial at k segments."""
    i = settings.segments.index(k)
    return settings.mse_weights[i], settings.adversarial_weights[i]


def tscd(
    batch: Batch, roles: Roles, rng: torch.Generator, *, k: int, guidance: tuple[float, float],
    settings: HyperSDSettings, w_mse: float = 1.0, w_adv: float = 0.0,
) -> Losses:  # fmt: skip
    """The loss of one batch with k segments."""
    schedule, z0 = roles.schedule, batch.latents
    interval = draw_interval(len(z0), k, schedule.num_train_timesteps, settings.grid, rng)
    t, t_prev, t_end = (value.to(z0.device) for value in interval)
    g = draw_guidance(batch, guidance, rng)
    x = schedule.add_noise(z0, offset_noise(z0, rng, settings.offset_noise), t)
    with torch.no_grad():
        x_hat = schedule.ddim(x, roles.guided(x, t, batch.cond, batch.uncond, g), t, t_prev)
        target = schedule.ddim(x_hat, roles.predict("ema", x_hat, t_prev, batch.cond), t_prev, t_end)
    student = schedule.ddim(x, roles.predict("student", x, t, batch.cond), t, t_end)
    distance = mse(student, target) if settings.huber_c is None else pseudo_huber(student, target, settings.huber_c)
    if not w_adv:
        return Losses(w_mse * distance)
    match = play(roles, target, student, t_end, batch.cond, origin=(x, t))
    logs = {"distance": distance.detach(), "generator_loss": match.generator.detach(), **match.logs}
    return Losses(w_mse * distance + w_adv * match.generator, {"discriminator": match.discriminator}, logs)


def feedback(batch: Batch, roles: Roles, rng: torch.Generator, *, k: int, settings: HyperSDSettings) -> Losses:
    """The rewards of one batch of k-step samples, and of its pictures' instances where the data have masks."""
    schedule, stops = roles.schedule, trailing(k)
    chosen = int(torch.randint(k // 2, k, (), generator=rng))
    x = pure_noise(batch, rng)
    with torch.no_grad():
        for t, s in pairwise(stops[: chosen + 1]):
            t_all = full(t, x)
            x = schedule.ddim(x, roles.predict("ema", x, t_all, batch.cond), t_all, full(s, x))
    t_all = full(stops[chosen], x)
    x0 = schedule.x0(x, roles.predict("student", x, t_all, batch.cond), t_all)
    loss, logs = roles.feedback.judge(x0, batch.prompts)
    loss = settings.reward_scale * loss
    if settings.perceptual and batch.instances is not None:
        percep = perceptual(batch, roles, rng, stops)
        loss, logs = loss + settings.perceptual_weight * percep, {**logs, "perceptual": percep.detach()}
    return Losses(loss, logs=logs)


def perceptual(batch: Batch, roles: Roles, rng: torch.Generator, stops: tuple[int, ...]) -> Tensor:
    """Eq. 14: real pictures noised to one of the student's steps, predicted clean in one, against their instances."""
    z0, schedule = batch.latents, roles.schedule
    low = [t for t in stops if t < PERCEPTUAL_MAX * schedule.num_train_timesteps] or [stops[-1]]
    t = full(low[int(torch.randint(len(low), (), generator=rng))], z0)
    x = schedule.add_noise(z0, draw_noise(z0, rng), t)
    x0 = schedule.x0(x, roles.predict("student", x, t, batch.cond), t)
    assert batch.instances is not None
    seed = int(torch.randint(2**31, (), generator=rng))
    result: Tensor = roles.feedback.perceptual(x0, batch.instances, seed)
    return result


def one_step(
    batch: Batch, roles: Roles, rng: torch.Generator, *, told: int, guidance: tuple[float, float],
    settings: HyperSDSettings,
) -> Losses:  # fmt: skip
    """Distribution matching on one-step samples, beside TSCD's loss and the rewards; and the critic's loss."""
    x0 = generate(batch, roles, rng, told)
    matching = distribution_matching(x0, *scores(x0.detach(), batch, roles, rng, settings.real_guidance))
    loss, logs = settings.dmd_weight * matching, {"matching": matching.detach()}
    if settings.one_step_mse_weight:
        stability = tscd(batch, roles, rng, k=1, guidance=guidance, settings=settings).student
        assert stability is not None
        loss = loss + settings.one_step_mse_weight * stability
        logs["distance"] = stability.detach()
    if roles.feedback is not None:
        judged, seen = roles.feedback.judge(x0, batch.prompts)
        loss, logs = loss + settings.one_step_reward_scale * judged, logs | seen
    critic, gap = critic_losses(x0.detach(), batch, roles, rng)
    return Losses(loss, {"critic": critic}, {**logs, "critic_gap": gap})


def practice(batch: Batch, roles: Roles, rng: torch.Generator, *, told: int) -> Losses:
    """One more update of the critic alone."""
    with torch.no_grad():
        x0 = generate(batch, roles, rng, told)
    return Losses(None, {"critic": critic_losses(x0, batch, roles, rng)[0]})


def generate(batch: Batch, roles: Roles, rng: torch.Generator, told: int) -> Tensor:
    """x = (z - sigma_t eps_stu(z, t, c)) / alpha_t of pure noise z, which the student is told is t = ``told``."""
    z = pure_noise(batch, rng)
    t = full(told, z)
    return roles.schedule.x0(z, roles.predict("student", z, t, batch.cond), t)


@torch.no_grad()
def scores(x: Tensor, batch: Batch, roles: Roles, rng: torch.Generator, g: float) -> tuple[Tensor, Tensor]:
    """What the guided teacher and the critic take x, noised anew to t ~ U[.02 T, .98 T], for: (x0_real, x0_fake)."""
    low, high = (int(share * roles.schedule.num_train_timesteps) for share in NOISE_RANGE)
    t = torch.randint(low, high + 1, (len(x),), generator=rng).to(x.device)
    x_t = roles.schedule.add_noise(x, draw_noise(x, rng), t)
    real = roles.guided(x_t, t, batch.cond, batch.uncond, torch.full((len(x),), g, device=x.device))
    fake = roles.predict("critic", x_t, t, batch.cond)
    return roles.schedule.x0(x_t, real, t), roles.schedule.x0(x_t, fake, t)


def critic_losses(x: Tensor, batch: Batch, roles: Roles, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The critic's diffusion loss on the student's samples x, || eps_fake(x_t, t, c) - eps ||^2; and its lag.

    The lag is (its loss - the teacher's) / the teacher's on the same: above 0 it knows x less well.
    """
    t = torch.randint(roles.schedule.num_train_timesteps, (len(x),), generator=rng).to(x.device)
    eps = draw_noise(x, rng)
    x_t = roles.schedule.add_noise(x, eps, t)
    loss = F.mse_loss(roles.predict("critic", x_t, t, batch.cond, grad=True), eps)
    of_teacher = F.mse_loss(roles.predict("teacher", x_t, t, batch.cond), eps)
    return loss, (loss.detach() - of_teacher) / of_teacher


def pure_noise(batch: Batch, rng: torch.Generator) -> Tensor:
    """Where sampling starts: standard normal latents, one for each prompt."""
    return torch.randn((len(batch), *batch.latent_shape), generator=rng).to(batch.cond.text.device)


def full(t: int, like: Tensor) -> Tensor:
    """One timestep for every image: (B,) int64."""
    return torch.full((len(like),), t, device=like.device)
