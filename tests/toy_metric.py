"""Metrics made for tests, one of each kind: all are about how bright images are, or what colour."""

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
class Spread:
    """How far an image's brightness is from the mean of its prompt's images."""

    info = MetricInfo("toy/spread", "Spread", "higher", "levels", "prompt")

    def __call__(self, context: MetricContext) -> Spread:
        return self

    def score_group(self, images: Tensor, prompt: str) -> NDArray[np.float64]:
        assert len(images) > 1
        levels: NDArray[np.float64] = images.double().mean((1, 2, 3)).numpy()
        spread: NDArray[np.float64] = np.abs(levels - levels.mean())
        return spread


@dataclass
class Darker:
    """How much darker an image is than the teacher's."""

    info = MetricInfo("toy/darker", "Darker", "lower", "levels", "pair")

    def __call__(self, context: MetricContext) -> Darker:
        return self

    def score_pairs(self, images: Tensor, others: Tensor) -> NDArray[np.float64]:
        difference: NDArray[np.float64] = (others.double() - images.double()).mean((1, 2, 3)).numpy()
        return difference


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


BRIGHTNESS, SPREAD, DARKER, COLOUR, ABSENT = Brightness(), Spread(), Darker(), ColourDistance(), Absent()
