"""ImageReward v1.0 (Xu et al. 2304.05977): BLIP reads the prompt while looking at the picture, and a head rates it.

The published file is read into transformers' own BLIP: the authors' package pins libraries that no longer install
beside ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypersd_bench.contracts import MetricContext, MetricInfo
from metrics.factory import Factory
from metrics.preference_models.base import Preference, crop, fill
from metrics.weights import HubFile, HubFolder, loading

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from metrics.aesthetic import LinearHead

WEIGHTS = HubFile(
    "ImageReward", "HYPERSD_IMAGE_REWARD", "zai-org/ImageReward", "ImageReward.pt",
    "d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6",
)  # fmt: skip
TOKENIZER = HubFolder(
    "ImageReward's tokenizer", "HYPERSD_BERT_TOKENIZER", "google-bert/bert-base-uncased",
    ("tokenizer.json", "tokenizer_config.json"),
)  # fmt: skip
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
class ImageRewardModel:
    """The two halves of BLIP and the head; a PreferenceModel."""

    vision: Any  # transformers' BlipVisionModel
    text: Any  # transformers' BlipTextModel
    head: LinearHead  # its five layers have no activation between them, so they fold into one
    tokenizer: Any

    @property
    def size(self) -> int:
        """Side of the pictures it takes, in pixels."""
        side: int = self.vision.config.image_size
        return side

    def rate(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rate normalised pixels (N, 3, size, size) float32 against N prompts: (N,) float32 of about unit spread."""
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(pixels.device)
        patches = self.vision(pixels).last_hidden_state
        read = self.text(
            tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=patches
        ).last_hidden_state[:, 0]
        raw: Tensor = read.double() @ self.head.w.to(read.device) + self.head.b.to(read.device)
        return ((raw - MEAN) / STD).float()


def load(device: str | torch.device) -> ImageRewardModel:
    """Load it onto a device; InputError with the remedy for files that are missing or are others."""
    import torch
    from transformers import BertTokenizer

    from metrics.aesthetic import LinearHead

    path, words = WEIGHTS.path(), TOKENIZER.path()
    with loading(WEIGHTS.what, path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        vision, text = build_vision(part(state, "blip.visual_encoder.")), build_text(part(state, "blip.text_encoder."))
        head = LinearHead.fold(part(state, "mlp."))
    with loading(TOKENIZER.what, words):
        tokenizer = BertTokenizer.from_pretrained(words, local_files_only=True)
    return ImageRewardModel(_frozen(vision, device), _frozen(text, device), head, tokenizer)


def _frozen(model: Any, device: str | torch.device) -> Any:
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
    fill(model, renamed)
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
    fill(model, state)
    return model


def _count(state: Mapping[str, Tensor], stem: str) -> int:
    return len({key[len(stem) + 1 :].split(".")[0] for key in state if key.startswith(f"{stem}.")})


def _metric(info: MetricInfo, context: MetricContext) -> Preference:
    return Preference(info, load(context.device), crop, context.device)


V1 = Factory(
    MetricInfo(
        "image-reward/v1", "ImageReward", "higher", "reward", "image",
        note="v1.0, standardised over its authors' pictures: about -2 to 2; prompts cut at 35 tokens; short side to "
        "224 by PIL's bicubic, middle crop; float32",
    ),
    _metric,
    weights=(WEIGHTS, TOKENIZER),
)  # fmt: skip
