"""Diversity within a prompt: how far an image is from the other images of its prompt, made from other noise.

Few-step students lose it first: one that draws the same picture whatever the noise has 0. The mean over a prompt's
images is their mean pairwise distance, as in the pairwise LPIPS of Zhu et al. 2017 (BicycleGAN).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypersd_bench.contracts import MetricContext, MetricInfo
from metrics.factory import Factory
from metrics.lpips import WEIGHTS
from metrics.perceptual import Distance, load_lite0_distance, load_lpips_distance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

CEILING = "more is better only up to the teacher's own level, since noise and errors are diverse too"


@dataclass(slots=True)
class Diversity:
    """Mean distance to the other images of the prompt; a PromptMetric."""

    info: MetricInfo
    distance: Distance

    def score_group(self, images: Tensor, prompt: str) -> NDArray[np.float64]:
        """Score all images (R, 3, H, W) uint8 RGB of a prompt, R at least 2: (R,), 0 where all are the same."""
        among = self.distance.among(images).fill_diagonal_(0)
        return (among.sum(1) / (len(images) - 1)).cpu().numpy()


def _lite0(info: MetricInfo, context: MetricContext) -> Diversity:
    return Diversity(info, load_lite0_distance(context))


def _lpips(info: MetricInfo, context: MetricContext) -> Diversity:
    return Diversity(info, load_lpips_distance(context))


LITE0 = Factory(
    MetricInfo(
        "diversity/lite0", "Diversity", "higher", "1 - cosine", "prompt",
        note=f"mean distance to the prompt's other images, EfficientNet-Lite0 maps at 128 px; {CEILING}",
    ),
    _lite0,
)  # fmt: skip
LPIPS = Factory(
    MetricInfo(
        "diversity/lpips", "Diversity (LPIPS)", "higher", "LPIPS", "prompt",
        note=f"mean LPIPS (AlexNet, version 0.1, at the images' own size) to the prompt's other images; {CEILING}",
    ),
    _lpips,
    (WEIGHTS,),
)  # fmt: skip
