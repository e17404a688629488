"""Pixels to what the published judges take, with gradient all the way (as ReFL does, 2304.05977)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, center_crop, normalize, resize

from metrics.preference_models.base import CLIP_MEAN, CLIP_STD


def clip_input(pixels: Tensor, size: int, fit: Literal["crop", "pad"] = "crop") -> Tensor:
    """Resize pixels (B, 3, H, W) in [0, 1] by antialiased bicubic and normalise: (B, 3, size, size) float32.

    crop: the short side becomes ``size``, the middle stays. pad: the long side does, black fills the rest. Overshoot
    of the filter is not clipped, as PIL would: that would cut the gradient.
    """
    height, width = pixels.shape[-2:]
    scale = size / max(height, width)
    target = [size] if fit == "crop" else [round(height * scale), round(width * scale)]
    resized = resize(pixels.float(), target, interpolation=InterpolationMode.BICUBIC, antialias=True)
    normalised: Tensor = normalize(center_crop(resized, [size, size]), CLIP_MEAN, CLIP_STD)
    return normalised


def full_precision(device: torch.device) -> torch.autocast:
    """Leave autocast: what a picture is worth must not depend on what the student trains in."""
    return torch.autocast(device.type, enabled=False)
