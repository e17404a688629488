"""HPSv2.1 (Wu et al. 2306.09341): CLIP ViT-H/14 trained on which of two pictures people preferred for a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.rewards.contract import RewardFactory, RewardInfo
from distill.rewards.preprocess import clip_input, full_precision
from distill.rewards.weights import hub_file, loading

ARCHITECTURE = "ViT-H-14"
HUB_REPO, FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"


@dataclass(frozen=True, slots=True)
class HumanPreference:
    """HPSv2.1 as 100 cosines, without CLIP's temperature; a Reward."""

    info: RewardInfo
    clip: Any  # open_clip's CLIP
    tokenizer: Callable[[list[str]], Tensor]

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rate pixels (B, 3, H, W) in [0, 1] against their prompts: (B,) float32, in practice 15 to 35."""
        tokens = self.tokenizer(list(prompts)).to(pixels.device)
        with full_precision(pixels.device):
            # its authors letterbox where CLIP crops
            x = clip_input(pixels, self.clip.visual.image_size[0], fit="pad")
            images = self.clip.encode_image(x, normalize=True)
            score: Tensor = 100 * (images * self.clip.encode_text(tokens, normalize=True)).sum(1)
        return score


def _load(info: RewardInfo, device: torch.device) -> HumanPreference:
    import open_clip

    path = hub_file(info.label, "HYPERSD_HPS_V2_1", HUB_REPO, FILE)
    with loading(info.label, path):
        model = open_clip.create_model(ARCHITECTURE, pretrained=str(path), device=device, weights_only=True)
    return HumanPreference(info, model.eval().requires_grad_(False), open_clip.get_tokenizer(ARCHITECTURE))


V2_1 = RewardFactory(
    # hinge and weight: ours; the first above what good pictures get, the second so that a point of either counts alike
    RewardInfo("hps/v2.1", "HPSv2.1", hinge=34.0, weight=0.5, trains=("hps/v2.1",)), _load
)  # fmt: skip
