"""Metrics made for tests, one of each kind: all are about how bright images are, or what colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hypersd_bench.contracts import MetricContext, MetricInfo, ReferenceMoments
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
class MeanColour:
    """An image's mean colour as its features; counts the images that pass."""

    id: str = "toy/mean-colour"
    fingerprint: str = "1"
    seen: int = 0

    def __call__(self, images: Tensor) -> NDArray[np.float32]:
        self.seen += len(images)
        return images.float().mean((2, 3)).numpy()


MEAN_COLOUR = MeanColour()


@dataclass
class ColourDistance:
    """Distance between mean colours."""

    info = MetricInfo("toy/colour", "Colour distance", "lower", "levels", "set", features=MEAN_COLOUR.id)
    extractor = MEAN_COLOUR

    def __call__(self, context: MetricContext) -> ColourDistance:
        return self

    def distance(self, features: NDArray[np.float32], reference: NDArray[np.float32] | ReferenceMoments) -> float:
        mean = reference.mean if isinstance(reference, ReferenceMoments) else reference.mean(0)
        return float(np.linalg.norm(features.mean(0) - mean))


@dataclass
class Redness:
    """How much red is in an image's mean colour."""

    info = MetricInfo("toy/redness", "Redness", "higher", "levels", "image", features=MEAN_COLOUR.id)
    extractor = MEAN_COLOUR

    def __call__(self, context: MetricContext) -> Redness:
        return self

    def score_features(self, features: NDArray[np.float32], prompts: Sequence[str]) -> NDArray[np.float64]:
        assert len(features) == len(prompts)
        return features[:, 0].astype(np.float64)


@dataclass
class Absent:
    """A metric whose weights are never here."""

    info = MetricInfo("toy/absent", "Absent", "higher", "level", "image")

    def __call__(self, context: MetricContext) -> Brightness:
        raise InputError("its weights are not here; put them there")


BRIGHTNESS, SPREAD, DARKER, ABSENT = Brightness(), Spread(), Darker(), Absent()
COLOUR, REDNESS = ColourDistance(), Redness()
