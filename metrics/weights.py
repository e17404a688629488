"""The files that metrics' networks need: where they are on this machine, or else where they are downloaded from.

An environment variable names a file of one's own; otherwise it comes from the hub (``hypersd_bench.hub``) or its
owner's page into the usual cache, once. HF_HUB_OFFLINE keeps all of it from the network.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Protocol

from hypersd_bench import download
from hypersd_bench.errors import InputError, first_line
from hypersd_bench.hub import fetch_file, file_sha256


class Weights(Protocol):
    """A file, or a folder of files, that a metric needs."""

    @property
    def what(self) -> str:
        """What it is, in a few words: ``CLIP ViT-B/32``."""
        ...

    def path(self) -> Path:
        """Where it is; downloaded if need be. Raises InputError with the remedy when it can't be had."""
        ...

    def is_here(self) -> bool:
        """Whether nothing must be downloaded for it."""
        ...


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a hub repository. sha256: of its content, or first digits of it; empty where none is published."""

    what: str
    variable: str
    repo: str
    file: str
    sha256: str = ""

    def path(self) -> Path:
        """Where it is; downloaded if need be."""
        found = _named(self.variable, self.what) or _explained(self.what, self.variable, self.repo, self.file)
        require_sha256(found, self.sha256)
        return found

    def is_here(self) -> bool:
        """Whether the variable names it or the hub's cache holds it."""
        return bool(os.environ.get(self.variable)) or _is_cached(self.repo, self.file)


@dataclass(frozen=True, slots=True)
class HubFolder:
    """Files of a hub repository that a library reads together, as a folder."""

    what: str
    variable: str
    repo: str
    files: tuple[str, ...]

    def path(self) -> Path:
        """The folder that holds them; downloaded if need be."""
        named = os.environ.get(self.variable)
        if not named:
            found = [_explained(self.what, self.variable, self.repo, file) for file in self.files]
            return found[0].parent
        missing = [file for file in self.files if not (Path(named) / file).is_file()]
        if missing:
            raise InputError(f"{self.what}: {', '.join(missing)} missing in {named} ({self.variable}); "
                             f"hf download {self.repo}")  # fmt: skip
        return Path(named)

    def is_here(self) -> bool:
        """Whether the variable names it or the hub's cache holds all of it."""
        return bool(os.environ.get(self.variable)) or all(_is_cached(self.repo, file) for file in self.files)


@dataclass(frozen=True, slots=True)
class WebFile:
    """A file that its owner publishes outside the hub; torch hub's cache is looked into as well."""

    what: str
    variable: str
    file: download.OwnerFile

    def path(self) -> Path:
        """Where it is; downloaded if need be."""
        found = _named(self.variable, self.what)
        if found is None and _torch_hub(self.file.name).is_file():
            found = _torch_hub(self.file.name)
        if found is None:
            remedy = f"put it at {_torch_hub(self.file.name)}, or set {self.variable} to the file"
            return download.fetch(self.file, "weights", remedy)  # checked there
        require_sha256(found, self.file.sha256)
        return found

    def is_here(self) -> bool:
        """Whether the variable names it or a cache holds it."""
        cached = (_torch_hub(self.file.name), download.cache_folder("weights") / self.file.name)
        return bool(os.environ.get(self.variable)) or any(path.is_file() for path in cached)


def require_sha256(path: Path, digest: str) -> None:
    """Raise InputError unless the file's sha256 begins with ``digest``."""
    got = file_sha256(path)
    if not got.startswith(digest):
        raise InputError(
            f"{path} is not the file expected (sha256 {got[:12]}..., not {digest[:12]}...); delete it and run the "
            "same command again"
        )


@contextmanager
def loading(what: str, path: Path) -> Iterator[None]:
    """Turn whatever a library makes of a broken or foreign file, each has its own, into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"can't load {what} from {path}: {_said(error)}; download it again") from error


def _said(error: Exception) -> str:
    """An error's first line, and where that is a heading, as torch's of wrong keys is, the start of the next."""
    heading, _, rest = str(error).strip().partition("\n")
    return shorten(f"{heading} {rest}", 200) if heading.endswith(":") else first_line(error)


def _named(variable: str, what: str) -> Path | None:
    """The file that the user's environment names."""
    named = os.environ.get(variable)
    if named and not Path(named).is_file():
        raise InputError(f"{what}: {variable} is {named}, but there is no such file")
    return Path(named) if named else None


def _explained(what: str, variable: str, repo: str, file: str) -> Path:
    """A file of the hub; an error says what it is for, and how else it may be given."""
    try:
        return fetch_file(repo, file)
    except InputError as error:
        raise InputError(f"{what}: {error} (or hf download {repo} {file}, or set {variable})") from error


def _is_cached(repo: str, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, file), str)


def _torch_hub(name: str) -> Path:
    """Where torch hub keeps a file of this name, found without torch, whose import takes seconds."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TORCH_HOME") or cache / "torch").expanduser() / "hub" / "checkpoints" / name
