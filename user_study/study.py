"""A study's folder: its design, its secret key, its published images, and the votes.

``study new`` makes the folder whole or not at all; serving only adds votes. The images and the design are all that the
servers of one study must share besides the database.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypersd_bench.errors import InputError
from hypersd_bench.store import RunStore
from user_study.design import Design, load_design, write_design
from user_study.images import image_files, image_id, publish_images
from user_study.votes import TurnItem, VoteStore
from user_study.votes.database import sqlite_url

DESIGN, KEY, IMAGES, VOTES = "design.json", "study.key", "images", "votes.sqlite"


@dataclass(frozen=True)
class Study:
    """A study made by ``new_study``.

    key: signs links and cookies, names images and raters; whoever has it is not blind. run_folder: where the run lay;
    it may have moved since.
    """

    folder: Path
    design: Design
    key: bytes
    run_folder: Path

    @property
    def id(self) -> str:
        """What pages and cookies call the study: the start of its design's hash."""
        return self.design.hash[:12]

    def run(self, elsewhere: Path | None = None) -> RunStore:
        """The run that the study is of; raises InputError when it is not where it was, or another one."""
        folder = elsewhere or self.run_folder
        store = RunStore.open(folder)
        if store.manifest["spec_hash"] != self.design.run:
            raise InputError(f"{folder} is another run than the one {self.folder} was made of; name that with --run")
        return store

    def open_votes(self, db: str | None = None, must_exist: bool = False) -> VoteStore:
        """Open the votes: the study's own SQLite file, or the database at the URL ``db``."""
        file = self.folder / VOTES
        if must_exist and db is None and not file.exists():
            raise InputError(
                f"{self.folder} has no votes yet; collect them with: hypersd-bench study serve {self.folder}"
            )
        return VoteStore(db or sqlite_url(file.resolve()), self.design)


@dataclass(frozen=True)
class ServedStudy:
    """What the service needs: a study, its open votes, and the images by opaque id."""

    study: Study
    votes: VoteStore
    images: dict[str, Path]
    invited_only: bool = False

    @property
    def id(self) -> str:
        """The study's id."""
        return self.study.id

    @property
    def design(self) -> Design:
        """The study's design."""
        return self.study.design

    @property
    def key(self) -> bytes:
        """The study's secret."""
        return self.study.key

    def image_ids(self, item: TurnItem) -> tuple[str, str]:
        """The opaque ids of an item's left and right image."""
        a, b = (image_id(self.key, item.pair_id, arm) for arm in ("a", "b"))
        return (a, b) if item.a_side == "left" else (b, a)


def new_study(run: RunStore, folder: Path, design: Design, publish: Callable[..., None] = publish_images) -> Study:
    """Make the folder of a study; raises InputError when it exists, or when an image of the run is missing."""
    if folder.exists():
        raise InputError(f"{folder} exists; name another folder with --out, or go on with: study serve {folder}")
    making = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    key = secrets.token_bytes(32)
    try:
        making.mkdir(parents=True)
        publish(run.folder, design, making / IMAGES, key)
        with os.fdopen(os.open(making / KEY, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key)
        write_design(making / DESIGN, design, os.path.relpath(run.folder.resolve(), folder.resolve()))
        making.rename(folder)
    except OSError as error:
        raise InputError(f"can't make {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return load_study(folder)


def load_study(folder: Path) -> Study:
    """Read a study's folder; raises InputError when it is none, is incomplete, or was changed."""
    if not (folder / DESIGN).exists():
        if (folder / "run.json").exists():
            raise InputError(
                f"{folder} is a run; make a study of it with: hypersd-bench study new {folder} --out STUDY"
            )
        raise InputError(
            f"{folder} is no study (no {DESIGN}); make one with: hypersd-bench study new RUN --out {folder}"
        )
    design, run_folder = load_design(folder / DESIGN)
    try:
        key = (folder / KEY).read_bytes()
    except OSError as error:
        raise InputError(f"{folder / KEY} can't be read ({error.strerror}); restore it: links depend on it") from error
    if len(key) != 32:
        raise InputError(f"{folder / KEY} is damaged; restore it: links and images depend on it")
    return Study(folder, design, key, folder / run_folder)


def serve_study(study: Study, db: str | None = None, invited_only: bool = False) -> ServedStudy:
    """Open everything that serving needs; raises InputError when images are missing or the database is not ours."""
    images = image_files(study.folder / IMAGES, study.design, study.key)
    return ServedStudy(study, study.open_votes(db), images, invited_only)
