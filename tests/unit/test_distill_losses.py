from __future__ import annotations

from math import exp, log, sqrt

import pytest
import torch
from diffusers import LCMScheduler

from distill.losses import boundary_scalings, discriminator_loss, generator_loss, mse, pseudo_huber


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


@pytest.mark.parametrize("loss", ["mse", "huber", "discriminator", "generator"])
def test_gradients_against_finite_differences(loss: str) -> None:
    a = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    b = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    functions = {
        "mse": lambda: torch.autograd.gradcheck(mse, (a, b)),
        "huber": lambda: torch.autograd.gradcheck(lambda x, y: pseudo_huber(x, y, 1e-3), (a, b)),
        "discriminator": lambda: torch.autograd.gradcheck(discriminator_loss, (a, b)),
        "generator": lambda: torch.autograd.gradcheck(generator_loss, (a,)),
    }
    assert functions[loss]()
