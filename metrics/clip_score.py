"""CLIP score: 100 cos(image, text), no prefix.

Not Hessel et al.'s CLIP-S (2021), which is 2.5 max(cos, 0) with the prefix "A photo depicts".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hypersd_bench.contracts import MetricContext, MetricInfo
from metrics.factory import Factory

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from metrics.backbones import Encoder


@dataclass(slots=True)
class ClipScore:
    """CLIP score under one encoder; an ImageMetric."""

    info: MetricInfo
    encoder: Encoder

    def score(self, images: Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Score images (N, 3, H, W) uint8 RGB against their prompts: (N,) in [-100, 100]."""
        from torchmetrics.functional.regression import cosine_similarity

        embedded, texts = self.encoder.embed_images(images), self.encoder.embed_texts(list(prompts))
        cosine = cosine_similarity(embedded.double(), texts.double(), reduction="none")
        return (100 * cosine).cpu().numpy()


def _pocket(info: MetricInfo, context: MetricContext) -> ClipScore:
    from hypersd_bench.pocket import WEIGHTS
    from hypersd_bench.pocket.clip import load_clip

    return ClipScore(info, load_clip(WEIGHTS / "clip", WEIGHTS / "base" / "tokenizer", context.device))


def _vit_b_32(info: MetricInfo, context: MetricContext) -> ClipScore:
    from metrics.backbones import load_open_clip

    hub_repo = "timm/vit_base_patch32_clip_224.openai"
    return ClipScore(info, load_open_clip("ViT-B-32-quickgelu", hub_repo, "HYPERSD_CLIP_VIT_B_32", context.device))


POCKET = Factory(
    MetricInfo(
        "clip-score/pocket", "CLIP score", "higher", "cosine x100", "image",
        note="the miniature's own CLIP, trained on emoji scenes: only for images of the miniature",
    ),
    _pocket,
)  # fmt: skip
VIT_B_32 = Factory(
    MetricInfo(
        "clip-score/vit-b-32", "CLIP score (ViT-B/32)", "higher", "cosine x100", "image",
        note="OpenAI ViT-B/32 through open_clip with QuickGELU, no prefix, prompts cut at 77 tokens",
    ),
    _vit_b_32,
)  # fmt: skip
