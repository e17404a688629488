"""Ways to spoil a picture at four strengths, for training and checking the aesthetic head.

The idea of ranking pictures by how strongly they were spoiled is RankIQA's (Liu et al. 1707.08347). The kinds are
what few-step samplers do: blur and noise left over, blocks, faded or burnt colours, ghosts, parts in wrong places.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = (1, 2, 3, 4)
CLEAR = 3  # from this strength on a person sees the flaw at once
PATCH = 8  # pixels


def degrade(kind: str, x: Tensor, strength: int, seed: int = 0) -> Tensor:
    """Spoil images (N, 3, H, W) in [0, 1]; strength 0 leaves them. Equal seeds spoil the same places, only more."""
    if strength == 0:
        return x
    return DEGRADATIONS[kind](x, strength - 1, torch.Generator().manual_seed(seed)).clamp(0, 1)


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Blur images (N, C, H, W) with a Gaussian of ``sigma`` pixels; edges are mirrored."""
    radius = int(3 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.pad(x, (radius,) * 4, mode="reflect")
    with torch.autocast(x.device.type, enabled=False):  # pictures stay exact inside a bf16 training
        x = F.conv2d(x, kernel, groups=x.shape[1])
        return F.conv2d(x, kernel.transpose(2, 3), groups=x.shape[1])


def _blur(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    return blurred(x, (0.6, 1.0, 1.6, 2.6)[level])


def _noise(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    return x + (0.04, 0.08, 0.14, 0.24)[level] * torch.randn(x.shape, generator=generator).to(x)


def _blocks(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    """Mix in the means of 4x4 blocks."""
    means = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4, mode="nearest")
    return torch.lerp(x, means, (0.25, 0.5, 0.75, 1.0)[level])


def _fade(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    """Pull every colour towards middle gray."""
    return 0.5 + (0.75, 0.55, 0.35, 0.2)[level] * (x - 0.5)


def _burn(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    """Push every colour away from middle gray, as too much guidance does."""
    return 0.5 + (1.3, 1.7, 2.4, 4.0)[level] * (x - 0.5)


def _ghost(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    """Mix in a copy shifted in a direction of each image's own."""
    angle = 2 * torch.pi * torch.rand(len(x), generator=generator)
    shift = torch.stack([angle.cos(), angle.sin()], dim=1) * 2 * (3, 5, 7, 9)[level] / x.shape[-1]
    theta = torch.cat([torch.eye(2).expand(len(x), 2, 2), shift[:, :, None]], dim=2).to(x)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    copy = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return torch.lerp(x, copy, (0.2, 0.3, 0.4, 0.5)[level])


def _shuffle(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    """Let part of the patches change places; a stronger one moves the weaker one's patches too."""
    patches = F.unfold(x, PATCH, stride=PATCH).clone()
    count = (patches.shape[2] * (2, 4, 8, 16)[level]) // 16
    for row in patches:
        moved = torch.randperm(row.shape[1], generator=generator)[:count].to(x.device)
        row[:, moved] = row[:, moved.roll(1)]
    return F.fold(patches, x.shape[2:], PATCH, stride=PATCH)


DEGRADATIONS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "blur": _blur,
    "noise": _noise,
    "blocks": _blocks,
    "fade": _fade,
    "burn": _burn,
    "ghost": _ghost,
    "shuffle": _shuffle,
}
