"""Prompt sets: registered ones come from their owners, pinned by hash; any other is read from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

from hypersd_bench import provenance, registry
from hypersd_bench.download import OwnerFile, cache_folder, fetch
from hypersd_bench.errors import InputError
from hypersd_bench.prompt_sets.tables import SUFFIXES, Row, read_rows

CACHED_AS = "prompts"
REMEDY = "download it elsewhere and give it with --prompts-file PATH (prompts_file in a spec)"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt; its id names its images and its noise."""

    id: str
    text: str
    category: str = ""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """A named list of prompts, and how it was cut from the whole.

    ``of`` is the length of the whole list, 0 where nothing was cut; ``source`` says which files it came from.
    """

    id: str
    prompts: tuple[Prompt, ...]
    source: str = ""
    license: str = ""
    of: int = 0
    selection: Literal["first", "random"] = "first"

    @property
    def sha256(self) -> str:
        """Hash of ids and texts, in order."""
        return hashlib.sha256("\n".join(f"{p.id}\t{p.text}" for p in self.prompts).encode()).hexdigest()

    def select(self, count: int | None, selection: Literal["first", "random"], seed: int) -> PromptSet:
        """Take ``count`` prompts, None for all: the first ones, or the first of an order drawn by ``seed``.

        A larger count extends a smaller one. InputError when there are fewer prompts than asked for.
        """
        whole = len(self.prompts)
        if count is not None and not 0 < count <= whole:
            raise InputError(f"prompt set {self.id} has {whole} prompts; {count} were asked for")
        if selection == "first":
            return self if count is None else replace(self, prompts=self.prompts[:count], of=whole)
        # keys of a hash, so that no release of Python or NumPy draws another order
        keys = {p.id: hashlib.blake2b(f"{seed}\t{p.id}".encode(), digest_size=16).digest() for p in self.prompts}
        drawn = sorted(self.prompts, key=lambda prompt: keys[prompt.id])
        return replace(self, prompts=tuple(drawn[:count]), of=whole, selection="random")


@dataclass(frozen=True, slots=True)
class PromptSource:
    """A registered prompt set: where its owner publishes it, under which licence, and how its files are read.

    Attributes:
        id: The row's name.
        count: How many prompts it has.
        license: The owner's licence, or that none is stated.
        url: The page where the owner publishes it.
        parse: Reads the files, in the order of ``files``, into texts with their categories.
        files: The owner's files; none for a set that is generated here.
        prompts_sha256: ``PromptSet.sha256`` of the whole list, empty where it is not known.
        note: What a reader of the list should know.
    """

    id: str
    count: int
    license: str
    url: str
    parse: Callable[[Sequence[Path]], Iterable[Row]]
    files: tuple[OwnerFile, ...] = ()
    prompts_sha256: str = ""
    note: str = ""

    @property
    def state(self) -> str:
        """``built in``, ``cached`` (the files are on this machine) or ``to download``."""
        if not self.files:
            return "built in"
        folder = cache_folder(CACHED_AS)
        return "cached" if all((folder / file.name).is_file() for file in self.files) else "to download"

    def load(self, file: Path | None = None) -> PromptSet:
        """Read the prompts from the owner's file at ``file`` (a folder, if there are several), or download them.

        InputError for a download that fails, a file that is not the owner's and prompts that are not the pinned ones.
        """
        paths = self._given(file) if file else [fetch(owner, CACHED_AS, REMEDY) for owner in self.files]
        try:
            return self._read(paths, [path.name for path in paths] if file else [owner.url for owner in self.files])
        except InputError:
            for owner, path in zip(self.files, paths, strict=True):
                if not file and not owner.pinned:
                    path.unlink(missing_ok=True)  # it may be a page that says to come back later
            raise

    def _read(self, paths: Sequence[Path], names: Sequence[str]) -> PromptSet:
        where = ", ".join(names) or self.id
        try:
            rows = list(self.parse(paths))
        except (ValueError, LookupError, TypeError, AttributeError, OSError, BadZipFile) as error:
            detail = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"{where}: not a file that {self.id} is published in ({detail})") from error
        source = "; ".join(f"{name} (sha256 {provenance.sha256(p)})" for name, p in zip(names, paths, strict=True))
        prompts = _numbered(self.id, rows, where, source or "generated", self.license)
        self._check(prompts, where)
        return prompts

    def _given(self, file: Path) -> list[Path]:
        """The files on the user's disk: ``file`` itself, or those in it if it is a folder."""
        if not self.files:
            raise InputError(f"prompt set {self.id} is generated here; leave prompts_file out")
        if not file.is_dir():
            if len(self.files) > 1:
                needed = ", ".join(Path(owner.name).name for owner in self.files)
                raise InputError(f"prompts_file {file}: {self.id} needs a folder that holds {needed}")
            paths = [file]
        else:
            paths = [file / Path(owner.name).name for owner in self.files]
        for path, owner in zip(paths, self.files, strict=True):
            if not path.is_file():
                raise InputError(f"can't read prompts_file {path}: no such file; {self.id} is published at {self.url}")
            if not self.prompts_sha256 and path.name == Path(owner.name).name:
                owner.check(path)
        return paths

    def _check(self, prompts: PromptSet, where: str) -> None:
        if len(prompts.prompts) != self.count:
            raise InputError(f"{where}: {len(prompts.prompts)} prompts, but {self.id} has {self.count}")
        if self.prompts_sha256 and prompts.sha256 != self.prompts_sha256:
            raise InputError(
                f"{where}: not the prompts of {self.id} (hash {prompts.sha256}, pinned {self.prompts_sha256}); "
                "to use them as they are, name the file itself as the prompt set"
            )


def load_prompts(name: str, folder: Path = Path(), file: Path | None = None) -> PromptSet:
    """Load a registered prompt set, or a file: .txt (one prompt a line), .csv, .tsv, .json, .jsonl or .parquet.

    A table has a column ``prompt``, ``caption`` or ``text``, and may have ``category``. A relative path in ``name``
    is taken from ``folder`` (where the spec lies). ``file`` is the owner's file of a registered set (a folder, if
    there are several), where it is not to be downloaded.
    """
    path = folder / Path(name).expanduser()
    if name in registry.rows("prompts") or not (path.suffix.lower() in SUFFIXES or path.exists()):
        source: PromptSource = registry.resolve("prompts", name)
        return source.load(file)
    if file:
        raise InputError(f"prompts_file {file} goes with a registered prompt set, but {name} is a file already")
    rows = read_rows(path)
    return _numbered(name, rows, f"prompt file {path}", f"{path.name} (sha256 {provenance.sha256(path)})", "")


def _numbered(name: str, rows: Iterable[Row], where: str, source: str, license: str) -> PromptSet:
    """Number the rows that hold a text, white space in them made one blank."""
    kept = [(" ".join(text.split()), " ".join(category.split())) for text, category in rows if text.strip()]
    if not kept:
        raise InputError(f"{where} holds no prompt")
    prompts = tuple(Prompt(f"p{i:05d}", text, category) for i, (text, category) in enumerate(kept))
    return PromptSet(name, prompts, source, license)
