"""VQAScore (Lin et al. 2404.01291): how probable "Yes" is to a visual question answerer asked if an image shows a text.

A plug-in: the model is the authors' own package, which asks 'Does this figure show "..."? Please answer yes or no.'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from hypersd_bench.contracts import MetricContext, MetricInfo
from hypersd_bench.errors import InputError, first_line
from metrics.factory import Factory, Package

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

MODEL = "clip-flant5-xxl"
PACKAGE = Package("t2v_metrics", "pip install t2v-metrics==3.0")  # later releases dropped CLIP-FlanT5


@dataclass(slots=True)
class VqaScore:
    """VQAScore under one answerer; an ImageMetric. scorer: t2v_metrics' VQAScore, M paths and N texts to (M, N)."""

    info: MetricInfo
    scorer: Callable[..., Any]

    def score(self, images: Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Score images (N, 3, H, W) uint8 RGB against their prompts: (N,) in [0, 1]."""
        from torchvision.transforms.functional import to_pil_image

        scores = np.empty(len(images))
        with TemporaryDirectory(prefix="vqa-score-") as folder:
            path = Path(folder, "image.png")
            for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
                to_pil_image(image.cpu()).save(path)
                # one pair a call: more would score every image against every text
                scores[i] = float(self.scorer(images=[str(path)], texts=[prompt])[0][0])
        return scores


def _clip_flant5(info: MetricInfo, context: MetricContext) -> VqaScore:
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        t2v_metrics = import_module(PACKAGE.module)
    except Exception as error:  # it raises a RuntimeError without ffmpeg
        raise InputError(f"{info.id}: {PACKAGE.module} can't be imported ({first_line(error)})") from error
    if MODEL not in t2v_metrics.list_all_vqascore_models():
        raise InputError(f"{info.id}: the {PACKAGE.module} that is installed has no {MODEL}; {PACKAGE.install}")
    try:  # its own default is a folder hf_cache wherever it is started
        scorer = t2v_metrics.VQAScore(model=MODEL, device=context.device, cache_dir=HF_HUB_CACHE)
    except Exception as error:
        raise InputError(
            f"{info.id}: {PACKAGE.module} can't load {MODEL} ({first_line(error)}); hf download zhiqiulin/{MODEL}"
        ) from error
    return VqaScore(info, scorer)


CLIP_FLANT5_XXL = Factory(
    MetricInfo(
        f"vqa-score/{MODEL}", "VQAScore", "higher", "probability", "image",
        note='P("Yes") by CLIP-FlanT5-XXL (11B, 40 GB of GPU memory) as t2v_metrics 3.0 runs it, in bfloat16 on a GPU; '
        "other answerers are other metrics",
    ),
    _clip_flant5,
    packages=(PACKAGE,),
)  # fmt: skip
