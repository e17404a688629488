"""Aesthetic scores: the miniature's own proxy, and LAION's heads V1 and V2 on CLIP ViT-L/14."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hypersd_bench.contracts import Extractor, MetricContext, MetricInfo
from hypersd_bench.download import OwnerFile
from metrics.extractors import clip
from metrics.factory import Factory
from metrics.weights import WebFile, loading, require_sha256

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

LAION_V2_FILE = "sac+logos+ava1-l14-linearMSE.pth"
LAION_V2_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
LAION_V1_FILE = "sa_0_4_vit_l_14_linear.pth"
LAION_V1_SHA256 = "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba"
_GITHUB = "https://raw.githubusercontent.com"
V2_HEAD = WebFile(
    "LAION aesthetic V2",
    "HYPERSD_AESTHETIC_V2",
    OwnerFile(
        LAION_V2_FILE,
        f"{_GITHUB}/christophschuhmann/improved-aesthetic-predictor/6934dd81792f086e613a121dbce43082cb8be85e/"
        f"{LAION_V2_FILE.replace('+', '%2B')}",
        LAION_V2_SHA256,
    ),
)
V1_HEAD = WebFile(
    "LAION aesthetic V1",
    "HYPERSD_AESTHETIC_V1",
    OwnerFile(
        LAION_V1_FILE,
        f"{_GITHUB}/LAION-AI/aesthetic-predictor/6d122adad522ab246644d9dc1c6d7a3810ee255f/{LAION_V1_FILE}",
        LAION_V1_SHA256,
    ),
)


@dataclass(slots=True)
class PocketRating:
    """The miniature's rating of images, whatever their prompt; an ImageMetric."""

    info: MetricInfo
    rate: Callable[[Tensor], Tensor]

    def score(self, images: Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Rate images (N, 3, 64, 64) uint8 RGB: (N,); prompts don't matter."""
        clip.require_miniature(images, self.info.id)
        return self.rate(images).double().cpu().numpy()


@dataclass(slots=True)
class LaionRating:
    """A LAION head's rating of CLIP embeddings, whatever their prompt; a FeatureMetric."""

    info: MetricInfo
    extractor: Extractor
    head: LinearHead

    def score_features(self, features: NDArray[np.float32], prompts: Sequence[str]) -> NDArray[np.float64]:
        """Rate N images' embeddings (N, 768): (N,), about 0 to 10; prompts don't matter."""
        import torch

        return self.head(torch.from_numpy(features)).numpy()


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

    require_sha256(path, digest)
    with loading("the aesthetic head", path):
        return LinearHead.fold(torch.load(path, map_location="cpu", weights_only=True))


def _pocket(info: MetricInfo, context: MetricContext) -> PocketRating:
    from hypersd_bench.pocket import WEIGHTS
    from hypersd_bench.pocket.aesthetic import load_aesthetic

    return PocketRating(info, load_aesthetic(WEIGHTS, clip.load_pocket_clip(context)).rate_images)


def _laion(info: MetricInfo, file: WebFile) -> Factory[LaionRating]:
    def build(info: MetricInfo, context: MetricContext) -> LaionRating:
        head = load_head(file.path(), file.file.sha256)
        return LaionRating(info, clip.VIT_L_14.load(context), head)

    return Factory(info, build, (file, *clip.VIT_L_14.weights))


_EMBEDDING = (
    "a linear rating of OpenAI ViT-L/14's embedding (QuickGELU, short side to 224 by PIL bicubic, centre crop), divided"
    " by its length"
)
POCKET = Factory(
    MetricInfo(
        "aesthetic/pocket", "Aesthetic (pocket)", "higher", "rating", "image",
        note="a proxy: ranks clean renders above degraded ones; nobody's taste was asked; only for the miniature",
    ),
    _pocket,
)  # fmt: skip
LAION_V2 = _laion(
    MetricInfo(
        "aesthetic/laion-v2", "Aesthetic (LAION V2)", "higher", "rating", "image",
        note=f"sac+logos+ava1-l14-linearMSE: {_EMBEDDING}; Hyper-SD's; never beside V1",
        features=clip.VIT_L_14.id,
    ),
    V2_HEAD,
)  # fmt: skip
LAION_V1 = _laion(
    MetricInfo(
        "aesthetic/laion-v1", "Aesthetic (LAION V1)", "higher", "rating", "image",
        note=f"sa_0_4_vit_l_14_linear: {_EMBEDDING}; HEIM's and pruna's; spreads wider than V2, never beside it",
        features=clip.VIT_L_14.id,
    ),
    V1_HEAD,
)  # fmt: skip
