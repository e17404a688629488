"""Human feedback on what the student makes: rewards and instance masks judge decoded pixels, with gradient.

    L_aes      = E ReLU(alpha_d - r_d(x0', c))            Hyper-SD 2404.13686, eq. 13; summed over rewards by weight
    L_percep   = L_instance(m_I(x0'), GT(x0))             eq. 14, by a segmenter's own loss

Rewards that are not optimised are logged beside those that are: when they fall while the others rise, the student has
learned to please its judges and not people.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from distill.batch import Instances
from distill.losses import reward_hinge
from distill.rewards.contract import Reward, Segmenter
from hypersd_bench import registry
from hypersd_bench.contracts import MetricContext
from hypersd_bench.errors import unknown_name
from hypersd_bench.pipelines import to_uint8

EXTREME = 0.98  # of [-1, 1]: a channel value beyond it counts as saturated

Watcher = Callable[[Tensor, Sequence[str]], Tensor]


class Feedback:
    """The judges of a stage, and the decoder they look through."""

    def __init__(
        self, vae: AutoencoderKL, rewards: Sequence[str], watched: Sequence[str], segmenter: str | None,
        checkpointing: bool = False,
    ) -> None:  # fmt: skip
        device = torch.device(vae.device)
        if checkpointing:  # at 1024 pixels the decoder's activations are larger than the UNet's
            vae.enable_gradient_checkpointing()
        self._vae = vae
        self.rewards: list[Reward] = [registry.resolve("reward", name)(device) for name in rewards]
        self._watched = {name: _watcher(name, device) for name in watched if name not in rewards}
        self._segmenter: Segmenter | None = registry.resolve("segmenter", segmenter)(device) if segmenter else None

    @property
    def trains(self) -> tuple[str, ...]:
        """The metrics that a student of these rewards counts as trained on."""
        return tuple(dict.fromkeys(metric for reward in self.rewards for metric in reward.info.trains))

    def decode(self, x0: Tensor) -> Tensor:
        """Clean latents (B, C, h, w) to pixels (B, 3, H, W) float32 in [0, 1], with gradient."""
        z = x0 / self._vae.config.scaling_factor
        with torch.autocast(x0.device.type, enabled=x0.device.type == "cpu"):  # SDXL's autoencoder overflows in fp16
            pixels = self._vae.decode(z.to(self._vae.dtype), return_dict=False)[0]
        decoded: Tensor = (pixels.float() / 2 + 0.5).clamp(0, 1)
        return decoded

    def judge(self, x0: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """L_aes of clean latents for their prompts, and what to log: every reward's mean, and saturation."""
        pixels = self.decode(x0)
        loss, logs = pixels.new_zeros(()), {"saturation": _saturation(pixels), "contrast": pixels.detach().std()}
        for reward in self.rewards:
            values = reward(pixels, prompts)
            loss = loss + reward.info.weight * reward_hinge(values, reward.info.hinge)
            logs[f"reward/{reward.info.id}"] = values.detach().mean()
        with torch.no_grad():
            for name, watcher in self._watched.items():
                logs[f"held_out/{name}"] = watcher(pixels.detach(), prompts).mean()
        return loss, logs

    def perceptual(self, x0: Tensor, instances: Sequence[Instances], seed: int) -> Tensor:
        """L_percep of clean latents that should show these instances; seed: of what the segmenter draws."""
        assert self._segmenter is not None, "the stage names no segmenter"
        loss: Tensor = self._segmenter.loss(self.decode(x0), instances, seed)
        return loss


def _watcher(name: str, device: torch.device) -> Watcher:
    """A reward, or any image metric of the benchmark, as something to look at and not to follow."""
    if name in registry.rows("reward"):
        reward: Watcher = registry.resolve("reward", name)(device)
        return reward
    if name not in registry.rows("metric"):
        raise unknown_name("reward or metric", name, [*registry.rows("reward"), *registry.rows("metric")])
    metric: Any = registry.resolve("metric", name)(MetricContext(str(device)))
    return lambda pixels, prompts: torch.from_numpy(metric.score(to_uint8(pixels), prompts))


def _saturation(pixels: Tensor) -> Tensor:
    """Share of channel values that are as good as black or full."""
    return ((2 * pixels.detach() - 1).abs() > EXTREME).float().mean()
