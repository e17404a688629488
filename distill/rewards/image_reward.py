"""ImageReward v1.0 (Xu et al. 2304.05977): BLIP reads the prompt while looking at the picture, and a head rates it.

The published file is read into transformers' own BLIP: the authors' package pins libraries that no longer install
beside ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.rewards.contract import RewardFactory, RewardInfo
from distill.rewards.preprocess import clip_input, full_precision
from distill.rewards.weights import hub_file, hub_folder, loading
from metrics.aesthetic import LinearHead

HUB_REPO, FILE = "zai-org/ImageReward", "ImageReward.pt"
TOKENIZER_REPO = "google-bert/bert-base-uncased"
MAX_TOKENS = 35  # it was trained so: what a longer prompt says after them doesn't count
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw rating over the authors' pictures
HEAD_WIDTH = 64  # of attention, in ViT-L as in BERT base

# BLIP's vision names as its authors and as transformers write them; the text encoder's agree
RENAMED = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
)


@dataclass(frozen=True, slots=True)
class ImageReward:
    """The two halves of BLIP and the head; a Reward."""

    info: RewardInfo
    vision: Any  # transformers' BlipVisionModel
    text: Any  # transformers' BlipTextModel
    head: LinearHead  # its five layers have no activation between them, so they fold into one
    tokenizer: Any

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rate pixels (B, 3, H, W) in [0, 1] against their prompts: (B,) float32 of about unit spread."""
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(pixels.device)
        with full_precision(pixels.device):
            patches = self.vision(clip_input(pixels, self.vision.config.image_size)).last_hidden_state
            read = self.text(
                tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=patches
            ).last_hidden_state[:, 0]
            raw: Tensor = read.double() @ self.head.w.to(read.device) + self.head.b.to(read.device)
            return ((raw - MEAN) / STD).float()


def _load(info: RewardInfo, device: torch.device) -> ImageReward:
    from transformers import BertTokenizer

    path = hub_file(info.label, "HYPERSD_IMAGE_REWARD", HUB_REPO, FILE)
    words = hub_folder(
        f"{info.label}'s tokenizer", "HYPERSD_BERT_TOKENIZER", TOKENIZER_REPO,
        ("tokenizer.json", "tokenizer_config.json"),
    )  # fmt: skip
    with loading(info.label, path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        vision, text = build_vision(part(state, "blip.visual_encoder.")), build_text(part(state, "blip.text_encoder."))
        head = LinearHead.fold(part(state, "mlp."))
    with loading(f"{info.label}'s tokenizer", words):
        tokenizer = BertTokenizer.from_pretrained(words, local_files_only=True)
    return ImageReward(info, _frozen(vision, device), _frozen(text, device), head, tokenizer)


def _frozen(model: Any, device: torch.device) -> Any:
    return model.eval().requires_grad_(False).to(device)


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What lies under a prefix, without it; counters that are no weights are left out."""
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and not key.endswith("position_ids")
    }


def build_vision(state: Mapping[str, Tensor]) -> Any:
    """BLIP's image encoder of the sizes and weights of its published state."""
    from transformers import BlipVisionConfig, BlipVisionModel

    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    model = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(state["blocks.0.mlp.fc1.weight"]),
            num_hidden_layers=_count(state, "blocks"),
            num_attention_heads=width // HEAD_WIDTH,
            image_size=side * patch,
            patch_size=patch,
            layer_norm_eps=1e-6,  # timm's, on which the authors built; transformers has 1e-5
        )
    )
    renamed = {}
    for key, value in state.items():
        for pattern, name in RENAMED:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    model.load_state_dict(renamed, strict=True)
    return model


def build_text(state: Mapping[str, Tensor]) -> Any:
    """BLIP's text encoder with attention to the image, of the sizes and weights of its published state."""
    from transformers import BlipTextConfig, BlipTextModel

    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(state["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_count(state, "encoder.layer"),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=len(state["embeddings.position_embeddings.weight"]),
        is_decoder=True,  # only this gives it cross-attention; it still reads the whole prompt at once
    )
    model = BlipTextModel(config, add_pooling_layer=False)
    model.load_state_dict(state, strict=True)
    return model


def _count(state: Mapping[str, Tensor], stem: str) -> int:
    return len({key[len(stem) + 1 :].split(".")[0] for key in state if key.startswith(f"{stem}.")})


V1 = RewardFactory(
    # hinge: ReFL's code; weight: eq. 13 has none (ReFL's 1e-3 stands beside a pretraining loss that we don't have)
    RewardInfo("image-reward/v1", "ImageReward", hinge=2.0, weight=1.0, trains=("image-reward/v1",)), _load
)  # fmt: skip
