"""Hyper-SD's stages beyond TSCD's MSE: the adversarial mix, feedback, one step; against their equations."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import sqrt
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from distill.batch import Batch, Instances
from distill.discriminator import Discriminator, features
from distill.losses import distribution_matching, pseudo_huber
from distill.methods import hyper_sd
from distill.presets import HyperSDSettings, find_preset
from distill.roles import Roles
from distill.segments import draw_interval
from distill.stages import Losses, Stage, draw_guidance, draw_noise, offset_noise
from hypersd_bench.errors import InputError
from hypersd_bench.sampling import trailing
from tests.tiny_cast import SD, tiny_batch, tiny_cast

ABAR = DDIMScheduler(**SD).alphas_cumprod.double()
GUIDANCE = (2.0, 4.0)
SETTINGS = HyperSDSettings(offset_noise=0.0)
POCKET = find_preset("pocket")


@pytest.fixture
def roles() -> Roles:
    return tiny_cast("critic", "feedback")


@pytest.fixture
def batch() -> Batch:
    return tiny_batch(4)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def x0_of(x: Tensor, eps: Tensor, t: int) -> Tensor:
    return (x - sqrt(1 - float(ABAR[t])) * eps) / sqrt(float(ABAR[t]))


def noised(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    abar = ABAR[t].reshape(-1, 1, 1, 1).float()
    mixed: Tensor = abar.sqrt() * x + (1 - abar).sqrt() * eps
    return mixed


def student_loss(losses: Losses) -> Tensor:
    assert losses.student is not None
    return losses.student


class Judge:
    """A feedback whose reward is the mean of the clean latents; keeps what it was shown."""

    def __init__(self) -> None:
        self.shown: list[Tensor] = []
        self.seeds: list[int] = []

    def judge(self, x0: Tensor, prompts: Any) -> tuple[Tensor, dict[str, Tensor]]:
        assert len(prompts) == len(x0)
        self.shown.append(x0)
        return x0.mean(), {"reward/toy": x0.detach().mean()}

    def perceptual(self, x0: Tensor, instances: Any, seed: int) -> Tensor:
        self.shown.append(x0)
        self.seeds.append(seed)
        return x0.square().mean()


# what the stages are


def test_the_chain_is_the_papers() -> None:
    stages = hyper_sd.HyperSD().stages(POCKET)
    assert [stage.name for stage in stages] == [
        "8-segments", "8-feedback", "4-segments", "4-feedback", "2-segments", "2-feedback", "1-segments", "one-step",
    ]  # fmt: skip
    published = {stage.export: sorted(stage.contract.timesteps) for stage in stages if "/" not in stage.export}
    assert published == {
        "hyper-sd-8steps": [8], "hyper-sd-4steps": [4], "hyper-sd-2steps": [2], "hyper-sd-unified": [1, 2, 4, 8],
    }  # fmt: skip
    assert stages[-1].contract.scheduler == "TCDScheduler"
    assert [stage.trains for stage in stages if "feedback" in stage.name] == ["feedback"] * 3


def test_without_rewards_no_stage_asks_for_them() -> None:
    plain = replace(POCKET, hyper_sd=replace(POCKET.hyper_sd, rewards=()))
    stages = hyper_sd.HyperSD().stages(plain)
    assert [stage.name for stage in stages] == ["8-segments", "4-segments", "2-segments", "1-segments", "one-step"]
    assert not any(stage.rewards for stage in stages)
    assert [stage.export for stage in stages][:3] == [f"hyper-sd-{k}steps" for k in (8, 4, 2)]


def test_full_weights_end_in_a_dedicated_one_step_unet() -> None:
    last = hyper_sd.HyperSD().stages(replace(POCKET, student="unet"))[-1]
    assert (last.export, last.contract.timesteps) == ("hyper-sd-1step", {1: (800,)})


def test_the_mix_moves_from_mse_to_adversarial() -> None:
    for preset in (POCKET, find_preset("sdxl")):
        mixes = [hyper_sd.weights(preset.hyper_sd, k) for k in (8, 4, 2, 1)]
        assert all(a[0] >= b[0] and a[1] <= b[1] for a, b in pairwise(mixes))
        assert mixes[0][0] > mixes[-1][0]
        assert mixes[0][1] < mixes[-1][1]


def test_only_stages_with_an_adversarial_part_have_a_discriminator() -> None:
    stages: dict[str, Stage] = {stage.name: stage for stage in hyper_sd.HyperSD().stages(find_preset("sdxl"))}
    assert [len(stages[f"{k}-segments"].opponents) for k in (8, 4, 2, 1)] == [0, 1, 1, 1]
    assert [opponent.name for opponent in stages["one-step"].opponents] == ["critic"]
    assert stages["one-step"].practice_steps == 4  # DMD2: five critic updates for one of the student


def test_prompts_alone_are_enough_for_feedback_and_for_one_step_without_mse() -> None:
    pure = replace(POCKET, hyper_sd=replace(POCKET.hyper_sd, one_step_mse_weight=0.0))
    needed = {stage.name: stage.needs_images for stage in hyper_sd.HyperSD().stages(pure)}
    assert not needed["8-feedback"]
    assert not needed["one-step"]
    assert needed["8-segments"]
    assert hyper_sd.HyperSD().stages(POCKET)[-1].needs_images


def test_a_grid_that_misses_a_boundary_is_refused() -> None:
    with pytest.raises(InputError, match="50 points misses boundaries"):
        hyper_sd.HyperSD().stages(replace(POCKET, hyper_sd=replace(POCKET.hyper_sd, grid=50)))


# TSCD's distance


def test_offset_noise_shifts_whole_channels() -> None:
    noise = offset_noise(torch.empty(4000, 2, 4, 4), seeded(), 0.5)
    assert float(noise.var()) == pytest.approx(1 + 0.5**2, rel=0.03)
    assert float(noise.mean((2, 3)).var()) == pytest.approx(1 / 16 + 0.5**2, rel=0.05)
    assert torch.equal(offset_noise(noise, seeded(), 0.0), draw_noise(noise, seeded()))


@pytest.mark.parametrize("w", [(1.0, 0.0), (0.5, 0.5), (0.1, 1.0)])
def test_the_distance_is_the_weighted_sum(roles: Roles, batch: Batch, w: tuple[float, float]) -> None:
    roles.discriminator = discriminator = Discriminator(roles, conditional=True)
    losses = hyper_sd.tscd(batch, roles, seeded(), k=2, guidance=GUIDANCE, settings=SETTINGS, w_mse=w[0], w_adv=w[1])
    rng = seeded()
    t, t_prev, t_end = draw_interval(4, 2, 1000, 40, rng)
    g, schedule = draw_guidance(batch, GUIDANCE, rng), roles.schedule
    x = noised(batch.latents, draw_noise(batch.latents, rng), t)
    with torch.no_grad():
        x_hat = schedule.ddim(x, roles.guided(x, t, batch.cond, batch.uncond, g), t, t_prev)
        real = schedule.ddim(x_hat, roles.predict("ema", x_hat, t_prev, batch.cond), t_prev, t_end)
        fake = schedule.ddim(x, roles.predict("student", x, t, batch.cond), t, t_end)
        origin, of_real, of_fake = (
            features(roles, "teacher", y, at, batch.cond) for y, at in ((x, t), (real, t_end), (fake, t_end))
        )
        p_real, p_fake = (discriminator(seen, origin).sigmoid() for seen in (of_real, of_fake))
    expected = w[0] * (fake - real).square().mean() + w[1] * -p_fake.log().mean()
    torch.testing.assert_close(student_loss(losses).detach(), expected, rtol=1e-3, atol=1e-6)
    if w[1]:
        expected = -p_real.log().mean() - (1 - p_fake).log().mean()
        torch.testing.assert_close(losses.opponents["discriminator"].detach(), expected, rtol=1e-3, atol=1e-6)
    else:
        assert not losses.opponents


def test_the_distance_can_be_pseudo_huber(roles: Roles, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor, float]] = []

    def spied(prediction: Tensor, target: Tensor, c: float) -> Tensor:
        seen.append((prediction.detach(), target, c))
        return pseudo_huber(prediction, target, c)

    monkeypatch.setattr(hyper_sd, "pseudo_huber", spied)
    mse, huber = (
        student_loss(hyper_sd.tscd(batch, roles, seeded(), k=4, guidance=GUIDANCE, settings=chosen)).detach()
        for chosen in (SETTINGS, replace(SETTINGS, huber_c=0.03))
    )
    ((student, target, c),) = seen
    torch.testing.assert_close(mse, (student - target).square().mean())
    torch.testing.assert_close(huber, (torch.sqrt((student - target) ** 2 + 0.03**2) - 0.03).mean())
    assert c == 0.03


# feedback


@pytest.mark.parametrize("k", [8, 4, 2])
def test_feedback_judges_one_step_predictions_of_the_students_own_samples(roles: Roles, batch: Batch, k: int) -> None:
    roles.train("feedback")
    roles.feedback = judge = Judge()
    later_half = set()
    for seed in range(6):
        rng = torch.Generator().manual_seed(seed)
        losses = hyper_sd.feedback(batch, roles, rng, k=k, settings=SETTINGS)
        rng = torch.Generator().manual_seed(seed)
        stop = int(torch.randint(k // 2, k, (), generator=rng))
        later_half.add(stop)
        x = torch.randn(4, 4, 8, 8, generator=rng)
        stops = trailing(k)
        with torch.no_grad():
            for t, s in pairwise(stops[: stop + 1]):
                eps = roles.predict("ema", x, torch.full((4,), t), batch.cond)
                x = sqrt(float(ABAR[s])) * x0_of(x, eps, t) + sqrt(1 - float(ABAR[s])) * eps
            t = stops[stop]
            x0 = x0_of(x, roles.predict("student", x, torch.full((4,), t), batch.cond), t)
        torch.testing.assert_close(judge.shown[-1].detach(), x0, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(student_loss(losses).detach(), 1e-3 * x0.mean(), rtol=1e-3, atol=1e-6)
        assert "reward/toy" in losses.logs
    assert min(later_half) >= k // 2
    assert max(later_half) <= k - 1


def test_feedbacks_gradient_reaches_its_lora_alone(roles: Roles, batch: Batch) -> None:
    roles.train("feedback")
    roles.feedback = Judge()
    student_loss(hyper_sd.feedback(batch, roles, seeded(), k=4, settings=SETTINGS)).backward()
    learned = {a for a in roles.adapters if any(p.grad is not None for p in roles.parameters(a))}
    assert learned == {"feedback"}
    assert any(bool(p.grad.any()) for p in roles.parameters("feedback") if p.grad is not None)


def test_feedback_needs_no_images(roles: Roles, batch: Batch) -> None:
    roles.train("feedback")
    roles.feedback = Judge()
    with_images = hyper_sd.feedback(batch, roles, seeded(), k=2, settings=SETTINGS)
    without = hyper_sd.feedback(replace(batch, z0=None), roles, seeded(), k=2, settings=SETTINGS)
    assert torch.equal(student_loss(with_images), student_loss(without))


def test_the_perceptual_reward_looks_at_real_pictures_noised_a_little(roles: Roles, batch: Batch) -> None:
    roles.train("feedback")
    roles.feedback = judge = Judge()
    none = Instances(torch.zeros(0), torch.zeros(0, 64, 64), torch.zeros(0, 4))
    chosen = replace(SETTINGS, perceptual="toy", perceptual_weight=0.25)
    seen = replace(batch, instances=[none] * 4)
    losses = hyper_sd.feedback(seen, roles, seeded(), k=8, settings=chosen)
    rewards, percep = judge.shown
    expected = 1e-3 * rewards.mean() + 0.25 * percep.square().mean()
    torch.testing.assert_close(student_loss(losses).detach(), expected.detach())
    assert float(losses.logs["perceptual"]) == pytest.approx(float(percep.detach().square().mean()))
    again = hyper_sd.feedback(seen, roles, seeded(), k=8, settings=chosen)
    assert torch.equal(student_loss(losses), student_loss(again))
    assert judge.seeds[0] == judge.seeds[1]
    assert "perceptual" not in hyper_sd.feedback(batch, roles, seeded(), k=8, settings=chosen).logs  # no masks


# one step


@pytest.mark.parametrize("told", [999, 800])
def test_one_step_is_dmd_beside_tscd_and_rewards(roles: Roles, batch: Batch, told: int) -> None:
    roles.train("student", "critic")
    roles.feedback = judge = Judge()
    chosen = replace(SETTINGS, dmd_weight=0.7, one_step_mse_weight=0.3, one_step_reward_scale=0.2, real_guidance=5.0)
    losses = hyper_sd.one_step(batch, roles, seeded(), told=told, guidance=GUIDANCE, settings=chosen)
    rng = seeded()
    z = torch.randn(4, 4, 8, 8, generator=rng)
    with torch.no_grad():
        x = x0_of(z, roles.predict("student", z, torch.full((4,), told), batch.cond), told)
        t = torch.randint(20, 981, (4,), generator=rng)
        eps = torch.randn(x.shape, generator=rng)
        x_t = noised(x, eps, t)
        conditional, unconditional = (
            roles.predict("teacher", x_t, t, cond) for cond in (batch.cond, batch.uncond.expand(4))
        )
        real = roles.schedule.x0(x_t, unconditional + 5.0 * (conditional - unconditional), t)
        fake = roles.schedule.x0(x_t, roles.predict("critic", x_t, t, batch.cond), t)
        matching = distribution_matching(x, real, fake)
        stability = student_loss(hyper_sd.tscd(batch, roles, rng, k=1, guidance=GUIDANCE, settings=chosen))
        expected = 0.7 * matching + 0.3 * stability + 0.2 * x.mean()
        torch.testing.assert_close(student_loss(losses).detach(), expected, rtol=2e-3, atol=1e-4)
        t = torch.randint(1000, (4,), generator=rng)
        eps = torch.randn(x.shape, generator=rng)
        denoising = (roles.predict("critic", noised(x, eps, t), t, batch.cond) - eps).square().mean()
    torch.testing.assert_close(losses.opponents["critic"].detach(), denoising, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(judge.shown[0].detach(), x, rtol=1e-3, atol=1e-3)


def test_student_and_critic_learn_from_their_own_losses(roles: Roles, batch: Batch) -> None:
    roles.train("student", "critic")
    roles.feedback = Judge()
    losses = hyper_sd.one_step(batch, roles, seeded(), told=999, guidance=GUIDANCE, settings=SETTINGS)
    student, critic = roles.parameters("student"), roles.parameters("critic")
    for loss, own, other in (
        (student_loss(losses), student, critic), (losses.opponents["critic"], critic, student),
    ):  # fmt: skip
        assert all(g is None for g in torch.autograd.grad(loss, other, retain_graph=True, allow_unused=True))
        gradients = torch.autograd.grad(loss, own, retain_graph=True)
        assert all(bool(g.isfinite().all()) for g in gradients)
        assert any(bool(g.any()) for g in gradients)


def test_practice_is_the_critics_alone(roles: Roles, batch: Batch) -> None:
    roles.train("student", "critic")
    losses = hyper_sd.practice(batch, roles, seeded(), told=999)
    assert losses.student is None
    losses.opponents["critic"].backward()
    assert {a for a in roles.adapters if any(p.grad is not None for p in roles.parameters(a))} == {"critic"}


def test_a_critic_learns_what_the_student_makes(roles: Roles, batch: Batch) -> None:
    """Practice alone makes the fake score better at the student's samples, on draws that it has not seen."""
    roles.reset("critic")
    roles.train("student", "critic")
    optimizer = torch.optim.AdamW(roles.parameters("critic"), lr=5e-3)

    def loss(seed: int) -> Tensor:
        return hyper_sd.practice(batch, roles, torch.Generator().manual_seed(seed), told=999).opponents["critic"]

    def unseen() -> float:
        return sum(float(loss(1000 + i).detach()) for i in range(6)) / 6

    before = unseen()
    for step in range(24):
        loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert unseen() < 0.97 * before


def test_without_mse_prompts_are_enough_for_one_step(roles: Roles, batch: Batch) -> None:
    roles.train("student", "critic")
    chosen = replace(SETTINGS, one_step_mse_weight=0.0)
    for fed in (batch, replace(batch, z0=None)):
        losses = hyper_sd.one_step(fed, roles, seeded(), told=999, guidance=GUIDANCE, settings=chosen)
        assert "distance" not in losses.logs
