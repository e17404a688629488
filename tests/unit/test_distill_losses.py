from __future__ import annotations

from collections.abc import Callable
from math import exp, log, sqrt

import pytest
import torch
from diffusers import LCMScheduler
from torch import Tensor

from distill.losses import (
    boundary_scalings,
    discriminator_loss,
    distribution_matching,
    generator_loss,
    mse,
    pseudo_huber,
    reward_hinge,
)


def test_mse_is_the_mean_square() -> None:
    assert float(mse(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]))) == pytest.approx((1 + 4) / 2)


def test_pseudo_huber_by_hand() -> None:
    # sqrt(3^2 + 4^2) - 4 = 1; sqrt(0 + 4^2) - 4 = 0
    assert float(pseudo_huber(torch.tensor([3.0, 1.0]), torch.tensor([0.0, 1.0]), c=4.0)) == pytest.approx(0.5)


def test_pseudo_huber_is_quadratic_near_and_linear_far() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    assert float(pseudo_huber(zero + 1e-3, zero, c=1.0)) == pytest.approx(1e-6 / 2, rel=1e-5)
    assert float(pseudo_huber(zero + 1e6, zero, c=1.0)) == pytest.approx(1e6 - 1, rel=1e-9)


def test_scalings_equal_diffusers() -> None:
    scheduler = LCMScheduler()
    for t in (0, 19, 499, 999):
        c_skip, c_out = boundary_scalings(torch.tensor([t]))
        theirs = scheduler.get_scalings_for_boundary_condition_discrete(t)
        assert float(c_skip) == pytest.approx(float(theirs[0]), rel=1e-9)
        assert float(c_out) == pytest.approx(float(theirs[1]), rel=1e-9)


def test_scalings_keep_the_boundary() -> None:
    c_skip, c_out = boundary_scalings(torch.tensor([0, 1]))
    assert c_skip.flatten().tolist() == pytest.approx([1.0, 0.25 / 100.25])
    assert c_out.flatten().tolist() == pytest.approx([0.0, 10 / sqrt(100.25)])


def test_adversarial_losses_are_the_papers_logarithms() -> None:
    real, fake = torch.tensor([0.3, -1.2]), torch.tensor([2.0, -0.7])

    def p(logit: float) -> float:
        return 1 / (1 + exp(-logit))

    d = -(log(p(0.3)) + log(p(-1.2))) / 2 - (log(1 - p(2.0)) + log(1 - p(-0.7))) / 2
    assert float(discriminator_loss(real, fake)) == pytest.approx(d, rel=1e-6)
    assert float(generator_loss(fake)) == pytest.approx(-(log(p(2.0)) + log(p(-0.7))) / 2, rel=1e-6)


def test_no_one_can_tell_is_two_log_two() -> None:
    assert float(discriminator_loss(torch.zeros(5), torch.zeros(5))) == pytest.approx(2 * log(2))


def test_the_hinge_is_equation_13() -> None:
    rewards = torch.tensor([3.0, 5.5, 6.0, 9.0], requires_grad=True)
    loss = reward_hinge(rewards, alpha=6.0)
    assert float(loss.detach()) == pytest.approx((3.0 + 0.5 + 0 + 0) / 4)
    loss.backward()
    assert rewards.grad is not None
    assert rewards.grad.tolist() == [-0.25, -0.25, 0.0, 0.0]  # past the hinge nothing pulls any more


def doubles(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


LOSSES: dict[str, tuple[Callable[..., Tensor], int]] = {
    "mse": (mse, 2),
    "huber": (lambda x, y: pseudo_huber(x, y, 1e-3), 2),
    "discriminator": (discriminator_loss, 2),
    "generator": (generator_loss, 1),
    "hinge": (lambda r: reward_hinge(r, 0.3), 1),
    "consistency": (lambda x, x0: mse(scaled(x, 0), scaled(x0, 1)), 2),
}


def scaled(x: Tensor, which: int) -> Tensor:
    return boundary_scalings(torch.tensor([0, 19, 999]))[which] * x


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_against_finite_differences(name: str) -> None:
    function, arguments = LOSSES[name]
    shape = (3, 2, 2, 2) if name == "consistency" else (6,)
    assert torch.autograd.gradcheck(function, tuple(doubles(*shape, seed=seed) for seed in range(arguments)))


def test_the_gradient_of_distribution_matching_is_the_papers() -> None:
    x, real, fake = (doubles(3, 2, 4, 4, seed=seed) for seed in range(3))
    loss = distribution_matching(x, real, fake)
    (gradient,) = torch.autograd.grad(loss, x)
    p_real, p_fake = (x - real).detach(), (x - fake).detach()
    for i in range(3):
        by_hand = (p_real[i] - p_fake[i]) / p_real[i].abs().mean()
        torch.testing.assert_close(gradient[i], by_hand / x.numel())  # of a mean over all values
    assert all(
        g is None for g in torch.autograd.grad(distribution_matching(x, real, fake), (real, fake), allow_unused=True)
    )


def test_distribution_matching_against_finite_differences_of_its_frozen_target() -> None:
    """The loss is quadratic about a target that autograd must not see: central differences with the target held."""
    x, real, fake = (doubles(1, 1, 2, 2, seed=seed).detach() for seed in range(3))
    target = x - (fake - real) / (x - real).abs().mean()

    def held(at: Tensor) -> Tensor:
        return 0.5 * (at - target).square().mean()

    (gradient,) = torch.autograd.grad(distribution_matching(x.requires_grad_(), real, fake), x)
    x, step = x.detach(), 1e-6
    for place in range(4):
        nudge = step * torch.eye(4, dtype=torch.float64)[place].reshape(1, 1, 2, 2)
        slope = float(held(x + nudge) - held(x - nudge)) / (2 * step)
        assert float(gradient.flatten()[place]) == pytest.approx(slope, rel=1e-6)


def test_agreeing_scores_and_a_perfect_teacher_give_no_gradient() -> None:
    x, real = doubles(2, 1, 2, 2), doubles(2, 1, 2, 2, seed=1).detach()
    for teacher, critic in ((real, real), (x.detach(), real)):  # the second divides by zero
        (gradient,) = torch.autograd.grad(distribution_matching(x, teacher, critic), x)
        assert bool(gradient.isfinite().all())
    (gradient,) = torch.autograd.grad(distribution_matching(x, real, real), x)
    assert not bool(gradient.any())
