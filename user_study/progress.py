"""How a running study stands: coverage, sides, gold, speed, votes still needed. For the admin page."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from statistics import median
from typing import Any

from metrics.preference import two_way_rate
from metrics.vote_power import plan_votes
from user_study.design import Design
from user_study.planning import ICC_PROMPT, ICC_RATER, LIKENESS_FROM, likeness
from user_study.records import AssignmentRow, RaterRow, VoteRow

RECENT = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class ComparisonProgress:
    """One comparison's main votes on the first criterion.

    a_left, a_right: how often image a was handed out on each side. still_needed: votes until the planned rate can be
    shown with the likeness seen so far; None where these raters and prompts can't show it. low, high: of ``rate``.
    """

    name: str
    pairs: int
    votes: int
    open: int
    a_left: int
    a_right: int
    neither: int
    still_needed: int | None
    rate: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class RaterProgress:
    """One rater, by the start of the random id."""

    name: str
    votes: int
    gold_right: int
    gold: int
    left_share: float | None
    median_ms: int | None
    last: str


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the study stands. quota: votes that all main pairs together may get; None: no limit."""

    paused: bool
    votes: int
    quota: int | None
    surplus: int
    joined: int
    consented: int
    active: int
    votes_last_hour: int
    left_share: float | None
    gold_right: int
    gold: int
    median_ms: int | None
    fast_share: float | None
    coverage: tuple[int, float, int]
    planned_rate: float
    comparisons: tuple[ComparisonProgress, ...]
    prompts: tuple[tuple[str, str, int], ...]
    raters: tuple[RaterProgress, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def progress(
    design: Design,
    votes: Sequence[VoteRow],
    assignments: Sequence[AssignmentRow],
    raters: Sequence[RaterRow],
    paused: bool,
    now: datetime,
) -> Progress:
    """Count everything; ``now`` decides which leases are open and which raters active."""
    main = [vote for vote in votes if vote.kind == "main"]
    gold = [vote for vote in votes if vote.kind == "gold"]
    times = [vote.response_ms for vote in votes if vote.kind != "practice"]
    per_pair = Counter(vote.pair_id for vote in main)
    covered = [per_pair[pair.id] for pair in design.pairs]
    quota = design.session.votes_per_pair
    recent, hour = (_stamp(now - span) for span in (RECENT, timedelta(hours=1)))
    return Progress(
        paused=paused,
        votes=len(main),
        quota=None if quota is None else quota * len(design.pairs),
        surplus=sum(vote.surplus for vote in main),
        joined=len(raters),
        consented=sum(bool(rater.consented_at) for rater in raters),
        active=len({vote.rater for vote in votes if vote.voted_at >= recent}),
        votes_last_hour=sum(vote.voted_at >= hour for vote in main),
        left_share=_left_share(design, main),
        gold_right=sum(_right(design, vote) for vote in gold),
        gold=len(gold),
        median_ms=round(median(times)) if times else None,
        fast_share=sum(t < design.rules.fast_ms for t in times) / len(times) if times else None,
        coverage=(min(covered), median(covered), max(covered)),
        planned_rate=design.planned_rate,
        comparisons=_comparisons(design, main, assignments, now),
        prompts=_prompts(design, per_pair),
        raters=_raters(design, votes),
    )


def _comparisons(
    design: Design, main: Sequence[VoteRow], assignments: Sequence[AssignmentRow], now: datetime
) -> tuple[ComparisonProgress, ...]:
    votes: dict[str, list[VoteRow]] = defaultdict(list)
    for vote in main:
        votes[design.pair(vote.pair_id).comparison].append(vote)
    sides: Counter[tuple[str, str]] = Counter()
    opened: Counter[str] = Counter()
    for row in assignments:
        if row.kind == "main":
            name = design.pair(row.pair_id).comparison
            sides[name, row.a_side] += 1
            opened[name] += not row.voted and row.expires_at > _stamp(now)
    pairs = Counter(pair.comparison for pair in design.pairs)
    guess = {"icc_rater": ICC_RATER, "icc_prompt": ICC_PROMPT}
    alike = likeness(design, main) if len(main) >= LIKENESS_FROM else guess
    return tuple(
        _comparison(design, name, votes[name], pairs[name], opened[name], sides, alike) for name in design.comparisons
    )


def _comparison(
    design: Design,
    name: str,
    votes: Sequence[VoteRow],
    pairs: int,
    opened: int,
    sides: Counter[tuple[str, str]],
    alike: dict[str, float],
) -> ComparisonProgress:
    scores = [_score(design, vote) for vote in votes]
    rate = None
    if votes:
        prompts = [design.pair(vote.pair_id).prompt_id for vote in votes]
        rate = two_way_rate(scores, [vote.rater for vote in votes], prompts)
    prompts_of = {pair.prompt_id for pair in design.pairs if pair.comparison == name}
    num_raters = max(design.planned_raters, len({vote.rater for vote in votes}))
    planned = plan_votes(
        design.planned_rate, num_raters, len(prompts_of), num_comparisons=len(design.comparisons), **alike
    )
    return ComparisonProgress(
        name=name,
        pairs=pairs,
        votes=len(votes),
        open=opened,
        a_left=sides[name, "left"],
        a_right=sides[name, "right"],
        neither=scores.count(0.5),
        still_needed=None if planned.votes is None else max(planned.votes - len(votes), 0),
        rate=None if rate is None else rate.value,
        low=None if rate is None else rate.low,
        high=None if rate is None else rate.high,
    )


def _prompts(design: Design, per_pair: Counter[str]) -> tuple[tuple[str, str, int], ...]:
    """(prompt id, prompt, votes), the fewest votes first."""
    votes: Counter[str] = Counter()
    text = {}
    for pair in design.pairs:
        votes[pair.prompt_id] += per_pair[pair.id]
        text[pair.prompt_id] = pair.prompt
    return tuple((name, text[name], votes[name]) for name in sorted(votes, key=lambda name: (votes[name], name)))


def _raters(design: Design, votes: Sequence[VoteRow]) -> tuple[RaterProgress, ...]:
    """Who voted, the last to vote first."""
    by_rater: dict[str, list[VoteRow]] = defaultdict(list)
    for vote in votes:
        if vote.kind != "practice":
            by_rater[vote.rater].append(vote)
    found = [
        RaterProgress(
            name=rater[:8],
            votes=sum(vote.kind == "main" for vote in mine),
            gold_right=sum(_right(design, vote) for vote in mine if vote.kind == "gold"),
            gold=sum(vote.kind == "gold" for vote in mine),
            left_share=_left_share(design, [vote for vote in mine if vote.kind == "main"]),
            median_ms=round(median(vote.response_ms for vote in mine)),
            last=max(vote.voted_at for vote in mine),
        )
        for rater, mine in by_rater.items()
    ]
    return tuple(sorted(found, key=lambda row: row.last, reverse=True))


def _left_share(design: Design, votes: Sequence[VoteRow]) -> float | None:
    sides = [vote.choices[design.criteria[0]] for vote in votes]
    decided = [side for side in sides if side in ("left", "right")]
    return decided.count("left") / len(decided) if decided else None


def _right(design: Design, vote: VoteRow) -> bool:
    return vote.preferred(design.criteria[0]) == "a"


def _score(design: Design, vote: VoteRow) -> float:
    return {"a": 1.0, "b": 0.0}.get(vote.preferred(design.criteria[0]), 0.5)


def _stamp(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")
