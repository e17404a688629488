"""Concept rate: does a generated scene show what its caption says? Judged by the miniature's checker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hypersd_bench.contracts import MetricContext, MetricInfo
from metrics.extractors.clip import require_miniature
from metrics.factory import Factory

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from hypersd_bench.pocket.checker import Checker


@dataclass(slots=True)
class Concept:
    """1 where the named emoji, their order and the background are all right, else 0; an ImageMetric."""

    info: MetricInfo
    checker: Checker

    def score(self, images: Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Score images (N, 3, H, W) uint8 RGB: (N,), 0 or 1; a prompt that is no scene caption raises InputError."""
        from hypersd_bench.pocket.scenes import parse_caption

        require_miniature(images, self.info.id)
        wanted = [parse_caption(prompt) for prompt in prompts]
        readings = self.checker.read(images)
        right = [reading.matches(*want).all_ok for reading, want in zip(readings, wanted, strict=True)]
        return np.array(right, np.float64)


def _pocket(info: MetricInfo, context: MetricContext) -> Concept:
    from hypersd_bench.pocket import WEIGHTS
    from hypersd_bench.pocket.checker import load_checker

    return Concept(info, load_checker(WEIGHTS, context.device))


POCKET = Factory(
    MetricInfo(
        "concept/pocket", "Concept rate", "higher", "rate", "image",
        note="all of the caption right, by the miniature's checker; only for images of the miniature",
    ),
    _pocket,
)  # fmt: skip
