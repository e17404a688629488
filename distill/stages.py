"""What a method hands to the loop: its stages, and the losses of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from distill.presets import Preset
from distill.roles import Roles
from hypersd_bench.errors import InputError
from hypersd_bench.sampling import SamplerContract


class Batch(NamedTuple):
    """Latents z0 (B, C, h, w), their captions' embeddings text (B, L, d), the empty prompt's empty (1, L, d)."""

    z0: Tensor
    text: Tensor
    empty: Tensor


class Losses(NamedTuple):
    """The student's loss, the discriminator's if there is one, and figures worth logging; all scalars."""

    student: Tensor
    discriminator: Tensor | None = None
    logs: Mapping[str, Tensor] = {}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of training that starts from the student of the stage before, with a fresh optimizer and EMA.

    images: training images the stage sees. export: file name without ending, relative to the run's folder, under
    which the stage's student is written with ``contract``. new_previous: whether ``previous`` becomes a copy of the
    student as the stage starts. discriminator: makes the stage's discriminator from the UNet, with a rate of its own.
    """

    name: str
    images: int
    learning_rate: float
    contract: SamplerContract
    export: str
    losses: Callable[[Batch, Roles, torch.Generator], Losses]
    betas: tuple[float, float] = (0.9, 0.999)
    new_previous: bool = False
    discriminator: Callable[[UNet2DConditionModel], nn.Module] | None = None
    discriminator_learning_rate: float = 0.0


class Method(Protocol):
    """A distillation method: its registry name and its stages under a preset."""

    name: str

    def stages(self, preset: Preset) -> tuple[Stage, ...]:
        """The stages in order; their images add up to ``preset.images``."""
        ...


def split_images(total: int, batch_size: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Share out ``total`` images by weight in whole batches, at least one each; any rest goes to the last share."""
    num_batches = total // batch_size
    if num_batches < len(weights):
        raise InputError(
            f"{total} images in batches of {batch_size} are too few for {len(weights)} stages; "
            f"give at least {len(weights) * batch_size}"
        )
    scale = (num_batches - len(weights)) / sum(weights)
    batches = [1 + int(weight * scale) for weight in weights]
    batches[-1] += num_batches - sum(batches)
    return tuple(count * batch_size for count in batches)


def draw_noise(like: Tensor, rng: torch.Generator) -> Tensor:
    """Standard normal noise in the shape and place of ``like``, drawn on the CPU: the same on every device."""
    return torch.randn(like.shape, generator=rng).to(like.device)


def draw_guidance(batch: Batch, guidance: tuple[float, float], rng: torch.Generator) -> Tensor:
    """Guidance scales g (B,), uniform in the range."""
    low, high = guidance
    return (low + (high - low) * torch.rand(len(batch.z0), generator=rng)).to(batch.z0.device)
