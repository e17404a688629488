"""What is asked and by which rules: fixed before the first vote, written down once, and known by its hash.

The hash is stored with every vote. Pairs, wording, quotas, rates and the rules that flag a rater are all in it, so that
nobody can change them afterwards without being told: the file is the study's preregistration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from hypersd_bench.errors import InputError
from hypersd_bench.store import write_json

Kind = Literal["main", "practice", "gold", "repeat"]
Side = Literal["left", "right"]
Choice = Literal["left", "right", "tie", "both-bad"]
Preferred = Literal["a", "b", "tie", "both-bad"]
Policy = Literal["balanced", "adaptive"]

CRITERIA = ("overall", "alignment", "appeal", "defects")
FORMAT = 2  # of the design file


@dataclass(frozen=True, slots=True)
class Configuration:
    """A model at a step count, written ``hyper-sd@4``: what a study ranks."""

    model: str
    steps: int

    def __str__(self) -> str:
        return f"{self.model}@{self.steps}"


@dataclass(frozen=True, slots=True)
class Arm:
    """One of a pair's two images. file is relative to the run; spoiled says what was done to it (gold, practice)."""

    configuration: Configuration
    file: str
    sha256: str
    spoiled: str = ""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two images of one prompt and one noise. Gold and practice pairs have a known answer: ``a`` is the better one."""

    id: str
    prompt_id: str
    prompt: str
    replicate: int
    a: Arm
    b: Arm

    @property
    def comparison(self) -> str:
        """The pair type, ``a@steps:b@steps``, within which sides are counterbalanced for each rater."""
        return f"{self.a.configuration}:{self.b.configuration}"


@dataclass(frozen=True, slots=True)
class Rules:
    """When a rater is flagged; decided before the data. Shares are in [0, 1], times in milliseconds.

    gold_share: flagged below this share of gold pairs right, given at least ``gold_min`` of them. side_p: flagged where
    the two-sided binomial p-value of left against right is below. fast_ms, fast_share: flagged where more than this
    share of votes came sooner. agreement_share: flagged below this share of agreement with the others' majority on at
    least ``agreement_min`` pairs, where the shortfall is significant at 5 %. exclude_flagged: whether the main analysis
    leaves flagged raters out (the sensitivity table shows both).
    """

    gold_share: float = 0.6
    gold_min: int = 3
    side_p: float = 0.001
    fast_ms: int = 700
    fast_share: float = 0.5
    agreement_share: float = 0.5
    agreement_min: int = 10
    exclude_flagged: bool = False


@dataclass(frozen=True, slots=True)
class Session:
    """What one rater goes through, and how often a pair is asked.

    pairs_per_rater: main pairs a rater gets at most. votes_per_pair: votes a main pair gets at most (None: no limit).
    practice: pairs with feedback at the start. gold_every, repeat_every: of so many items one is gold, one is a main
    pair shown again with sides swapped; 0 for none. lease_minutes: how long a pair handed out waits for its vote.
    """

    pairs_per_rater: int
    votes_per_pair: int | None
    practice: int = 2
    gold_every: int = 10
    repeat_every: int = 20
    lease_minutes: int = 20
    policy: Policy = "balanced"
    uniform_floor: float = 0.2  # of the adaptive policy: this share of choices is uniform over comparisons


@dataclass(frozen=True)
class Design:
    """Everything fixed before the first vote.

    run: the spec hash of the run. wording: by language, the title, consent, instructions and the question of each
    criterion. planned_rate: the preference rate that the study shall show. pairs, gold, practice: see Pair.
    """

    run: str
    seed: int
    criteria: tuple[str, ...]
    wording: Mapping[str, Mapping[str, Any]]
    session: Session
    pairs: tuple[Pair, ...]
    gold: tuple[Pair, ...] = ()
    practice: tuple[Pair, ...] = ()
    rules: Rules = field(default_factory=Rules)
    planned_rate: float = 0.6
    planned_raters: int = 30

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the design's canonical JSON, wording included."""
        return sha256(json.dumps(asdict(self), sort_keys=True, ensure_ascii=True).encode()).hexdigest()

    @cached_property
    def comparisons(self) -> tuple[str, ...]:
        """The pair types, in the order of the design."""
        return tuple(dict.fromkeys(pair.comparison for pair in self.pairs))

    @cached_property
    def by_id(self) -> dict[str, Pair]:
        """Main, gold and practice pairs by id."""
        return {pair.id: pair for pair in (*self.pairs, *self.gold, *self.practice)}

    def pair(self, pair_id: str) -> Pair:
        """The main, gold or practice pair of this id; KeyError for another."""
        return self.by_id[pair_id]


def write_design(path: Path, design: Design, run_folder: str) -> None:
    """Write the design with its hash; run_folder, where the run lies, is a note outside the hash: runs are moved."""
    write_json(path, {"format": FORMAT, "hash": design.hash, "run_folder": run_folder, "design": asdict(design)})


def load_design(path: Path) -> tuple[Design, str]:
    """Read a design and the run's folder back; raises InputError when the file is broken or was changed since."""
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        form, recorded, run_folder = raw["format"], raw["hash"], str(raw["run_folder"])
        if form != FORMAT:
            raise InputError(f"{path} has format {form}, this version reads {FORMAT}; use the version that made it")
        design = _design_from(raw["design"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a study design: {error}") from error
    if design.hash != recorded:
        raise InputError(
            f"{path} was changed after it was written; restore it, or make a new study with: hypersd-bench study new"
        )
    return design, run_folder


def _design_from(raw: dict[str, Any]) -> Design:
    parts: dict[str, Any] = {name: tuple(map(_pair_from, raw.pop(name))) for name in ("pairs", "gold", "practice")}
    parts["criteria"] = tuple(raw.pop("criteria"))
    return Design(session=Session(**raw.pop("session")), rules=Rules(**raw.pop("rules")), **parts, **raw)


def _pair_from(raw: dict[str, Any]) -> Pair:
    return Pair(**{**raw, "a": _arm_from(raw["a"]), "b": _arm_from(raw["b"])})


def _arm_from(raw: dict[str, Any]) -> Arm:
    return Arm(**{**raw, "configuration": Configuration(**raw["configuration"])})
