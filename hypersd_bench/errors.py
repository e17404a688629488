"""The errors a user can meet.

HypersdBenchError
+-- InputError        exit 2: the input is wrong; the message says what, where, and what to do
+-- CheckFailed       exit 1: a check or a gate did not hold
"""

from __future__ import annotations

from collections.abc import Iterable

_OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


class HypersdBenchError(Exception):
    """Shown to the user as one line, without a traceback."""

    exit_code = 2


class InputError(HypersdBenchError):
    """Bad input: an unknown name, a broken file, a setting that cannot work."""


class CheckFailed(HypersdBenchError):
    """A check or gate that the user asked for did not hold."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """An error's first line without its full stop, for a one-line message; the error's name where it says nothing."""
    return (str(error).strip().splitlines() or [""])[0].rstrip(". ") or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or here; torch's own class is told by its name."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)


def unknown_name(kind: str, name: str, known: Iterable[str], where: str = "") -> InputError:
    """Build the error for a name nobody knows, naming the nearest one known."""
    from rapidfuzz import process

    names = sorted(known)
    match = process.extractOne(name, names, score_cutoff=55)
    hint = f"did you mean {match[0]!r}?" if match else f"known: {', '.join(names) or 'none'}"
    return InputError(f"unknown {kind} {name!r}{f' in {where}' if where else ''}; {hint}")
