"""The miniature's segmenter, trained on the exact masks of scenes, as perceptual reward (2404.13686, eq. 14)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.batch import Instances
from distill.rewards.preprocess import full_precision
from hypersd_bench.pocket import WEIGHTS, segmenter


@dataclass(frozen=True, slots=True)
class PocketSegmenter:
    """The miniature's segmenter; a Segmenter that draws nothing."""

    model: segmenter.PocketSegmenter
    id: str = "pocket"

    def loss(self, pixels: Tensor, instances: Sequence[Instances], seed: int = 0) -> Tensor:
        """Its own training loss for pixels (B, 3, 64, 64) in [0, 1]: a scalar."""
        with full_precision(pixels.device):
            return self.model.loss(pixels.float(), instances)


def load(device: torch.device) -> PocketSegmenter:
    """Load the shipped segmenter; InputError with the remedy when the miniature has none."""
    return PocketSegmenter(segmenter.load_segmenter(WEIGHTS, device))
