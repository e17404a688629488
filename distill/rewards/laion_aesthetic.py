"""LAION's aesthetic predictors, V1 and V2: a linear rating of OpenAI's CLIP ViT-L/14 embedding, whatever the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.rewards.contract import RewardFactory, RewardInfo
from distill.rewards.preprocess import clip_input, full_precision
from metrics.aesthetic import LAION_V2_FILE, LAION_V2_SHA256, LinearHead, load_head
from metrics.backbones import load_open_clip, local_weights


@dataclass(frozen=True, slots=True)
class LaionAesthetic:
    """A LAION head on its CLIP; a Reward."""

    info: RewardInfo
    clip: Any  # open_clip's CLIP
    head: LinearHead

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rate pixels (B, 3, H, W) in [0, 1]: (B,) float32, about 0 to 10."""
        with full_precision(pixels.device):
            embedded = self.clip.encode_image(clip_input(pixels, self.clip.visual.image_size[0]))
            return self.head(embedded).float()


@dataclass(frozen=True, slots=True)
class _Head:
    """A head's file, and where it is published; called, it loads the reward."""

    file: str
    sha256: str
    repo: str
    variable: str

    def __call__(self, info: RewardInfo, device: torch.device) -> LaionAesthetic:
        cached = Path(torch.hub.get_dir()) / "checkpoints" / self.file
        path = local_weights(info.label, self.variable, cached, f"put {self.file} ({self.repo}) at {cached}")
        head = load_head(path, self.sha256)
        repo = "timm/vit_large_patch14_clip_224.openai"
        clip = load_open_clip("ViT-L-14-quickgelu", repo, "HYPERSD_CLIP_VIT_L_14", str(device))
        return LaionAesthetic(info, clip.model.requires_grad_(False), head)


V2 = RewardFactory(
    # hinge: 6 to 7 is what others train with; weight: eq. 13 has none
    RewardInfo("aesthetic/laion-v2", "LAION aesthetic V2", hinge=6.5, weight=1.0, trains=("aesthetic/laion-v2",)),
    _Head(
        LAION_V2_FILE, LAION_V2_SHA256, "christophschuhmann/improved-aesthetic-predictor", "HYPERSD_AESTHETIC_V2"
    ),
)  # fmt: skip
V1 = RewardFactory(
    # hinge: ours, V1 spreads wider than V2; weight: eq. 13 has none
    RewardInfo("aesthetic/laion-v1", "LAION aesthetic V1", hinge=7.0, weight=1.0,
               trains=("aesthetic/laion-v1", "aesthetic/laion-v2")),  # the same embedding, and much the same taste
    _Head(
        "sa_0_4_vit_l_14_linear.pth", "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
        "LAION-AI/aesthetic-predictor", "HYPERSD_AESTHETIC_V1",
    ),
)  # fmt: skip
