"""A run's study, opened: its design, its votes and its images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hypersd_bench.errors import InputError
from hypersd_bench.store import RunStore
from user_study.design import Design, load_design, open_design
from user_study.images import publish_images
from user_study.votes import VoteStore


@dataclass(frozen=True)
class Study:
    """What serving needs; ``images`` are the published files by opaque id."""

    design: Design
    votes: VoteStore
    images: dict[str, Path]

    @property
    def id(self) -> str:
        """What pages and cookies call the study: the start of its design's hash."""
        return self.design.hash[:12]


def open_study(run: Path, num_pairs: int | None = None) -> Study:
    """Open a run's study, or start it: design written, images published, database made. Opening twice is harmless."""
    store = RunStore.open(run)
    design = open_design(store, num_pairs)
    votes = VoteStore(run / "study" / "votes.sqlite", design)
    try:
        return Study(design, votes, publish_images(run, votes))
    except InputError:
        votes.close()
        raise


def open_votes(run: Path) -> VoteStore:
    """Open the votes of a study that was served before; raises InputError when there is none."""
    RunStore.open(run)
    folder = run / "study"
    if not (folder / "votes.sqlite").exists():
        raise InputError(f"{run} has no study yet; start it with: hypersd-bench study serve {run}")
    return VoteStore(folder / "votes.sqlite", load_design(folder / "design.json"))
