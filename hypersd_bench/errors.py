"""The errors a user can meet.

HypersdBenchError
+-- InputError        exit 2: the input is wrong; the message says what, where, and what to do
+-- CheckFailed       exit 1: a check or a gate did not hold
"""

from __future__ import annotations

from collections.abc import Iterable


class HypersdBenchError(Exception):
    """Shown to the user as one line, without a traceback."""

    exit_code = 2


class InputError(HypersdBenchError):
    """Bad input: an unknown name, a broken file, a setting that cannot work."""


class CheckFailed(HypersdBenchError):
    """A check or gate that the user asked for did not hold."""

    exit_code = 1


def unknown_name(kind: str, name: str, known: Iterable[str], where: str = "") -> InputError:
    """Build the error for a name nobody knows, naming the nearest one known."""
    from rapidfuzz import process

    names = sorted(known)
    match = process.extractOne(name, names, score_cutoff=55)
    hint = f"did you mean {match[0]!r}?" if match else f"known: {', '.join(names) or 'none'}"
    return InputError(f"unknown {kind} {name!r}{f' in {where}' if where else ''}; {hint}")
