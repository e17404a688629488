"""PickScore (Kirstain et al. 2305.01569): CLIP ViT-H/14 trained on which of two pictures users picked for a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hypersd_bench.contracts import MetricContext, MetricInfo
from metrics.factory import Factory
from metrics.preference_models.base import Preference, crop, refuse
from metrics.weights import HubFolder, loading, require_sha256

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WEIGHTS = HubFolder(
    "PickScore", "HYPERSD_PICK_SCORE", "yuvalkirstain/PickScore_v1", ("config.json", "model.safetensors")
)
SHA256 = "ef31ef6fc5ff4d9bb90dd232df4e145887ba62c5a03aa2841415f8c25f18d52e"  # of model.safetensors
TOKENIZER = HubFolder(  # as the model's card does
    "PickScore's tokenizer", "HYPERSD_CLIP_VIT_H_14_TOKENIZER", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ("tokenizer.json", "tokenizer_config.json"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PickScoreModel:
    """Cosine times the model's own temperature, about 100; a PreferenceModel."""

    clip: Any  # transformers' CLIPModel
    tokenizer: Any

    @property
    def size(self) -> int:
        """Side of the pictures it takes, in pixels."""
        side: int = self.clip.config.vision_config.image_size
        return side

    def rate(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rate normalised pixels (N, 3, size, size) float32 against N prompts: (N,) float32, in practice 18 to 24."""
        length = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        logits: Tensor = self.clip(**tokens.to(pixels.device), pixel_values=pixels).logits_per_image
        return logits.diagonal()


def load(device: str | torch.device) -> PickScoreModel:
    """Load it onto a device; InputError with the remedy for files that are missing or are others."""
    import torch
    from transformers import CLIPModel, CLIPTokenizer

    folder, words = WEIGHTS.path(), TOKENIZER.path()
    require_sha256(folder / "model.safetensors", SHA256)
    with loading(WEIGHTS.what, folder):
        model, report = CLIPModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        refuse(list(report["missing_keys"]))  # transformers would only warn, and draw them at random
    with loading(TOKENIZER.what, words):
        tokenizer = CLIPTokenizer.from_pretrained(words, local_files_only=True)
    return PickScoreModel(model.eval().requires_grad_(False).to(device), tokenizer)


def _metric(info: MetricInfo, context: MetricContext) -> Preference:
    return Preference(info, load(context.device), partial(crop, middle="floored"), context.device)


V1 = Factory(
    MetricInfo(
        "pick-score/v1", "PickScore", "higher", "logit", "image",
        note="exp(logit_scale) x cosine, about 18 to 24; papers also print it / 100, or as a probability; prompts cut "
        "at 77 tokens; short side to 224 by PIL's bicubic, middle crop; float32",
    ),
    _metric,
    weights=(WEIGHTS, TOKENIZER),
)  # fmt: skip
