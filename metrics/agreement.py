"""Agreement with the teacher: how far an image is from what the teacher makes of the same prompt and noise.

A consistency student should end where the teacher's trajectory ends; one trained by score distillation need not, so
a large distance is no fault of its pictures.
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

MEANING = "says how closely the teacher is followed, not how good an image is"


@dataclass(slots=True)
class Agreement:
    """Distance to the teacher's image; a PairMetric."""

    info: MetricInfo
    distance: Distance

    def score_pairs(self, images: Tensor, others: Tensor) -> NDArray[np.float64]:
        """Score images (N, 3, H, W) uint8 RGB against the teacher's: (N,), 0 for the same image."""
        return self.distance.between(images, others).cpu().numpy()


def _lite0(info: MetricInfo, context: MetricContext) -> Agreement:
    return Agreement(info, load_lite0_distance(context))


def _lpips(info: MetricInfo, context: MetricContext) -> Agreement:
    return Agreement(info, load_lpips_distance(context))


LITE0 = Factory(
    MetricInfo(
        "agreement/lite0", "Distance to teacher", "lower", "1 - cosine", "pair",
        note=f"EfficientNet-Lite0 maps at 128 px, teacher at its most steps, same noise; {MEANING}",
    ),
    _lite0,
)  # fmt: skip
LPIPS = Factory(
    MetricInfo(
        "agreement/lpips", "Distance to teacher (LPIPS)", "lower", "LPIPS", "pair",
        note=f"LPIPS (AlexNet, version 0.1, at the images' own size), teacher at its most steps, same noise; {MEANING}",
    ),
    _lpips,
    (WEIGHTS,),
)  # fmt: skip
