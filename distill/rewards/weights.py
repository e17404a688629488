"""Where the judges' files are: an environment variable, else the hub's cache; nothing here downloads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypersd_bench.errors import InputError
from metrics.backbones import local_weights


def _cached(hub_repo: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_repo, file)
    return Path(found) if isinstance(found, str) else None


def hub_file(what: str, variable: str, hub_repo: str, file: str) -> Path:
    """Find one file of a hub repository; InputError with the remedy if it is not on this machine."""
    return local_weights(what, variable, _cached(hub_repo, file), f"hf download {hub_repo} {file}")


def hub_folder(what: str, variable: str, hub_repo: str, files: tuple[str, ...]) -> Path:
    """Find a folder that holds all ``files`` of a hub repository; InputError with the remedy if there is none."""
    named = os.environ.get(variable)
    cached = _cached(hub_repo, files[0])
    folder = Path(named) if named else cached and cached.parent
    if folder is None:
        remedy = f"hf download {hub_repo} {' '.join(files)}"
        raise InputError(f"{what}: its files are not on this machine; {remedy}, or set {variable} to their folder")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        where = variable if named else hub_repo
        raise InputError(f"{what}: {', '.join(missing)} missing in {folder} ({where}); hf download {hub_repo}")
    return folder


@contextmanager
def loading(what: str, path: Path) -> Iterator[None]:
    """Turn whatever a library makes of a broken or foreign file, each has its own, into an InputError."""
    try:
        yield
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"can't load {what} from {path}: {reason}; download it again") from error
