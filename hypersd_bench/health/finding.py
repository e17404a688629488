"""What an examination of the machine finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "bad"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at, and what to do about it where it is not ``ok``.

    state: ``ok``; ``note``, worth knowing before numbers are published; ``bad``, won't work.
    """

    name: str
    state: State
    detail: str
    remedy: str = ""
