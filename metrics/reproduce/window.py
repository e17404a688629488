"""The window around a published number in which ours counts as the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["inside", "outside", "not comparable", "not measured"]
Z = 1.96  # of a 95 % interval
# How far two stacks lie apart at fixed noise and prompts: what MLPerf Inference accepts of SDXL (mlcommons/inference),
# relative to the value. Of other families no such figure is known, and none is allowed for.
CROSS_STACK = {"clip-score": 0.002, "clip-s": 0.002, "fid": 0.02, "patch-fid": 0.02}


@dataclass(frozen=True, slots=True)
class Window:
    """From ``low`` to ``high`` in our unit. published: the source says it; else ``parts`` add up to its half."""

    low: float
    high: float
    published: bool = False
    parts: Mapping[str, float] = field(default_factory=dict)

    def holds(self, value: float) -> bool:
        """Whether a value is inside, ends included."""
        return self.low <= value <= self.high


def published_window(ends: tuple[float, float], scale: float = 1.0) -> Window:
    """A window that the source itself gives."""
    return Window(ends[0] * scale, ends[1] * scale, published=True)


def computed_window(
    published: float,
    digits: int,
    half_width: float,
    n: int,
    n_published: int | None,
    metric: str,
    scale: float = 1.0,
) -> Window:
    """The published value (``digits`` decimals), times ``scale``, give or take the sum of three parts.

        rounding   half a unit of its last printed digit
        sampling   1.96 sqrt(SE_ours^2 + SE_theirs^2)
        stack      CROSS_STACK of the metric's family, times the value

    half_width: of our 95 % interval, so SE_ours = half_width / 1.96. Papers print no interval; SE_theirs is taken to be
    ours times sqrt(n / n_published), and the same as ours where n_published is unknown. n: our prompts. Where both
    took the same prompts, their difficulty is shared and the window is too wide: it errs to "inside".

    Raises ValueError for an interval that is none (NaN, as one prompt gives) and for no prompts.
    """
    if not math.isfinite(half_width) or half_width < 0 or n < 1 or (n_published is not None and n_published < 1):
        raise ValueError(f"no interval of half-width {half_width} from {n} against {n_published} prompts")
    value, ours = published * scale, half_width / Z
    theirs = ours * math.sqrt(n / n_published) if n_published else ours
    parts = {
        "rounding": 0.5 * 10**-digits * scale,
        "sampling": Z * math.hypot(ours, theirs),
        "stack": CROSS_STACK.get(family_of(metric), 0.0) * abs(value),
    }
    half = sum(parts.values())
    return Window(value - half, value + half, parts=parts)


def family_of(metric: str) -> str:
    """The family of a protocol id: ``fid`` of ``fid/clean``."""
    return metric.partition("/")[0]


def is_biased_by_count(metric: str) -> bool:
    """Whether a metric's value depends on how many images there are: a Fréchet distance's bias falls as 1/N."""
    return family_of(metric) in ("fid", "patch-fid")


def votes_needed(rate: float, half_width: float = 0.05) -> int:
    """Independent votes after which Wilson's 95 % interval of a rate is at most ``half_width`` to each side.

    Wilson 1927: half = z / (1 + z^2/n) sqrt(p (1 - p) / n + z^2 / 4 n^2), which falls as n grows.
    """
    low, high = 1, 2
    while _wilson_half(rate, high) > half_width:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _wilson_half(rate, middle) > half_width else (low, middle)
    return high


def _wilson_half(p: float, n: int) -> float:
    return Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
