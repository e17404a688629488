"""Prompt sets: pinned by name and hash, or read from a file."""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

from hypersd_bench import registry
from hypersd_bench.errors import InputError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt; its id names its images and its noise."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class PromptSet:
    """A named list of prompts. Bounded sets are cut to what the spec asks for; order never changes."""

    id: str
    prompts: tuple[Prompt, ...]

    @property
    def sha256(self) -> str:
        """Hash of ids and texts, in order."""
        return hashlib.sha256("\n".join(f"{p.id}\t{p.text}" for p in self.prompts).encode()).hexdigest()

    def first(self, count: int | None) -> PromptSet:
        """The first ``count`` prompts; InputError when there are fewer."""
        if count is None:
            return self
        if not 0 < count <= len(self.prompts):
            raise InputError(f"prompt set {self.id} has {len(self.prompts)} prompts; {count} were asked for")
        return PromptSet(self.id, self.prompts[:count])


def load_prompts(name: str, folder: Path = Path()) -> PromptSet:
    """Load a registered prompt set, or a file: .txt (one prompt a line) or .tsv/.csv with a column ``prompt``.

    Relative paths are taken from ``folder`` (where the spec lies).
    """
    path = (folder / name).expanduser()
    if name in registry.rows("prompts") or not (path.suffix in (".txt", ".tsv", ".csv") or path.exists()):
        prompts: PromptSet = registry.resolve("prompts", name)()
        return prompts
    return _from_texts(name, _read_texts(path), path)


def _read_texts(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"can't read prompt file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"prompt file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        raise InputError(f"prompt file {path} is not a text file")
    if path.suffix not in (".tsv", ".csv"):
        return text.splitlines()
    # quotes are part of a tab-separated prompt ("G I G G L E" in PartiPrompts), a CSV's are not
    tabs = path.suffix == ".tsv"
    rows = csv.DictReader(
        io.StringIO(text), delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    )
    column = next((name for name in rows.fieldnames or () if name.lower() == "prompt"), None)
    if column is None:
        raise InputError(f"prompt file {path} has no column 'prompt'; its first line must name its columns")
    return [row[column] or "" for row in rows]


def _from_texts(name: str, texts: list[str], path: Path) -> PromptSet:
    kept = [" ".join(text.split()) for text in texts if text.strip()]
    if not kept:
        raise InputError(f"prompt file {path} holds no prompt")
    return PromptSet(name, tuple(Prompt(f"p{i:05d}", text) for i, text in enumerate(kept)))
