"""CLIP scores: the cosine between an image's and its prompt's embedding, under a named model, prefix and scale.

Three families share the cosine and must not be mixed: CLIP score is 100 cos without a prefix, DMD2's is the bare cosine
with one, and Hessel et al.'s CLIP-S (2104.08718) is 2.5 max(cos, 0) with one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hypersd_bench.contracts import Extractor, MetricContext, MetricInfo
from metrics.extractors import clip
from metrics.extractors.clip import ClipExtractor
from metrics.extractors.network import Source
from metrics.factory import Factory

if TYPE_CHECKING:
    from numpy.typing import NDArray

PREFIX = "A photo depicts "  # of CLIP-S; DMD2 puts the same three tokens before a prompt's own


@dataclass(slots=True)
class ClipScore:
    """``scale`` x cosine of an image and ``prefix`` + prompt; negative ones are 0 if ``floored``. A FeatureMetric.

    embed_texts: the extractor's own, N texts to (N, d).
    """

    info: MetricInfo
    extractor: Extractor
    embed_texts: Callable[[Sequence[str]], NDArray[np.float32]]
    prefix: str = ""
    scale: float = 100.0
    floored: bool = False

    def score_features(self, features: NDArray[np.float32], prompts: Sequence[str]) -> NDArray[np.float64]:
        """Score N images' embeddings (N, d) against their prompts: (N,) in [-scale, scale]."""
        images = features.astype(np.float64)
        texts = self.embed_texts([self.prefix + prompt for prompt in prompts]).astype(np.float64)
        lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
        cosine: NDArray[np.float64] = np.einsum("nd,nd->n", images, texts) / lengths
        return self.scale * (np.maximum(cosine, 0) if self.floored else cosine)


def _row(
    info: MetricInfo, source: Source[ClipExtractor], prefix: str = "", scale: float = 100.0, floored: bool = False
) -> Factory[ClipScore]:
    def build(info: MetricInfo, context: MetricContext) -> ClipScore:
        extractor = source.load(context)
        return ClipScore(info, extractor, extractor.embed_texts, prefix, scale, floored)

    return Factory(info, build, source.weights, source.packages)


def _clip_score(variant: str, label: str, note: str, source: Source[ClipExtractor]) -> Factory[ClipScore]:
    info = MetricInfo(f"clip-score/{variant}", label, "higher", "cosine x100", "image", note=note, features=source.id)
    return _row(info, source)


_PLAIN = "100 cos, no prefix, prompts cut at 77 tokens, short side to 224 by PIL bicubic, centre crop"
POCKET = _clip_score(
    "pocket", "CLIP score",
    "100 cos, the miniature's own CLIP, trained on emoji scenes: only for images of the miniature, 64 px", clip.POCKET,
)  # fmt: skip
VIT_B_32 = _clip_score(
    "vit-b-32", "CLIP score (ViT-B/32)",
    f"OpenAI ViT-B/32 with QuickGELU through open_clip; {_PLAIN}; Hyper-SD's and MLPerf's, not CLIP-S", clip.VIT_B_32,
)  # fmt: skip
VIT_L_14 = _clip_score(
    "vit-l-14", "CLIP score (ViT-L/14)",
    f"OpenAI ViT-L/14 with QuickGELU through open_clip; {_PLAIN}; torchmetrics' default model", clip.VIT_L_14,
)  # fmt: skip
VIT_G_14 = _clip_score(
    "vit-g-14", "CLIP score (ViT-g/14)",
    f"LAION ViT-g/14 laion2b_s12b_b42k with GELU through open_clip; {_PLAIN}; not DMD2's, which has a prefix",
    clip.VIT_G_14,
)  # fmt: skip
VIT_BIGG_14 = _clip_score(
    "vit-bigg-14", "CLIP score (ViT-bigG/14)",
    f"LAION ViT-bigG/14 laion2b_s39b_b160k with GELU through open_clip; {_PLAIN}", clip.VIT_BIGG_14,
)  # fmt: skip
VIT_G_14_PHOTO_256 = _row(
    MetricInfo(
        "clip-score/vit-g-14-photo-256", "CLIP score (DMD2)", "higher", "cosine", "image",
        note="DMD2's: LAION ViT-g/14 laion2b_s12b_b42k with GELU, bare cosine, prefix 'A photo depicts ', centre "
        "square to 256 by Lanczos, then to 224 by bicubic; not beside clip-score/vit-g-14, nor x100",
        features=clip.VIT_G_14_256.id,
    ),
    clip.VIT_G_14_256, PREFIX, scale=1.0,
)  # fmt: skip
CLIP_S_VIT_B_32 = _row(
    MetricInfo(
        "clip-s/vit-b-32", "CLIP-S", "higher", "2.5 x cosine", "image",
        note="Hessel et al. 2021: 2.5 max(cos, 0), prefix 'A photo depicts ', OpenAI ViT-B/32 with QuickGELU, short "
        "side to 224 by PIL bicubic, centre crop; not CLIP score",
        features=clip.VIT_B_32.id,
    ),
    clip.VIT_B_32, PREFIX, scale=2.5, floored=True,
)  # fmt: skip
