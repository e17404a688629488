"""The noise schedule in the papers' letters: x_t = alpha_t z0 + sigma_t eps, and the DDIM step.

A timestep is an integer 0 .. T-1. Timestep -1 is the clean end, where diffusers' DDIM arrives with its last step:
abar_0 when the scheduler has ``set_alpha_to_one=False``, else alpha = 1, sigma = 0 (as Euler's sigma = 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from hypersd_bench.errors import InputError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class NoiseSchedule:
    """Tables of alpha and sigma, and what the network's output means.

    alphas, sigmas: (T + 1,) float64; the last entry, which is also index -1, is the clean end.
    """

    alphas: Tensor
    sigmas: Tensor
    prediction_type: str = "epsilon"

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], set_alpha_to_one: bool = False, device: torch.device | str = "cpu"
    ) -> NoiseSchedule:
        """Build the tables from a diffusers scheduler config; raises InputError for a flow-matching base."""
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in PREDICTION_TYPES or "beta_schedule" not in config:
            raise InputError(
                f"the base predicts {prediction_type!r} on {config.get('_class_name', 'its')} noise schedule; "
                f"distillation needs a diffusion schedule (betas) and one of {', '.join(PREDICTION_TYPES)}"
            )
        kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        scheduler = DDIMScheduler(
            **{key: config[key] for key in kept if key in config}, set_alpha_to_one=set_alpha_to_one
        )
        abar = torch.cat([scheduler.alphas_cumprod, scheduler.final_alpha_cumprod.reshape(1)]).double()
        return cls(abar.sqrt().to(device), (1 - abar).sqrt().to(device), prediction_type)

    @property
    def num_train_timesteps(self) -> int:
        """T, 1000 for Stable Diffusion."""
        return len(self.alphas) - 1

    def alpha(self, t: Tensor) -> Tensor:
        """alpha at timesteps (B,), as (B, 1, 1, 1) float64."""
        return self.alphas[t].reshape(-1, 1, 1, 1)

    def sigma(self, t: Tensor) -> Tensor:
        """sigma at timesteps (B,), as (B, 1, 1, 1) float64."""
        return self.sigmas[t].reshape(-1, 1, 1, 1)

    def add_noise(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t z0 + sigma_t eps, all (B, C, h, w)."""
        return self.alpha(t).to(z0.dtype) * z0 + self.sigma(t).to(z0.dtype) * eps

    def ddim(self, x: Tensor, eps: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """DDIM(x, eps, t->s) = alpha_s (x - sigma_t eps) / alpha_t + sigma_s eps (Song et al. 2010.02502, eq. 12).

        The two coefficients are formed in float64: their difference cancels when s is near t.
        """
        ratio = self.alpha(s) / self.alpha(t)
        shift = self.sigma(s) - ratio * self.sigma(t)
        return ratio.to(x.dtype) * x + shift.to(x.dtype) * eps

    def x0(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The clean latent that eps implies: (x - sigma_t eps) / alpha_t."""
        return (x - self.sigma(t).to(x.dtype) * eps) / self.alpha(t).to(x.dtype)

    def eps(self, output: Tensor, x: Tensor, t: Tensor, prediction_type: str | None = None) -> Tensor:
        """The noise that a network output (B, C, h, w) at (x, t) implies, for any prediction type, or the base's."""
        kind = prediction_type or self.prediction_type
        if kind == "epsilon":
            return output
        alpha, sigma = self.alpha(t).to(x.dtype), self.sigma(t).to(x.dtype)
        if kind == "v_prediction":  # v = alpha eps - sigma x0
            return alpha * output + sigma * x
        return (x - alpha * output) / sigma
