"""Losses: tensors in, scalars out; no network, no schedule, no state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA_DATA = 0.5  # LCM, as in consistency models 2303.01469, appendix C
TIMESTEP_SCALING = 10.0  # LCM's released code; diffusers' LCMScheduler.timestep_scaling


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of d^2 over everything, d = prediction - target."""
    return F.mse_loss(prediction, target)


def pseudo_huber(prediction: Tensor, target: Tensor, c: float) -> Tensor:
    """Mean of sqrt(d^2 + c^2) - c: quadratic below c, linear above (2310.14189, section 3.3)."""
    return (torch.sqrt((prediction - target).square() + c * c) - c).mean()


def boundary_scalings(t: Tensor) -> tuple[Tensor, Tensor]:
    """LCM's c_skip and c_out at timesteps (B,), each (B, 1, 1, 1) float64; c_skip(0) = 1 and c_out(0) = 0.

    c_skip = sd^2 / ((10 t)^2 + sd^2), c_out = 10 t / sqrt((10 t)^2 + sd^2), sd = 0.5 (2310.04378, appendix).
    """
    scaled = TIMESTEP_SCALING * t.double().reshape(-1, 1, 1, 1)
    norm = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / norm, scaled / norm.sqrt()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """L_D = -log p_real - log(1 - p_fake), p = sigmoid(logit) (SDXL-Lightning 2402.13929, eq. 4)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """L_G = -log p_fake, non-saturating (SDXL-Lightning 2402.13929, eq. 5)."""
    return F.softplus(-fake_logits).mean()


def reward_hinge(rewards: Tensor, alpha: float) -> Tensor:
    """Mean of ReLU(alpha_d - r_d(x0', c)): no gradient past alpha_d (Hyper-SD 2404.13686, eq. 13)."""
    return F.relu(alpha - rewards).mean()


def distribution_matching(x: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """A scalar whose gradient in x (B, C, h, w) is that of KL(fake || real), normalised (DMD 2311.18828, eqs. 7, 8).

    With p_real = x - x0_real and p_fake = x - x0_fake, grad = (p_real - p_fake) / mean|p_real|, by image; a grad that
    is no number counts as none. L = 0.5 mean (x - stopgrad(x - grad))^2, DMD2's scale (2405.14867, released code).
    """
    with torch.no_grad():
        p_real, p_fake = x - x0_real, x - x0_fake
        grad = torch.nan_to_num((p_real - p_fake) / p_real.abs().mean((1, 2, 3), keepdim=True))
    return 0.5 * F.mse_loss(x, (x - grad).detach())
