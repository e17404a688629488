"""What the registry's metric rows point to: a metric's declaration, what it needs, and how it is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Generic, TypeVar

from hypersd_bench.contracts import Metric, MetricContext, MetricInfo
from hypersd_bench.errors import InputError
from metrics.weights import Weights

M = TypeVar("M", bound=Metric, covariant=True)


@dataclass(frozen=True, slots=True)
class Package:
    """A Python package that is not among this program's own, and how it is installed."""

    module: str
    install: str

    def is_here(self) -> bool:
        """Whether it can be imported."""
        return find_spec(self.module) is not None


@dataclass(frozen=True, slots=True)
class Factory(Generic[M]):
    """A MetricFactory; ``build`` loads what the metric needs and raises InputError when something is missing.

    weights: the files it loads. packages: what must be installed for it.
    """

    info: MetricInfo
    build: Callable[[MetricInfo, MetricContext], M]
    weights: tuple[Weights, ...] = ()
    packages: tuple[Package, ...] = ()

    def __call__(self, context: MetricContext) -> M:
        """Build the metric on the context's device."""
        for package in self.packages:
            if not package.is_here():
                raise InputError(f"{self.info.id} needs {package.module}: {package.install}")
        return self.build(self.info, context)

    @property
    def needs(self) -> tuple[str, ...]:
        """What it loads, in words; empty where all comes with this program."""
        return (*(one.what for one in self.weights), *(f"package {one.module}" for one in self.packages))

    def lacks(self) -> str:
        """Why it can't be computed here as things are; empty where it can. Nothing is asked of a network."""
        for package in self.packages:
            if not package.is_here():
                return f"not installed: {package.install}"
        absent = [one.what for one in self.weights if not one.is_here()]
        if len(absent) == len(self.weights):
            return "to be downloaded" if absent else ""
        return f"to be downloaded: {', '.join(absent)}" if absent else ""
