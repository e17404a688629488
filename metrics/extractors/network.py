"""What all extractors share: batches, float32 whatever the pipeline ran in, and one load for all metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from hypersd_bench.contracts import Extractor, MetricContext
from hypersd_bench.hub import file_sha256
from metrics.factory import Package
from metrics.weights import Weights

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

BATCH_SIZE = 32
E = TypeVar("E", bound=Extractor, covariant=True)


@dataclass(frozen=True, slots=True)
class NetworkExtractor:
    """An Extractor; ``network`` takes images (n, 3, H, W) uint8 RGB, on any device, to features (n, d)."""

    id: str
    fingerprint: str
    network: Callable[[Tensor], Tensor]

    def __call__(self, images: Tensor) -> NDArray[np.float32]:
        """Extract features from images (N, 3, H, W) uint8 RGB of one size: (N, d) float32."""
        return extract(self.network, images)


@dataclass(frozen=True, slots=True)
class Source(Generic[E]):
    """An extractor that metrics name before it is loaded: what it needs, and how it is built from its id."""

    id: str
    build: Callable[[str, MetricContext], E]
    weights: tuple[Weights, ...] = ()
    packages: tuple[Package, ...] = ()

    def load(self, context: MetricContext) -> E:
        """The extractor, loaded for the first metric that asks; raises InputError when something is missing."""
        return context.share(self.id, lambda: self.build(self.id, context))


def extract(network: Callable[[Tensor], Tensor], images: Tensor) -> NDArray[np.float32]:
    """Run a network over images (N, 3, H, W) in batches: (N, d) float32."""
    with full_precision():
        return np.concatenate([network(batch).float().cpu().numpy() for batch in images.split(BATCH_SIZE)])


@contextmanager
def full_precision() -> Iterator[None]:
    """Leave autocast and TF32, and keep no gradient: a feature must not depend on what the pipeline ran in."""
    import torch

    with (
        torch.inference_mode(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        yield


def fingerprint(digest: str, version: int) -> str:
    """What features are of: the weights' SHA-256, and the version of the preprocessing that the id names."""
    return f"{digest[:16]}-v{version}"


def file_fingerprint(weights: Path, version: int) -> str:
    """``fingerprint`` of a file."""
    return fingerprint(file_sha256(weights), version)
