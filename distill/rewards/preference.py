"""A preference model of ``metrics.preference_models`` as a reward: its preprocessing with gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from distill.rewards.contract import RewardInfo
from distill.rewards.preprocess import clip_input, full_precision
from metrics.preference_models.base import PreferenceModel


@dataclass(frozen=True, slots=True)
class PreferenceReward:
    """A preference model's rating of pixels; a Reward. fit: how a picture that isn't square is made so."""

    info: RewardInfo
    model: PreferenceModel
    fit: Literal["crop", "pad"] = "crop"

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rate pixels (B, 3, H, W) in [0, 1] against their prompts: (B,) float32, in the model's own unit."""
        with full_precision(pixels.device):
            return self.model.rate(clip_input(pixels, self.model.size, self.fit), prompts)
