"""The PeRFlow sampler against closed forms."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from hypersd_bench.perflow import PeRFlowScheduler

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WINDOWS = [(1000, 750), (750, 500), (500, 250), (250, 0)]
INDICES = {1000: 999, 750: 749, 500: 499, 250: 249, 0: 0}  # of a window's boundary in diffusers' alphas_cumprod


def noise(seed: int) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stepped(scheduler: PeRFlowScheduler, t: int, x: Tensor, eps: Tensor) -> Tensor:
    after: Tensor = scheduler.step(eps, torch.tensor(t), x, return_dict=False)[0]
    return after


@pytest.mark.parametrize(
    ("steps", "timesteps"),
    [(4, [1000, 750, 500, 250]), (8, [1000, 875, 750, 625, 500, 375, 250, 125])],
)
def test_timesteps_are_spread_evenly_inside_each_window(steps: int, timesteps: list[int]) -> None:
    scheduler = PeRFlowScheduler(**SD)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == timesteps


@pytest.mark.parametrize("start", [1000, 750, 500, 250])
def test_one_step_through_a_window_is_the_ddim_step(start: int) -> None:
    # Four leading timesteps of diffusers' DDIM are 250 apart, and its last step goes to index 0.
    ddim = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False)
    ddim.set_timesteps(4)
    scheduler = PeRFlowScheduler(**SD)
    scheduler.set_timesteps(4)
    x, eps = noise(0), noise(1)
    expected = ddim.step(eps, INDICES[start], x).prev_sample
    torch.testing.assert_close(stepped(scheduler, start, x, eps), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_diff_eps_undoes_the_noise_that_was_added_from_the_windows_end_to_its_start(window: tuple[int, int]) -> None:
    start, end = window
    abar = DDPMScheduler(**SD).alphas_cumprod.double()
    ratio = abar[INDICES[start]] / abar[INDICES[end]]
    clean, eps = noise(2), noise(3)
    noisy = ratio.sqrt() * clean + (1 - ratio).sqrt() * eps
    scheduler = PeRFlowScheduler(**SD, prediction_type="diff_eps")
    scheduler.set_timesteps(4)
    torch.testing.assert_close(stepped(scheduler, start, noisy, eps), clean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["ddim_eps", "diff_eps"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_with_the_windows_own_eps_many_steps_walk_the_straight_line(
    window: tuple[int, int], prediction_type: str
) -> None:
    start, end = window
    scheduler = PeRFlowScheduler(**SD, prediction_type=prediction_type)
    begin, eps = noise(4), noise(5)
    scheduler.set_timesteps(4)
    final = stepped(scheduler, start, begin, eps)
    scheduler.set_timesteps(20)
    x = begin
    for t in [int(t) for t in scheduler.timesteps if end < t <= start]:
        u = (start - t) / 250
        torch.testing.assert_close(x, (1 - u) * begin + u * final, rtol=0, atol=1e-9)
        x = stepped(scheduler, t, x, eps)
    torch.testing.assert_close(x, final, rtol=0, atol=1e-9)


def test_the_two_predictions_differ_and_plain_epsilon_is_the_ddim_one() -> None:
    x, eps = noise(6), noise(7)
    found = {}
    for prediction_type in ("ddim_eps", "diff_eps", "epsilon"):
        scheduler = PeRFlowScheduler(**SD, prediction_type=prediction_type)
        scheduler.set_timesteps(8)
        found[prediction_type] = stepped(scheduler, 625, x, eps)
    assert torch.equal(found["epsilon"], found["ddim_eps"])
    assert (found["ddim_eps"] - found["diff_eps"]).abs().max() > 0.1


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_steps_that_the_windows_cant_share_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="no multiple of the 4 time windows"):
        PeRFlowScheduler(**SD).set_timesteps(steps)


@pytest.mark.parametrize("settings", [{"prediction_type": "velocity"}, {"num_time_windows": 3}])
def test_settings_that_no_model_was_trained_with_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"velocity|3 windows"):
        PeRFlowScheduler(**SD, **settings)


def test_it_is_a_diffusers_scheduler() -> None:
    scheduler = PeRFlowScheduler(**SD, num_time_windows=2)
    again = PeRFlowScheduler.from_config(scheduler.config)
    assert again.config.num_time_windows == 2
    assert scheduler.init_noise_sigma == 1
    x = noise(8)
    assert scheduler.scale_model_input(x, 1000) is x
    scheduler.set_timesteps(2)
    assert torch.equal(scheduler.step(x, 1000, x).prev_sample, scheduler.step(x, 1000, x, return_dict=False)[0])
