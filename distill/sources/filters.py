"""Which images are good enough to learn from (Hyper-SD follows SDXL-Lightning, arXiv 2402.13929: LAION and COYO images
of at least 1024 px with an aesthetic score above 5.5, blurred ones left out by the variance of the Laplacian)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.sources.contract import Catalogue
from hypersd_bench.errors import InputError


@dataclass(frozen=True, slots=True)
class Filters:
    """Lower bounds; None leaves a filter out.

    min_side: of the shorter side of the stored picture, pixels. min_aesthetic: the score the data carry must exceed
    it. min_sharpness: variance of the Laplacian of the picture at training size, so that it means the same for
    pictures of every stored size; known only once a picture is decoded. The papers state no value for it.
    """

    min_side: int | None = None
    min_aesthetic: float | None = None
    min_sharpness: float | None = None

    def __post_init__(self) -> None:
        if self.min_side is not None and self.min_side < 1:
            raise InputError(f"min_side is {self.min_side} pixels; give a positive number or leave it out")
        if self.min_sharpness is not None and self.min_sharpness < 0:
            raise InputError(f"min_sharpness is {self.min_sharpness}; a variance is never below 0")


PAPER = Filters(min_side=1024, min_aesthetic=5.5)


def sift(catalogue: Catalogue, filters: Filters, name: str) -> tuple[NDArray[np.int64], dict[str, int]]:
    """Indices that pass what can be told without decoding, and how many each filter takes, the first that does.

    Broken samples are neither. An unknown size passes here and is looked at when decoded; an unknown aesthetic score
    does not pass, and is counted by itself.
    """
    left = np.ones(len(catalogue), bool)
    left[list(catalogue.broken)] = False
    counts: dict[str, int] = {}

    def take(reason: str, bad: NDArray[np.bool_]) -> None:
        counts[reason] = int((left & bad).sum())
        left[bad] = False

    if filters.min_side is not None:
        side = np.minimum(catalogue.numbers("width"), catalogue.numbers("height"))
        take("min_side", (side > 0) & (side < filters.min_side))
    if filters.min_aesthetic is not None:
        score = catalogue.numbers("aesthetic")
        if len(score) and np.isnan(score).all():
            raise InputError(
                f"data {name!r} carry no aesthetic score, so min_aesthetic can't be applied; leave it out or add the "
                "field 'aesthetic' to the metadata"
            )
        take("no_aesthetic_score", np.isnan(score))
        take("min_aesthetic", ~np.isnan(score) & (score <= filters.min_aesthetic))
    return np.flatnonzero(left), counts
