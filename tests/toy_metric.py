"""Metrics made for tests: brightness of an image, and the distance between mean colours of two sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hypersd_bench.contracts import MetricContext, MetricInfo
from hypersd_bench.errors import InputError


@dataclass
class Brightness:
    """Mean of all pixels, 0 to 255."""

    info = MetricInfo("toy/brightness", "Brightness", "higher", "level", "image")

    def __call__(self, context: MetricContext) -> Brightness:
        return self

    def score(self, images: Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
        assert len(images) == len(prompts)
        return images.double().mean((1, 2, 3)).numpy()


@dataclass
class ColourDistance:
    """Distance between mean colours; the reference is mid-grey."""

    info = MetricInfo("toy/colour", "Colour distance", "lower", "levels", "set")

    def __call__(self, context: MetricContext) -> ColourDistance:
        return self

    def features(self, images: Tensor) -> NDArray[np.float32]:
        return images.float().mean((2, 3)).numpy()

    def reference(self) -> NDArray[np.float32]:
        return np.full((4, 3), 128, np.float32)

    def distance(self, features: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
        return float(np.linalg.norm(features.mean(0) - reference.mean(0)))


@dataclass
class Absent:
    """A metric whose weights are never here."""

    info = MetricInfo("toy/absent", "Absent", "higher", "level", "image")

    def __call__(self, context: MetricContext) -> Brightness:
        raise InputError("its weights are not here; put them there")


BRIGHTNESS, COLOUR, ABSENT = Brightness(), ColourDistance(), Absent()
