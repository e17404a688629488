"""LAION's aesthetic predictors, V1 and V2: a linear rating of OpenAI's CLIP ViT-L/14 embedding, whatever the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.rewards.contract import RewardFactory, RewardInfo
from distill.rewards.preprocess import clip_input, full_precision
from metrics.aesthetic import V1_HEAD, V2_HEAD, LinearHead, load_head
from metrics.extractors.clip import OPENAI_L_14, load_open_clip
from metrics.weights import WebFile


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
    """A head's file; called, it loads the reward."""

    file: WebFile

    def __call__(self, info: RewardInfo, device: torch.device) -> LaionAesthetic:
        head = load_head(self.file.path(), self.file.file.sha256)
        return LaionAesthetic(info, load_open_clip(OPENAI_L_14, str(device)).model, head)


BOTH = ("aesthetic/laion-v1", "aesthetic/laion-v2")  # the same embedding, and much the same taste
V2 = RewardFactory(
    # hinge: 6 to 7 is what others train with; weight: eq. 13 has none
    RewardInfo("aesthetic/laion-v2", "LAION aesthetic V2", hinge=6.5, weight=1.0, trains=BOTH),
    _Head(V2_HEAD),
)
V1 = RewardFactory(
    # hinge: ours, V1 spreads wider than V2; weight: eq. 13 has none
    RewardInfo("aesthetic/laion-v1", "LAION aesthetic V1", hinge=7.0, weight=1.0, trains=BOTH),
    _Head(V1_HEAD),
)
