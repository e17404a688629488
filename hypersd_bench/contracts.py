"""What a metric, a method and a verb must offer. The core calls these; the packages above it implement them.

No torch here: contracts are read by ``--help``, the store, the reports and the study.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Direction = Literal["higher", "lower"]
Kind = Literal["image", "prompt", "pair", "set"]


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """A metric's declaration of itself; reports and comparisons read it nowhere else.

    id: protocol id, ``family/variant`` (``clip-score/vit-b-32``): numbers of different ids are never compared.
    label: what a table heading says. direction: which way is better. unit: ``cosine x100``, ``rating``, ``distance``.
    kind: what a value is of. ``image``: an image and its prompt; ``prompt``: an image among the others of its prompt;
    ``pair``: an image and the teacher's from the same noise; ``set``: all images of a model and step count.
    version: raised whenever the same images would get other numbers. note: what a reader must know.
    """

    id: str
    label: str
    direction: Direction
    unit: str
    kind: Kind
    version: str = "1"
    note: str = ""

    @property
    def per_image(self) -> bool:
        """Whether there is one value per image, and not one for all of them."""
        return self.kind != "set"


@dataclass(frozen=True, slots=True)
class MetricContext:
    """What a metric is built from: the device to run on, and the reference images of set metrics (None: its own).

    scenes: whether the images to score are of the miniature's scenes, which a metric's own reference may be made of.
    """

    device: str = "cpu"
    reference: Path | None = None
    scenes: bool = True


@runtime_checkable
class ImageMetric(Protocol):
    """A metric with one value per image, whatever the other images are."""

    info: MetricInfo

    def score(self, images: Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Score images (N, 3, H, W) uint8 RGB against their N prompts; returns (N,) float64."""
        ...


@runtime_checkable
class PromptMetric(Protocol):
    """A metric of an image among the others of its prompt, made by the same model in as many steps from other noise."""

    info: MetricInfo

    def score_group(self, images: Tensor, prompt: str) -> NDArray[np.float64]:
        """Score all images (R, 3, H, W) uint8 RGB of one prompt, R at least 2; returns (R,) float64."""
        ...


@runtime_checkable
class PairMetric(Protocol):
    """A metric of an image beside the teacher's image of the same prompt and noise."""

    info: MetricInfo

    def score_pairs(self, images: Tensor, others: Tensor) -> NDArray[np.float64]:
        """Score images (N, 3, H, W) uint8 RGB, each against the same row of others; returns (N,) float64."""
        ...


@runtime_checkable
class SetMetric(Protocol):
    """A metric of a whole set of images: a distance between its features and a reference's."""

    info: MetricInfo

    def features(self, images: Tensor) -> NDArray[np.float32]:
        """Extract features from images (N, 3, H, W) uint8 RGB; returns (N, d) float32."""
        ...

    def reference(self) -> NDArray[np.float32]:
        """The reference's features, (M, d) float32; computed once."""
        ...

    def distance(self, features: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
        """The metric's value for (N, d) features against (M, d) reference features."""
        ...


Metric = ImageMetric | PromptMetric | PairMetric | SetMetric


class MetricFactory(Protocol):
    """What a metric's registry row points to."""

    info: MetricInfo

    def __call__(self, context: MetricContext) -> Metric:
        """Load whatever the metric needs; raises InputError naming the remedy when something is missing."""
        ...


@dataclass(frozen=True, slots=True)
class Verb:
    """A command of the program: where it is, and what ``--help`` says of it without importing it."""

    target: str  # "reports.cli:report"
    summary: str


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where and with what something was made."""

    created: str  # ISO 8601, UTC
    git: str
    packages: dict[str, str]
    python: str
    machine: str
    device: str
    driver: str = ""  # of the GPU; empty on a CPU
    cuda: str = ""  # that torch was built for; empty on a CPU

    def to_json(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return {name: getattr(self, name) for name in self.__slots__}
