from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, TCDScheduler

from distill.schedule import NoiseSchedule
from hypersd_bench.errors import InputError
from hypersd_bench.sampling import skipping, trailing

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def latents(seed: int, n: int = 4) -> torch.Tensor:
    return torch.randn(n, 4, 2, 2, generator=torch.Generator().manual_seed(seed))


def at(*timesteps: int) -> torch.Tensor:
    return torch.tensor(timesteps)


def test_abar_is_stable_diffusions() -> None:
    schedule = NoiseSchedule.from_config(SD)
    abar = schedule.alphas.square()
    # Hyper-SD's schedule: abar_0 .99915, abar_249 .67543, abar_499 .27767, abar_800 .03687, abar_999 .00466
    for t, value in {0: 0.99915, 249: 0.67543, 499: 0.27767, 800: 0.03687, 999: 0.00466}.items():
        assert float(abar[t]) == pytest.approx(value, abs=6e-6)
    assert schedule.num_train_timesteps == 1000


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 25])
def test_ddim_steps_equal_diffusers_down_to_the_clean_end(steps: int, set_alpha_to_one: bool) -> None:
    scheduler = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=set_alpha_to_one, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    schedule = NoiseSchedule.from_config(SD, set_alpha_to_one=set_alpha_to_one)
    timesteps = trailing(steps)
    for t, s in zip(timesteps, (*timesteps[1:], -1), strict=True):
        x, eps = latents(t), latents(t + 1)
        theirs = scheduler.step(eps, t, x, return_dict=False)[0]
        ours = schedule.ddim(x, eps, at(t).expand(4), at(s).expand(4))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_ddim_equals_a_tcd_step_without_noise() -> None:
    scheduler = TCDScheduler(**SD, set_alpha_to_one=False)
    timesteps = skipping(8)
    scheduler.set_timesteps(timesteps=list(timesteps))
    schedule = NoiseSchedule.from_config(SD)
    for t, s in zip(timesteps, (*timesteps[1:], 0), strict=True):
        x, eps = latents(t), latents(t + 1)
        theirs = scheduler.step(eps, t, x, eta=0.0, return_dict=False)[0]
        torch.testing.assert_close(schedule.ddim(x, eps, at(t), at(s)), theirs, rtol=1e-5, atol=1e-6)


def test_ddim_of_no_span_is_the_identity() -> None:
    schedule = NoiseSchedule.from_config(SD)
    x = latents(0)
    t = at(0, 19, 499, 999)
    assert torch.equal(schedule.ddim(x, latents(1), t, t), x)


def test_exact_noise_walks_back_to_the_clean_latent() -> None:
    schedule = NoiseSchedule.from_config(SD, set_alpha_to_one=True)
    z0, eps, t = latents(0), latents(1), at(19, 259, 499, 999)
    x = schedule.add_noise(z0, eps, t)
    torch.testing.assert_close(schedule.x0(x, eps, t), z0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(schedule.ddim(x, eps, t, at(-1, -1, -1, -1)), z0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_type_means_the_same_noise(prediction_type: str) -> None:
    scheduler = DDIMScheduler(**SD, prediction_type=prediction_type)
    schedule = NoiseSchedule.from_config(scheduler.config)
    z0, eps, t = latents(0), latents(1), at(19, 259, 499, 999)
    x = schedule.add_noise(z0, eps, t)
    outputs = {"epsilon": eps, "v_prediction": scheduler.get_velocity(z0, eps, t), "sample": z0}
    torch.testing.assert_close(schedule.eps(outputs[prediction_type], x, t), eps, rtol=1e-3, atol=2e-5)


def test_a_flow_matching_base_is_refused() -> None:
    with pytest.raises(InputError, match="diffusion schedule"):
        NoiseSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000})
