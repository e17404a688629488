"""Feedback: the sum of hinges, what is watched and what is followed; the scoreboard's rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from distill.batch import Instances
from distill.feedback import Feedback
from distill.methods.tcd import TCD
from distill.pictures import write_grid
from distill.presets import find_preset
from distill.rewards.contract import RewardInfo
from distill.roles import Roles
from distill.schedule import NoiseSchedule
from distill.scoreboard import Scoreboard, any_steps, means
from hypersd_bench import registry
from hypersd_bench.errors import InputError
from hypersd_bench.pipelines import load_base
from hypersd_bench.pocket.prompts import TRAIN
from hypersd_bench.sampling import ddim_trailing, skipping, tcd, trailing
from tests.tiny_base import make_tiny_base


class Brightness:
    """A reward in closed form: the mean of all pixels."""

    info = RewardInfo("toy/brightness", "Brightness", hinge=0.75, weight=2.0, trains=("toy/brightness",))

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return pixels.mean((1, 2, 3))


class Redness(Brightness):
    """Another: the mean of the red channel."""

    info = RewardInfo("toy/redness", "Redness", hinge=0.5, weight=1.0, trains=("toy/redness", "toy/colour"))

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return pixels[:, 0].mean((1, 2))


class Emptiness:
    """A segmenter in closed form: how bright the pixels under the masks are."""

    id = "toy"

    def loss(self, pixels: Tensor, instances: Sequence[Instances], seed: int = 0) -> Tensor:
        return torch.stack([pixels[i, :, each.masks.any(0)].mean() for i, each in enumerate(instances)]).mean() + seed


@pytest.fixture
def _toys(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, toy in (("toy/brightness", Brightness), ("toy/redness", Redness)):
        monkeypatch.setitem(registry.REWARDS, name, f"{__name__}:{toy.__name__}")
    monkeypatch.setitem(registry.SEGMENTERS, "toy", f"{__name__}:Emptiness")
    monkeypatch.setattr(registry, "resolve", lambda kind, name, where="": lambda device: TOYS[name]())
    registry.rows.cache_clear()
    yield
    registry.rows.cache_clear()


TOYS: dict[str, Any] = {"toy/brightness": Brightness, "toy/redness": Redness, "toy": Emptiness}


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return (
        AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, scaling_factor=0.5,
        )
        .eval()
        .requires_grad_(False)
    )  # fmt: skip


@pytest.mark.usefixtures("_toys")
def test_the_loss_is_the_weighted_sum_of_hinges_and_reaches_the_latents(vae: AutoencoderKL) -> None:
    feedback = Feedback(vae, ["toy/brightness", "toy/redness"], [], None)
    x0 = torch.randn(3, 4, 8, 8, requires_grad=True)
    loss, logs = feedback.judge(x0, ["a"] * 3)
    pixels = (vae.decode(x0.detach() / 0.5).sample / 2 + 0.5).clamp(0, 1)
    hinges = [2.0 * (0.75 - pixels.mean((1, 2, 3))), 0.5 - pixels[:, 0].mean((1, 2))]
    torch.testing.assert_close(loss.detach(), sum(torch.relu(h).mean() for h in hinges), atol=2e-2, rtol=0.05)
    loss.backward()
    assert x0.grad is not None
    assert bool(x0.grad.abs().sum() > 0)
    assert set(logs) == {"saturation", "contrast", "reward/toy/brightness", "reward/toy/redness"}
    assert feedback.trains == ("toy/brightness", "toy/redness", "toy/colour")


@pytest.mark.usefixtures("_toys")
def test_what_is_watched_is_logged_and_never_followed(vae: AutoencoderKL) -> None:
    x0 = torch.randn(2, 4, 8, 8)
    alone, _ = Feedback(vae, ["toy/brightness"], [], None).judge(x0, ["a", "b"])
    watched = Feedback(vae, ["toy/brightness"], ["toy/redness", "toy/brightness"], None)
    loss, logs = watched.judge(x0, ["a", "b"])
    assert torch.equal(loss, alone)
    assert "held_out/toy/redness" in logs
    assert "held_out/toy/brightness" not in logs  # what is followed is not held out
    assert watched.trains == ("toy/brightness",)


@pytest.mark.usefixtures("_toys")
def test_the_perceptual_reward_sees_decoded_pixels_and_its_seed(vae: AutoencoderKL) -> None:
    feedback = Feedback(vae, [], [], "toy")
    masks = torch.zeros(1, 16, 16, dtype=torch.bool)
    masks[0, :8] = True
    instances = [Instances(torch.tensor([1]), masks, torch.tensor([[0.0, 0.0, 16.0, 8.0]]))] * 2
    x0 = torch.randn(2, 4, 8, 8, requires_grad=True)
    loss = feedback.perceptual(x0, instances, seed=3)
    torch.testing.assert_close(loss.detach(), feedback.decode(x0)[:, :, :8].detach().mean() + 3)
    loss.backward()
    assert x0.grad is not None


def test_a_watched_name_that_nobody_knows_is_one_line(vae: AutoencoderKL) -> None:
    with pytest.raises(InputError, match="did you mean 'concept/pocket'"):
        Feedback(vae, [], ["concept/poket"], None)


# The scoreboard


def test_any_step_count_can_be_looked_at_in_the_contracts_own_spacing() -> None:
    two = any_steps(ddim_trailing((2,)))
    assert two.timesteps == {steps: trailing(steps) for steps in (1, 2, 4, 8)}
    assert any_steps(tcd((4,))).timesteps[8] == skipping(8)
    odd = replace(ddim_trailing((1,)), timesteps={1: (800,)})
    assert any_steps(odd).timesteps[1] == (800,)  # what it says itself stays


def test_a_look_compares_the_student_with_the_teacher_on_the_same_noise(tmp_path: Path) -> None:
    pipe = load_base(str(make_tiny_base(tmp_path / "base")))
    roles = Roles(pipe.unet, NoiseSchedule.from_config(pipe.scheduler.config, set_alpha_to_one=True), rank=2)
    board = Scoreboard(
        pipe, roles, tmp_path, TRAIN.load().prompts[:2], ["aesthetic/pocket", "aesthetic/laion-v2"], 1.0, 0.001
    )
    stage = TCD().stages(find_preset("tiny"))[0]
    rows = board.look(stage, images_seen=64)
    assert [(row["model"], row["steps"]) for row in rows] == [("teacher", 25), *(("student", n) for n in (1, 2, 4, 8))]
    assert [json.loads(line) for line in (tmp_path / "scoreboard.jsonl").read_text().splitlines()] == rows
    assert all(row["supported"] and row["n"] == 4 and row["images_seen"] == 64 for row in rows)
    assert means(rows).keys() == {f"{r['model']}@{r['steps']}/aesthetic/pocket" for r in rows}
    assert "aesthetic/laion-v2" in board.missing  # its weights are not here: missing with a reason, not zero
    assert (tmp_path / "samples" / f"{stage.name}-64.png").exists()
    assert board.grid.shape == (1, 5 * 64, 2 * 64, 3)
    assert not board.due  # looking may take 5 % of the time


def test_a_grid_is_read_row_by_row(tmp_path: Path) -> None:
    from PIL import Image

    rows = [torch.full((2, 3, 4, 4), 10 * i, dtype=torch.uint8) for i in range(3)]
    write_grid(tmp_path / "grid.png", rows)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (12, 8, 3)
    assert [int(value) for value in grid[::4, 0, 0]] == [0, 10, 20]
    assert np.ptp(grid[4:8]) == 0
