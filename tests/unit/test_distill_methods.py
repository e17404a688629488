"""Each method's loss against a transcription of its paper's formulas, image by image, on a tiny random UNet."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import sqrt

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from distill.batch import Batch, Condition
from distill.discriminator import Discriminator
from distill.loop import learning_rate_factor
from distill.methods import hyper_sd, lcm, lightning, tcd
from distill.presets import (
    PRESETS,
    HyperSDSettings,
    LCMSettings,
    LightningSettings,
    Preset,
    TCDSettings,
    find_preset,
)
from distill.roles import Kind, Role, Roles
from distill.segments import draw_interval, segment_start
from distill.stages import Method, Stage, draw_guidance, draw_noise, offset_noise, split_images
from hypersd_bench import registry
from hypersd_bench.errors import InputError
from tests.tiny_cast import SD, tiny_batch, tiny_cast

ABAR = DDIMScheduler(**SD).alphas_cumprod.double()
GUIDANCE = (2.0, 4.0)


@pytest.fixture
def roles() -> Roles:
    return tiny_cast("previous")


@pytest.fixture
def batch() -> Batch:
    return tiny_batch()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def alpha(t: int) -> float:
    return sqrt(float(ABAR[t])) if t >= 0 else 1.0


def sigma(t: int) -> float:
    return sqrt(1 - float(ABAR[t])) if t >= 0 else 0.0


def f(roles: Roles, role: Role, x: Tensor, t: int, text: Tensor) -> Tensor:
    return roles.predict(role, x[None], torch.tensor([t]), Condition(text[None]))[0].detach()


def ddim(x: Tensor, eps: Tensor, t: int, s: int) -> Tensor:
    return alpha(s) * (x - sigma(t) * eps) / alpha(t) + sigma(s) * eps


def guided_step(roles: Roles, x: Tensor, t: int, s: int, text: Tensor, empty: Tensor, g: float) -> Tensor:
    eps_u, eps_c = f(roles, "teacher", x, t, empty), f(roles, "teacher", x, t, text)
    w = g - 1  # the papers' form
    return ddim(x, eps_c + w * (eps_c - eps_u), t, s)


@pytest.mark.parametrize("k", [8, 4, 2, 1])
def test_tscd_is_equation_12(roles: Roles, batch: Batch, k: int) -> None:
    loss = hyper_sd.tscd(batch, roles, seeded(), k=k, guidance=GUIDANCE, settings=HyperSDSettings()).student
    assert loss is not None
    rng = seeded()
    draws = draw_interval(6, k, 1000, 40, rng)
    g, eps = draw_guidance(batch, GUIDANCE, rng), offset_noise(batch.latents, rng, 0.1)
    per_image = []
    for i, (t, t_prev, t_end) in enumerate(zip(*(values.tolist() for values in draws), strict=True)):
        x = alpha(t) * batch.latents[i] + sigma(t) * eps[i]
        x_hat = guided_step(roles, x, t, t_prev, batch.cond.text[i], batch.uncond.text[0], float(g[i]))
        target = ddim(x_hat, f(roles, "ema", x_hat, t_prev, batch.cond.text[i]), t_prev, t_end)
        student = ddim(x, f(roles, "student", x, t, batch.cond.text[i]), t, t_end)
        per_image.append(float((student - target).square().mean()))
    assert float(loss.detach()) == pytest.approx(sum(per_image) / 6, rel=1e-3)


def test_lcm_is_its_papers_loss(roles: Roles, batch: Batch) -> None:
    loss = lcm.consistency(batch, roles, seeded(), guidance=GUIDANCE, settings=LCMSettings()).student
    assert loss is not None
    rng = seeded()
    draws = draw_interval(6, 1, 1000, 50, rng)
    g, eps = draw_guidance(batch, GUIDANCE, rng), draw_noise(batch.latents, rng)

    def consistency(role: Role, x: Tensor, t: int, text: Tensor) -> Tensor:
        x0 = (x - sigma(t) * f(roles, role, x, t, text)) / alpha(t)
        return 0.25 / ((10 * t) ** 2 + 0.25) * x + 10 * t / sqrt((10 * t) ** 2 + 0.25) * x0

    per_image = []
    for i, (t, t_prev) in enumerate(zip(draws.t.tolist(), draws.t_prev.tolist(), strict=True)):
        assert t_prev == max(t - 20, 0)
        x = alpha(t) * batch.latents[i] + sigma(t) * eps[i]
        x_prev = guided_step(roles, x, t, t_prev, batch.cond.text[i], batch.uncond.text[0], float(g[i]))
        d = consistency("student", x, t, batch.cond.text[i]) - consistency("ema", x_prev, t_prev, batch.cond.text[i])
        per_image.append(float((torch.sqrt(d**2 + 1e-3**2) - 1e-3).mean()))
    assert float(loss.detach()) == pytest.approx(sum(per_image) / 6, rel=1e-3)


def test_tcd_is_its_papers_loss(roles: Roles, batch: Batch) -> None:
    loss = tcd.trajectory_consistency(batch, roles, seeded(), guidance=GUIDANCE, settings=TCDSettings()).student
    assert loss is not None
    rng = seeded()
    draws = draw_interval(6, 1, 1000, 50, rng)
    ends = tcd.draw_end(draws.t_prev, 20, rng)
    g, eps = draw_guidance(batch, GUIDANCE, rng), draw_noise(batch.latents, rng)
    per_image = []
    for i, (t, t_prev, s) in enumerate(zip(draws.t.tolist(), draws.t_prev.tolist(), ends.tolist(), strict=True)):
        x = alpha(t) * batch.latents[i] + sigma(t) * eps[i]
        x_prev = guided_step(roles, x, t, t_prev, batch.cond.text[i], batch.uncond.text[0], float(g[i]))
        target = ddim(x_prev, f(roles, "ema", x_prev, t_prev, batch.cond.text[i]), t_prev, s)
        per_image.append(float((ddim(x, f(roles, "student", x, t, batch.cond.text[i]), t, s) - target).square().mean()))
    assert float(loss.detach()) == pytest.approx(sum(per_image) / 6, rel=1e-3)


def test_tcd_ends_are_grid_points_up_to_t_prev() -> None:
    t_prev = torch.tensor([0, 19, 39, 979]).repeat_interleave(5000)
    ends = tcd.draw_end(t_prev, 20, seeded()).reshape(4, 5000)
    assert [row.unique().tolist() for row in ends[:3]] == [[0], [0, 19], [0, 19, 39]]
    assert ends[3].unique().tolist() == [0, *range(19, 980, 20)]


def test_a_perfect_student_has_no_loss(roles: Roles, batch: Batch) -> None:
    """With teacher, EMA and student the same map, x_hat = x when the span is empty: TSCD's and Lightning's zero."""
    roles.copy("student", "previous")
    span = lightning.draw_span(batch, roles, seeded(), 8, 8)  # the teacher's one step is the student's
    target = lightning.walk(batch, roles, span)
    torch.testing.assert_close(lightning.student_step(batch, roles, span), target)


def test_lightning_walks_the_previous_students_ddim(roles: Roles, batch: Batch) -> None:
    span = lightning.draw_span(batch, roles, seeded(), 8, 2)
    walked = lightning.walk(batch, roles, span)
    for i in range(6):
        x, stops = span.x[i], span.stops[i].tolist()
        for t, s in pairwise(stops):
            x = ddim(x, f(roles, "previous", x, t, batch.cond.text[i]), t, s)
        torch.testing.assert_close(walked[i], x, rtol=1e-3, atol=1e-3)


def test_at_the_start_lightning_sees_noise_alone(roles: Roles, batch: Batch) -> None:
    span = lightning.draw_span(batch, roles, seeded(), 2, 1)
    other = lightning.draw_span(replace(batch, z0=batch.latents + 5), roles, seeded(), 2, 1)
    assert torch.equal(span.x, other.x)
    rng = seeded()
    torch.randint(1, (6,), generator=rng)
    torch.testing.assert_close(span.x, sigma(999) * draw_noise(batch.latents, rng))


@pytest.mark.parametrize("conditional", [True, False])
def test_each_adversarial_loss_reaches_its_own_player(roles: Roles, batch: Batch, conditional: bool) -> None:
    roles.discriminator = Discriminator(roles, conditional)
    losses = lightning.adversarial(batch, roles, seeded(), before=4, n=2, settings=LightningSettings())
    assert losses.student is not None
    opponent = losses.opponents["discriminator"]
    student, heads = roles.parameters("student"), list(roles.discriminator.parameters())
    toward_heads = torch.autograd.grad(losses.student, heads, retain_graph=True, allow_unused=True)
    toward_student = torch.autograd.grad(opponent, student, retain_graph=True, allow_unused=True)
    assert all(gradient is None for gradient in (*toward_heads, *toward_student))
    assert any(bool(g.any()) for g in torch.autograd.grad(losses.student, student, allow_unused=True) if g is not None)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(opponent, heads))


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("name", sorted(registry.METHODS))
def test_every_method_has_the_same_budget(name: str, preset: str) -> None:
    method: Method = registry.resolve("method", name)()
    stages: tuple[Stage, ...] = method.stages(find_preset(preset))
    assert method.name == name
    assert sum(stage.images for stage in stages) == find_preset(preset).images
    assert all(stage.images > 0 and stage.images % find_preset(preset).batch_size == 0 for stage in stages)
    for values in ([stage.name for stage in stages], [stage.export for stage in stages]):
        assert len(set(values)) == len(values)


@pytest.mark.parametrize("student", ["lora", "unet"])
@pytest.mark.parametrize("name", sorted(registry.METHODS))
def test_every_method_can_be_sampled_at_1_2_4_and_8_steps(name: str, student: Kind) -> None:
    preset = replace(find_preset("pocket"), student=student)
    stages: tuple[Stage, ...] = registry.resolve("method", name)().stages(preset)
    published = [stage for stage in stages if "/" not in stage.export]
    assert {steps for stage in published for steps in stage.contract.timesteps} == {1, 2, 4, 8}
    for stage in published:
        assert sum(set(stage.contract.timesteps) == set(other.contract.timesteps) for other in published) == 1


def test_hyper_sd_samples_from_boundary_to_boundary() -> None:
    stages = {stage.name: stage for stage in hyper_sd.HyperSD().stages(find_preset("pocket"))}
    for k in (8, 4, 2, 1):
        t = torch.tensor(stages[f"{k}-segments"].contract.timesteps[k])
        assert segment_start(t + 1, k, 1000).tolist() == t.tolist()  # every step starts on a boundary


def test_shares_are_whole_batches_and_add_up() -> None:
    assert split_images(1000, 10, (1, 1, 2)) == (250, 250, 500)
    shares = split_images(130, 10, (4, 2, 1, 1) * 3)
    assert sum(shares) == 130
    assert min(shares) == 10


def test_too_few_images_for_the_stages_are_refused() -> None:
    with pytest.raises(InputError, match=r"too few for 13 stages; give at least 104"):
        lightning.Lightning().stages(replace(find_preset("pocket"), images=64, batch_size=8))
    with pytest.raises(InputError, match="64 would be"):
        Preset(name="mine", images=65, batch_size=8)
    with pytest.raises(InputError, match="4 images can't be accumulated in 3"):
        Preset(name="mine", images=64, batch_size=4, accumulate=3)


def test_an_unknown_preset_gets_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'pocket-demo'"):
        find_preset("pocketdemo")


def test_learning_rate_rises_then_falls_to_a_tenth() -> None:
    factors = [learning_rate_factor(step, 100, 0.05) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a >= b for a, b in pairwise(factors[5:]))
    assert factors[-1] == pytest.approx(0.1, abs=1e-3)
