"""The miniature's rewards: its aesthetic proxy and its CLIP. Its concept checker stays out of training, as a judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.rewards.contract import RewardFactory, RewardInfo
from distill.rewards.preprocess import full_precision
from hypersd_bench.errors import InputError
from hypersd_bench.pocket import WEIGHTS
from hypersd_bench.pocket.aesthetic import PocketAesthetic, load_aesthetic
from hypersd_bench.pocket.clip import PocketClip, load_clip
from hypersd_bench.pocket.scenes import SIZE


@dataclass(frozen=True, slots=True)
class PocketRating:
    """The aesthetic proxy, whatever the prompt; a Reward."""

    info: RewardInfo
    judge: PocketAesthetic

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rate pixels (B, 3, 64, 64) in [0, 1]: (B,) float32, 8 for clean renders on average."""
        with full_precision(pixels.device):
            return self.judge.rating(_checked(pixels, self.info))


@dataclass(frozen=True, slots=True)
class PocketClipScore:
    """100 cos(image, text) of the miniature's CLIP; a Reward."""

    info: RewardInfo
    clip: PocketClip

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score pixels (B, 3, 64, 64) in [0, 1] against their prompts: (B,) float32 in [-100, 100]."""
        with full_precision(pixels.device):
            texts = self.clip.embed_texts(list(prompts))
            return 100 * (self.clip.image_features(_checked(pixels, self.info)) * texts).sum(1)


def _checked(pixels: Tensor, info: RewardInfo) -> Tensor:
    if pixels.shape[1:] != (3, SIZE, SIZE):
        size = " x ".join(str(side) for side in pixels.shape[-2:])
        raise InputError(f"reward {info.id} judges {SIZE} x {SIZE} pictures of the miniature, not {size}")
    return pixels.float()


def _clip(device: torch.device) -> PocketClip:
    return load_clip(WEIGHTS / "clip", WEIGHTS / "base" / "tokenizer", device)


# hinges: ours, the 90th percentile of held-out renders (10.2 and 96.2); weights: ours, so that a standard deviation of
# those renders (1.6 and 4.3) counts alike
AESTHETIC = RewardFactory(
    RewardInfo("aesthetic/pocket", "Aesthetic (pocket)", hinge=10.0, weight=1.0, trains=("aesthetic/pocket",)),
    lambda info, device: PocketRating(info, load_aesthetic(WEIGHTS, _clip(device))),
)
CLIP_SCORE = RewardFactory(
    RewardInfo("clip-score/pocket", "CLIP score", hinge=96.0, weight=0.4, trains=("clip-score/pocket",)),
    lambda info, device: PocketClipScore(info, _clip(device)),
)
