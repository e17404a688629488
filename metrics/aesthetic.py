"""Aesthetic scores: the miniature's own proxy, and LAION's V2 head on CLIP ViT-L/14."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hypersd_bench.contracts import MetricContext, MetricInfo
from metrics.factory import Factory

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

LAION_V2_FILE = "sac+logos+ava1-l14-linearMSE.pth"
LAION_V2_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"


@dataclass(slots=True)
class Aesthetic:
    """An aesthetic rating of images, whatever their prompt; an ImageMetric."""

    info: MetricInfo
    rate: Callable[[Tensor], Tensor]

    def score(self, images: Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Rate images (N, 3, H, W) uint8 RGB: (N,); prompts don't matter."""
        return self.rate(images).double().cpu().numpy()


@dataclass(frozen=True, slots=True)
class LinearHead:
    """A rating w.x + b of a unit-length CLIP embedding; w (d,) and b in float64.

    LAION's V2 "MLP" has no activations between its layers, so all five fold into this exactly.
    """

    w: Tensor
    b: Tensor

    @classmethod
    def fold(cls, state: Mapping[str, Tensor]) -> LinearHead:
        """Fold a chain of linear layers (``<name>weight``, ``<name>bias``, in order; the last has one output)."""
        stems = [key.removesuffix("weight") for key in state if key.endswith("weight")]
        w, b = state[f"{stems[0]}weight"].double(), state[f"{stems[0]}bias"].double()
        for stem in stems[1:]:
            W = state[f"{stem}weight"].double()
            w, b = W @ w, W @ b + state[f"{stem}bias"].double()
        return cls(w[0], b[0])

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Rate embeddings (N, d) of any length, normalised here: unnormalised input would rate 20 to 30."""
        x = embeddings.double()
        rating: Tensor = (x / x.norm(dim=-1, keepdim=True)) @ self.w.to(x.device) + self.b.to(x.device)
        return rating


def load_head(path: Path, digest: str = LAION_V2_SHA256) -> LinearHead:
    """Read a LAION head whose sha256 is known; another file raises InputError."""
    import torch

    from metrics.backbones import require_sha256

    require_sha256(path, digest)
    return LinearHead.fold(torch.load(path, map_location="cpu", weights_only=True))


def _pocket(info: MetricInfo, context: MetricContext) -> Aesthetic:
    from hypersd_bench.pocket import WEIGHTS
    from hypersd_bench.pocket.aesthetic import load_aesthetic
    from hypersd_bench.pocket.clip import load_clip

    clip = load_clip(WEIGHTS / "clip", WEIGHTS / "base" / "tokenizer", context.device)
    return Aesthetic(info, load_aesthetic(WEIGHTS, clip).rate_images)


def _laion_v2(info: MetricInfo, context: MetricContext) -> Aesthetic:
    import torch

    from metrics.backbones import load_open_clip, local_weights

    cached = Path(torch.hub.get_dir()) / "checkpoints" / LAION_V2_FILE
    remedy = f"put {LAION_V2_FILE} (christophschuhmann/improved-aesthetic-predictor) at {cached}"
    head = load_head(local_weights("LAION aesthetic V2", "HYPERSD_AESTHETIC_V2", cached, remedy))
    hub_repo = "timm/vit_large_patch14_clip_224.openai"
    encoder = load_open_clip("ViT-L-14-quickgelu", hub_repo, "HYPERSD_CLIP_VIT_L_14", context.device)
    return Aesthetic(info, lambda images: head(encoder.embed_images(images)))


POCKET = Factory(
    MetricInfo(
        "aesthetic/pocket", "Aesthetic (pocket)", "higher", "rating", "image",
        note="a proxy: ranks clean renders above degraded ones; nobody's taste was asked",
    ),
    _pocket,
)  # fmt: skip
LAION_V2 = Factory(
    MetricInfo(
        "aesthetic/laion-v2", "Aesthetic (LAION V2)", "higher", "rating", "image",
        note="sac+logos+ava1-l14-linearMSE on OpenAI ViT-L/14; never beside V1",
    ),
    _laion_v2,
)  # fmt: skip
