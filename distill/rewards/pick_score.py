"""PickScore (Kirstain et al. 2305.01569): CLIP ViT-H/14 trained on which of two pictures users picked for a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.rewards.contract import RewardFactory, RewardInfo
from distill.rewards.preprocess import clip_input, full_precision
from distill.rewards.weights import hub_folder, loading

HUB_REPO = "yuvalkirstain/PickScore_v1"
TOKENIZER_REPO = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # as the model's card does


@dataclass(frozen=True, slots=True)
class PickScore:
    """Cosine times the model's own temperature, about 100; a Reward."""

    info: RewardInfo
    clip: Any  # transformers' CLIPModel
    tokenizer: Any

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rate pixels (B, 3, H, W) in [0, 1] against their prompts: (B,) float32, in practice 18 to 24."""
        length = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        with full_precision(pixels.device):
            x = clip_input(pixels, self.clip.config.vision_config.image_size)
            logits: Tensor = self.clip(**tokens.to(pixels.device), pixel_values=x).logits_per_image
        return logits.diagonal()


def _load(info: RewardInfo, device: torch.device) -> PickScore:
    from transformers import CLIPModel, CLIPTokenizer

    folder = hub_folder(info.label, "HYPERSD_PICK_SCORE", HUB_REPO, ("config.json", "model.safetensors"))
    words = hub_folder(
        f"{info.label}'s tokenizer", "HYPERSD_CLIP_VIT_H_14_TOKENIZER", TOKENIZER_REPO,
        ("tokenizer.json", "tokenizer_config.json"),
    )  # fmt: skip
    with loading(info.label, folder):
        model = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True)
    with loading(f"{info.label}'s tokenizer", words):
        tokenizer = CLIPTokenizer.from_pretrained(words, local_files_only=True)
    return PickScore(info, model.eval().requires_grad_(False).to(device), tokenizer)


V1 = RewardFactory(
    # hinge: ours, above the best of Hyper-SD's table 2 (23.2); weight: eq. 13 has none
    RewardInfo("pick-score/v1", "PickScore", hinge=24.0, weight=1.0, trains=("pick-score/v1",)), _load
)  # fmt: skip
