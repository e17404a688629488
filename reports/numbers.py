"""How numbers are written: as many decimals as their uncertainty bears, the same in a whole column."""

from __future__ import annotations

from collections.abc import Iterable
from math import floor, log10
from statistics import median
from typing import Protocol

MINUS = "\u2212"


class Ends(Protocol):
    """Anything with an interval, or without one."""

    @property
    def low(self) -> float | None:
        """The lower end."""

    @property
    def high(self) -> float | None:
        """The upper end."""


def decimals(intervals: Iterable[Ends]) -> int:
    """Choose 0 to 4 decimals by the column's typical half interval, so that rounding loses a tenth of it at most.

    A half interval of 0.05 to 0.5 gets two decimals, 0.5 to 5 one; a column without intervals gets two.
    """
    halves = [(x.high - x.low) / 2 for x in intervals if x.low is not None and x.high is not None]
    typical = median(halves) if halves else 0.0
    if typical <= 0:
        return 2
    return min(4, max(0, -floor(log10(typical / 5))))


def fixed(value: float, places: int, *, signed: bool = False) -> str:
    """Write a number with fixed decimals and a true minus sign; never a negative zero."""
    text = f"{value:{'+' if signed else ''}.{places}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def interval(low: float | None, high: float | None, places: int, *, signed: bool = False) -> str:
    """Write an interval as ``[low, high]``; empty where there is none."""
    if low is None or high is None:
        return ""
    return f"[{fixed(low, places, signed=signed)}, {fixed(high, places, signed=signed)}]"


def milliseconds(value: float) -> str:
    """Write a latency with three significant digits, at most one decimal: ``12.3``, ``456``, ``7,890``."""
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def percent(share: float) -> str:
    """Write a share as a whole percentage: ``61 %``."""
    return f"{100 * share:.0f} %"


def gibibytes(count: float) -> str:
    """Write bytes as GiB with two decimals."""
    return f"{count / 2**30:,.2f}"
