"""What a metric, a method and a verb must offer. The core calls these; the packages above it implement them.

No torch here: contracts are read by ``--help``, the store, the reports and the study.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Direction = Literal["higher", "lower"]
Kind = Literal["image", "prompt", "pair", "set"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """A metric's declaration of itself; reports and comparisons read it nowhere else.

    id: protocol id, ``family/variant`` (``clip-score/vit-b-32``): numbers of different ids are never compared.
    label: what a table heading says. direction: which way is better. unit: ``cosine x100``, ``rating``, ``distance``.
    kind: what a value is of. ``image``: an image and its prompt; ``prompt``: an image among the others of its prompt;
    ``pair``: an image and the teacher's from the same noise; ``set``: all images of a model and step count.
    version: raised whenever the same images would get other numbers. note: what a reader must know.
    features: id of the extractor it reads; empty where it reads images. statistic: of a set metric, the row of
    ``metrics.set_statistics`` that makes a number of features. min_images: a set of fewer has no value. min_size:
    pixels that an image's short side must have.
    """

    id: str
    label: str
    direction: Direction
    unit: str
    kind: Kind
    version: str = "1"
    note: str = ""
    features: str = ""
    statistic: str = ""
    min_images: int = 2
    min_size: int = 1

    @property
    def per_image(self) -> bool:
        """Whether there is one value per image, and not one for all of them."""
        return self.kind != "set"


@dataclass(frozen=True, slots=True)
class MetricContext:
    """What metrics are built from: the device to run on, and what those built before have loaded."""

    device: str = "cpu"
    loaded: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def share(self, key: str, load: Callable[[], T]) -> T:
        """What was loaded under ``key`` before, or else what ``load`` loads now: metrics share networks by it."""
        if key not in self.loaded:
            self.loaded[key] = load()
        found: T = self.loaded[key]
        return found


class Extractor(Protocol):
    """A network with its preprocessing: images to the features that several metrics read, each image once.

    id: network and preprocessing, ``inception/clean``. fingerprint: changes whenever the same image would get other
    features (the weights' hash, the preprocessing's version); features kept on disk are of one fingerprint.
    """

    @property
    def id(self) -> str:
        """Its id."""
        ...

    @property
    def fingerprint(self) -> str:
        """What its features are of."""
        ...

    def __call__(self, images: Tensor) -> NDArray[np.float32]:
        """Extract features from images (N, 3, H, W) uint8 RGB of one size: (N, d) float32."""
        ...


@runtime_checkable
class ImageMetric(Protocol):
    """A metric with one value per image, whatever the other images are."""

    info: MetricInfo

    def score(self, images: Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Score images (N, 3, H, W) uint8 RGB against their N prompts; returns (N,) float64."""
        ...


@runtime_checkable
class FeatureMetric(Protocol):
    """A metric with one value per image, of kind ``image``, that reads an extractor's features."""

    info: MetricInfo
    extractor: Extractor

    def score_features(self, features: NDArray[np.float32], prompts: Sequence[str]) -> NDArray[np.float64]:
        """Score N images' features (N, d) against their N prompts; returns (N,) float64."""
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


@dataclass(frozen=True, eq=False)
class ReferenceMoments:
    """A reference set known by statistics alone, as some are published: n images (0: unknown), mean (d,), and the
    unbiased covariance (d, d), float64.
    """

    n: int
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]


@runtime_checkable
class SetMetric(Protocol):
    """A metric of a whole set of images: its features beside a reference set's."""

    info: MetricInfo
    extractor: Extractor

    def distance(self, features: NDArray[np.float32], reference: NDArray[np.float32] | ReferenceMoments) -> float:
        """The metric's value for (N, d) features against (M, d) reference features, or statistics of them."""
        ...


Metric = ImageMetric | FeatureMetric | PromptMetric | PairMetric | SetMetric


class MetricFactory(Protocol):
    """What a metric's registry row points to.

    It may have ``needs``, what it loads in words, and ``lacks()``, why it can't be computed here as things are
    (empty where it can; weights that the hub would be asked for are not here); ``list metrics`` shows both.
    """

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
