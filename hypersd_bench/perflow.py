"""The sampler of piecewise rectified flow (PeRFlow, arXiv 2405.07510), which diffusers lacks.

Time runs from T to 0 in windows of equal length. Inside one, from t_s down to t_e, the flow is a straight line,

    z_t = (1 - u) z_s + u z_e,   u = (t_s - t) / (t_s - t_e),

and the UNet's eps ties its two ends together, in one of two ways:

    ddim_eps:  z_e = (alpha_e / alpha_s) (z_s - sigma_s eps) + sigma_e eps     the DDIM step from t_s to t_e
    diff_eps:  z_s = (alpha_s / alpha_e) z_e + sqrt(1 - (alpha_s / alpha_e)^2) eps   the noise added from t_e to t_s

Both are z_e = lambda z_s + eta eps; with z_s taken from the line,

    z_e = (lambda z_t + (1 - u) eta eps) / (1 - u + lambda u),

the velocity is (z_e - z_t) / (t_e - t), and a step is Euler's, exact to the end of the window where eps is.

Conventions are those of magic-research/piecewise-rectified-flow: timesteps count from 1 to T, the UNet is told them so,
and alpha at time t is that of index t - 1 (index 0 at t = 0).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

PREDICTION_TYPES = ("ddim_eps", "diff_eps", "epsilon")


class PeRFlowScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # diffusers has no types
    """Euler steps along the straight flow of each time window.

    num_time_windows: windows that the model was trained with; they divide num_train_timesteps. prediction_type:
    ``ddim_eps`` or ``diff_eps``; ``epsilon``, of a UNet that was not trained for this, is taken as ``ddim_eps``. The
    noise schedule's settings are those of diffusers' schedulers.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "ddim_eps",
        num_time_windows: int = 4,
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type {prediction_type!r} is none of {', '.join(PREDICTION_TYPES)}")
        if num_train_timesteps % num_time_windows:
            raise ValueError(f"{num_time_windows} windows don't divide {num_train_timesteps} timesteps")
        schedule = DDPMScheduler(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas)
        self.alphas_cumprod: Tensor = schedule.alphas_cumprod
        self.timesteps = torch.arange(num_train_timesteps, 0, -1)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set timesteps evenly inside each window; raises ValueError for steps that the windows can't share evenly."""
        windows, total = self.config.num_time_windows, self.config.num_train_timesteps
        if num_inference_steps < 1 or num_inference_steps % windows:
            raise ValueError(f"{num_inference_steps} steps are no multiple of the {windows} time windows")
        timesteps = [total - i * total // num_inference_steps for i in range(num_inference_steps)]
        self.timesteps = torch.tensor(timesteps, device=device)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        return_dict: bool = True,
        generator: Any = None,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take the step from ``timestep``, one of the timesteps set, to the next; nothing random is in it.

        model_output: eps, guided or not; with ``sample`` (N, C, h, w). Returns the next sample.
        """
        t = int(timestep)
        start, end = self._window(t)
        scale, noise = self._ends(start, end)
        u = (start - t) / (start - end)
        at_end = (scale * sample + (1 - u) * noise * model_output) / (1 - u + scale * u)
        velocity = (at_end - sample) / (end - t)
        after = sample + (self._next(t) - t) * velocity
        return SchedulerOutput(prev_sample=after) if return_dict else (after,)

    def _window(self, t: int) -> tuple[int, int]:
        """Start and end of a timestep's window; a boundary belongs to the window that it starts."""
        length = self.config.num_train_timesteps // self.config.num_time_windows
        end = (t - 1) // length * length
        return end + length, end

    def _ends(self, start: int, end: int) -> tuple[float, float]:
        """Lambda and eta of a window: z_e = lambda z_s + eta eps."""
        at_start, at_end = (float(self.alphas_cumprod[max(t - 1, 0)]) for t in (start, end))
        scale = (at_end / at_start) ** 0.5
        if self.config.prediction_type == "diff_eps":
            return scale, -((at_end / at_start - 1) ** 0.5)
        return scale, (1 - at_end) ** 0.5 - scale * (1 - at_start) ** 0.5

    def _next(self, t: int) -> int:
        later = [int(timestep) for timestep in self.timesteps if timestep < t]
        return max(later, default=0)
