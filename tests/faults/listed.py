"""The list of faults, and the code with one of them in it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[2]


class Fault(NamedTuple):
    """A change of one place of a file, in words, and the test files that must notice."""

    file: str
    was: str
    now: str
    fault: str
    tests: tuple[str, ...]


def listed() -> list[Fault]:
    """All faults, by the part of the product that they are in."""
    parts = yaml.safe_load((Path(__file__).parent / "faults.yaml").read_text())
    return [Fault(**{**row, "tests": tuple(row["tests"].split())}) for rows in parts.values() for row in rows]


def with_fault(fault: Fault, code: str) -> str:
    """The code with the fault; ValueError unless its place is there, and once."""
    if code.count(fault.was) != 1:
        raise ValueError(f"{fault.file} holds {fault.was!r} {code.count(fault.was)} times, not once")
    return code.replace(fault.was, fault.now)
