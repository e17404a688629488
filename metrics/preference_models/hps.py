"""HPSv2.1 (Wu et al. 2306.09341): CLIP ViT-H/14 trained on which of two pictures people preferred for a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypersd_bench.contracts import MetricContext, MetricInfo
from metrics.factory import Factory
from metrics.preference_models.base import Preference, fill, letterbox
from metrics.weights import HubFile, loading

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ARCHITECTURE = "ViT-H-14"
WEIGHTS = HubFile(
    "HPSv2.1", "HYPERSD_HPS_V2_1", "xswu/HPSv2", "HPS_v2.1_compressed.pt",
    "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class HpsModel:
    """HPSv2.1 as 100 cosines, without CLIP's temperature; a PreferenceModel."""

    clip: Any  # open_clip's CLIP
    tokenizer: Callable[[list[str]], Tensor]

    @property
    def size(self) -> int:
        """Side of the pictures it takes, in pixels."""
        side: int = self.clip.visual.image_size[0]
        return side

    def rate(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rate normalised pixels (N, 3, size, size) float32 against N prompts: (N,) float32, in practice 15 to 35."""
        tokens = self.tokenizer(list(prompts)).to(pixels.device)
        images = self.clip.encode_image(pixels, normalize=True)
        score: Tensor = 100 * (images * self.clip.encode_text(tokens, normalize=True)).sum(1)
        return score


def load(device: str | torch.device) -> HpsModel:
    """Load it onto a device; InputError with the remedy for a file that is missing or is another."""
    import open_clip
    import torch

    path = WEIGHTS.path()
    model = open_clip.CLIP(**open_clip.get_model_config(ARCHITECTURE))
    with loading(WEIGHTS.what, path):
        fill(model, torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    return HpsModel(model.eval().requires_grad_(False).to(device), open_clip.get_tokenizer(ARCHITECTURE))


def _metric(info: MetricInfo, context: MetricContext) -> Preference:
    return Preference(info, load(context.device), letterbox, context.device)


V2_1 = Factory(
    MetricInfo(
        "hps/v2.1", "HPSv2.1", "higher", "cosine x100", "image",
        note="never beside v2.0, and comparable only on the same prompts; prompts cut at 77 tokens; long side to 224 "
        "by filtered bicubic, black around it; float32 where its authors run mixed precision",
    ),
    _metric,
    weights=(WEIGHTS,),
)  # fmt: skip
