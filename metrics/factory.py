"""What the registry's metric rows point to: a metric's declaration, and how it is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from hypersd_bench.contracts import Metric, MetricContext, MetricInfo

M = TypeVar("M", bound=Metric, covariant=True)


@dataclass(slots=True)
class Factory(Generic[M]):
    """A MetricFactory; ``build`` loads what the metric needs and raises InputError when something is missing."""

    info: MetricInfo
    build: Callable[[MetricInfo, MetricContext], M]

    def __call__(self, context: MetricContext) -> M:
        """Build the metric on the context's device."""
        return self.build(self.info, context)
