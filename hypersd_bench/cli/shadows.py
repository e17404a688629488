"""Our packages have common names; a user's own ``metrics.py`` or ``reports/`` can be found before ours."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import hypersd_bench
from hypersd_bench.errors import InputError

PACKAGES = ("metrics", "distill", "user_study", "reports")


def refuse_shadows() -> None:
    """Raise InputError naming the first package that would be imported from anywhere but beside the core."""
    assert hypersd_bench.__file__
    home = Path(hypersd_bench.__file__).resolve().parents[1]
    for name in PACKAGES:
        found = _location(name)
        if found is None:
            raise InputError(f"the package {name!r} is missing from {home}; install hypersd-bench again")
        if found.parent != home:
            raise InputError(
                f"{found} shadows this program's own package {name!r}; start from another folder and by the installed "
                f"command (hypersd-bench, not python -m), or take {found.parent} off PYTHONPATH"
            )


def _location(name: str) -> Path | None:
    """The folder or file that ``import name`` would load; nothing is imported."""
    spec = find_spec(name)
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or []) or [spec.origin or ""]
    return Path(places[0]).resolve()
