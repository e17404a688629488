"""A tiny random cast and batch in Stable Diffusion 1.5's layout, for tests of roles and losses."""

from __future__ import annotations

import copy
from functools import cache

import torch
from diffusers import UNet2DConditionModel

from distill.batch import Batch, Condition
from distill.roles import Adapter, Kind, Roles
from distill.schedule import NoiseSchedule

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (4, 8, 8)  # of a latent


def tiny_unet() -> UNet2DConditionModel:
    """Always the same random UNet of two blocks."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
    ).eval()  # fmt: skip


def tiny_cast(*others: Adapter, kind: Kind = "lora") -> Roles:
    """Student, EMA and ``others``, each with random weights of its own."""
    return copy.deepcopy(_made(others, kind))


@cache
def _made(others: tuple[Adapter, ...], kind: Kind) -> Roles:
    cast = Roles(tiny_unet(), NoiseSchedule.from_config(SD, set_alpha_to_one=True), rank=2, kind=kind)
    for adapter in others:
        cast.add(adapter)
    cast.train("student")
    scatter(cast)
    return cast


@torch.no_grad()
def scatter(cast: Roles) -> None:
    """Move every role with weights to a place of its own: no two roles answer alike, none like the teacher."""
    for i, adapter in enumerate(cast.adapters):
        generator = torch.Generator().manual_seed(i)
        for parameter in cast.parameters(adapter):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def tiny_batch(size: int = 6) -> Batch:
    """Always the same random images and texts."""
    generator = torch.Generator().manual_seed(5)
    z0, text, empty = (torch.randn(*s, generator=generator) for s in ((size, *SHAPE), (size, 5, 8), (1, 5, 8)))
    names = [f"image {i}" for i in range(size)]
    return Batch(z0, Condition(text), Condition(empty), prompts=names, ids=names, latent_shape=SHAPE)
