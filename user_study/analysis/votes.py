"""Votes on one criterion with what they are about, as the statistics need them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from user_study.design import Choice, Configuration, Design, Kind, Preferred
from user_study.records import VoteRow


@dataclass(frozen=True, slots=True)
class Judged:
    """One vote on one criterion. left, right: what was shown where; score: 1 for a, 0 for b, 0.5 for neither."""

    rater: str
    pair_id: str
    prompt_id: str
    comparison: str
    a: Configuration
    b: Configuration
    a_left: bool
    choice: Choice
    preferred: Preferred
    kind: Kind
    response_ms: int
    surplus: bool

    @property
    def score(self) -> float:
        """1 where a was preferred, 0 where b was, 0.5 where neither was."""
        return {"a": 1.0, "b": 0.0}.get(self.preferred, 0.5)

    @property
    def left(self) -> str:
        """The configuration on the left."""
        return str(self.a if self.a_left else self.b)

    @property
    def right(self) -> str:
        """The configuration on the right."""
        return str(self.b if self.a_left else self.a)

    @property
    def left_score(self) -> float:
        """1 where the left picture was preferred, 0 where the right one was, 0.5 where neither was."""
        return self.score if self.a_left else 1 - self.score


def judged(design: Design, votes: Iterable[VoteRow], criterion: str) -> list[Judged]:
    """The votes on a criterion, of all kinds, in the order given."""
    found = []
    for vote in votes:
        pair = design.pair(vote.pair_id)
        found.append(
            Judged(
                rater=vote.rater,
                pair_id=pair.id,
                prompt_id=pair.prompt_id,
                comparison=pair.comparison,
                a=pair.a.configuration,
                b=pair.b.configuration,
                a_left=vote.a_side == "left",
                choice=vote.choices[criterion],
                preferred=vote.preferred(criterion),
                kind=vote.kind,
                response_ms=vote.response_ms,
                surplus=vote.surplus,
            )
        )
    return found


def of_kind(votes: Sequence[Judged], kind: Kind) -> list[Judged]:
    """The votes of one kind."""
    return [vote for vote in votes if vote.kind == kind]
