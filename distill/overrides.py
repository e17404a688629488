"""``--set key=value``: any setting of a preset or of the data by its dotted name, checked for name and type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from hypersd_bench.errors import InputError, unknown_name

T = TypeVar("T")


def override(settings: T, assignments: Sequence[str]) -> T:
    """Settings (a dataclass) with assignments like ``hyper_sd.feedback_ratio=0.5`` laid over them, values in YAML.

    Raises InputError for an unknown name, with the nearest known one, and for a value of another type.
    """
    values = asdict(settings)  # type: ignore[call-overload]  # T is a dataclass
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise InputError(f"--set {assignment!r} is no assignment; write --set NAME=VALUE")
        _set(settings, values, name.strip(), _value(text, assignment))
    try:
        return TypeAdapter(type(settings)).validate_python(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise InputError(f"--set {where}: {problem['msg'][0].lower()}{problem['msg'][1:]}") from None


def _value(text: str, assignment: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {assignment!r}: the value is not YAML; quote it") from error
    return tuple(value) if isinstance(value, list) else _number(value)


def _number(value: Any) -> Any:
    """1e-4 is a number to everybody but YAML, which wants 1.0e-4."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def _set(settings: Any, values: dict[str, Any], name: str, value: Any) -> None:
    level: Any = settings
    *groups, last = name.split(".")
    for part in (*groups, last):
        known = [field.name for field in fields(level)] if is_dataclass(level) else []
        if part not in known:
            raise unknown_name("setting", name, _names(settings))
        level = getattr(level, part)
    for group in groups:
        values = values[group]
    values[last] = value


def _names(settings: Any, prefix: str = "") -> list[str]:
    found = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        found += _names(value, f"{prefix}{field.name}.") if is_dataclass(value) else [f"{prefix}{field.name}"]
    return found
