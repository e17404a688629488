"""What people said: a study's analysis, as ``hypersd-bench study analyse`` left it in the study's folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypersd_bench.errors import InputError, first_line
from reports.strings import Said

VERSION = 2  # of analysis.json


@dataclass(frozen=True, slots=True)
class Preference:
    """One comparison's votes on one criterion. value, low, high: the rate at which a is preferred, ties counting half.

    verdict: ``a``, ``b``, or what else the analysis says where no preference is shown.
    """

    a: str
    b: str
    a_preferred: int
    ties: int
    both_bad: int
    b_preferred: int
    value: float
    low: float
    high: float
    n: int
    num_raters: int
    num_prompts: int
    p_holm: float
    verdict: str


@dataclass(frozen=True, slots=True)
class Strength:
    """A configuration's place in a ranking: log-odds strength, and the ranks it may have."""

    name: str
    value: float
    low: float
    high: float
    rank_low: int
    rank_high: int
    n: int
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PairVotes:
    """The votes on one pair of images."""

    pair: str
    comparison: str
    prompt_id: str
    prompt: str
    replicate: int
    file_a: str
    file_b: str
    a: int
    b: int
    tie: int
    both_bad: int

    @property
    def n(self) -> int:
        """Votes in all."""
        return self.a + self.b + self.tie + self.both_bad

    @property
    def contest(self) -> float:
        """How evenly people are divided: 1 where as many prefer a as b, 0 where all agree."""
        decided = self.a + self.b
        return 1 - abs(self.a - self.b) / decided if decided else 0.0


@dataclass(frozen=True, slots=True)
class MetricAgreement:
    """How often a vote prefers the image that a metric scores better; disagreements: pairs, the worst first."""

    metric: str
    label: str
    value: float
    low: float
    high: float
    n: int
    trained_on_by: tuple[str, ...]
    disagreements: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Criterion:
    """Everything about one question. alpha: Krippendorff's, with its interval, None where it is not defined."""

    name: str
    question: Said
    preferences: tuple[Preference, ...]
    rankings: tuple[tuple[Strength, ...], ...]
    alpha: tuple[float, float | None, float | None] | None
    metrics: tuple[MetricAgreement, ...]
    ceiling: float | None
    pairs: tuple[PairVotes, ...]


@dataclass(frozen=True, slots=True)
class StudyData:
    """A study as a report shows it. run: the spec hash of the run whose images were shown. card: for a paper."""

    design_hash: str
    run: str
    planned_rate: float
    counts: dict[str, Any]
    raters: tuple[dict[str, Any], ...]
    criteria: tuple[Criterion, ...]
    deviations: tuple[str, ...]
    card: str


def read_study(folder: Path) -> StudyData:
    """Read a study's analysis; raises InputError with the remedy where there is none, or one of another version."""
    path = folder / "analysis.json"
    analyse = f"hypersd-bench study analyse {folder}"
    if not (folder / "design.json").is_file():
        raise InputError(f"{folder} is no study: it has no design.json; hypersd-bench study new makes one")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} has no analysis yet: {analyse}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"can't read {path}: {error}; make it again with {analyse}") from error
    if not isinstance(raw, dict) or raw.get("version") != VERSION:
        raise InputError(f"{path} is of another version than this program reads; make it again with {analyse}")
    card = folder / "card.md"
    try:
        if not raw["counts"]["votes"]:
            raise InputError(f"{folder} has no votes yet; a report shows a study once people have voted")
        return _study(raw, card.read_text(encoding="utf-8") if card.is_file() else "")
    except (LookupError, TypeError, AttributeError, ValueError, StopIteration) as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{path} is not what study analyse writes ({why}); make it again with {analyse}") from error


def _study(raw: dict[str, Any], card: str) -> StudyData:
    return StudyData(
        design_hash=raw["design_hash"],
        run=raw["run"],
        planned_rate=raw["planned_rate"],
        counts=raw["counts"],
        raters=tuple({**row, "rater": f"rater {i}"} for i, row in enumerate(raw["raters"], start=1)),
        criteria=tuple(_criterion(entry, raw["wording"]) for entry in raw["criteria"]),
        deviations=tuple(raw["deviations"]),
        card=card,
    )


def _criterion(raw: dict[str, Any], wording: dict[str, Any]) -> Criterion:
    alpha = raw["agreement"]["alpha"]
    metrics = raw["metrics"]
    ceiling = metrics["ceiling"]
    return Criterion(
        name=raw["criterion"],
        question=_question(raw["criterion"], wording),
        preferences=tuple(_preference(row) for row in raw["rates"] if row["rate"] is not None),
        rankings=tuple(tuple(_strength(row) for row in ranking["strengths"]) for ranking in raw["rankings"]),
        alpha=None if alpha["value"] is None else (alpha["value"], alpha["low"], alpha["high"]),
        metrics=tuple(_agreement(row) for row in metrics["metrics"] if row.get("agreement")),
        ceiling=ceiling["value"] if ceiling else None,
        pairs=tuple(PairVotes(**{name: row[name] for name in PairVotes.__dataclass_fields__}) for row in raw["pairs"]),
    )


def _question(criterion: str, wording: dict[str, Any]) -> Said:
    """What raters were asked, in the languages they were asked in."""
    asked = {language: words["questions"][criterion] for language, words in wording.items()}
    first = next(iter(asked.values()))
    return Said(asked.get("en", first), asked.get("zh", first))


def _preference(row: dict[str, Any]) -> Preference:
    rate = row["rate"]
    return Preference(
        a=row["a"],
        b=row["b"],
        a_preferred=row["a_preferred"],
        ties=row["ties"],
        both_bad=row["both_bad"],
        b_preferred=row["b_preferred"],
        value=rate["value"],
        low=rate["low"],
        high=rate["high"],
        n=rate["n"],
        num_raters=rate["num_raters"],
        num_prompts=rate["num_prompts"],
        p_holm=row["p_holm"],
        verdict=row["verdict"],
    )


def _strength(row: dict[str, Any]) -> Strength:
    plain = {name: row[name] for name in Strength.__dataclass_fields__ if name != "flags"}
    return Strength(**plain, flags=tuple(row["flags"]))


def _agreement(row: dict[str, Any]) -> MetricAgreement:
    found = row["agreement"]
    return MetricAgreement(
        metric=row["id"],
        label=row["label"],
        value=found["value"],
        low=found["low"],
        high=found["high"],
        n=found["n"],
        trained_on_by=tuple(row["trained_on_by"]),
        disagreements=tuple(row["disagreements"]),
    )


def contested(pairs: tuple[PairVotes, ...], count: int = 8) -> list[PairVotes]:
    """The pairs about which people are most divided, of those that at least three of them decided."""
    decided = [pair for pair in pairs if pair.a + pair.b >= 3]
    return sorted(decided, key=lambda pair: (-pair.contest, -pair.n, pair.pair))[:count]
