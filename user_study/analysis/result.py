"""The analysis of a study as one value: printable as JSON, read by the report."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

VERSION = 2


@dataclass(frozen=True)
class CriterionResult:
    """What the votes on one criterion say; the fields are plain JSON, as the modules of their names describe."""

    criterion: str
    rates: list[dict[str, Any]]
    rankings: list[dict[str, Any]]
    agreement: dict[str, Any]
    sensitivity: list[dict[str, Any]]
    metrics: dict[str, Any]
    axes: list[dict[str, Any]]
    pairs: list[dict[str, Any]]


@dataclass(frozen=True)
class Analysis:
    """The whole analysis.

    run: the spec hash of the images' run. excluded: raters that the main analysis leaves out, where the design says so.
    """

    study: str
    design_hash: str
    run: str
    planned_rate: float
    rules: dict[str, Any]
    counts: dict[str, Any]
    sides: dict[str, Any] | None
    raters: list[dict[str, Any]]
    excluded: list[str]
    criteria: list[CriterionResult]
    deviations: list[str]
    wording: dict[str, Any]
    session: dict[str, Any]
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; what is not defined (NaN) is null."""
        plain: dict[str, Any] = _finite(asdict(self))
        return plain


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
