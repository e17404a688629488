"""What the database gives back: votes and assignments as plain rows, for analysis, progress and export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from user_study.design import Choice, Kind, Preferred, Side


@dataclass(frozen=True, slots=True)
class VoteRow:
    """One vote that counts, by one rater on one assignment.

    a_side: where the pair's image ``a`` was. choices: by criterion, as given. position: the rater's count of items
    before it. propensity: the probability with which the adaptive policy chose its comparison. surplus: given after the
    pair had been handed on to somebody else. response_ms: since both images were decoded; hidden_ms of it in another
    tab. input: "key", "pointer" or "touch". Times are UTC, ISO 8601.
    """

    rater: str
    assignment_id: str
    pair_id: str
    kind: Kind
    a_side: Side
    choices: Mapping[str, Choice]
    position: int
    propensity: float
    surplus: bool
    response_ms: int
    hidden_ms: int
    language: str
    input: str
    viewport: str
    pixel_ratio: float
    design_hash: str
    assigned_at: str
    voted_at: str

    def preferred(self, criterion: str) -> Preferred:
        """What was preferred, whatever the sides were."""
        choice = self.choices[criterion]
        if choice in ("tie", "both-bad"):
            return choice
        return "a" if choice == self.a_side else "b"


@dataclass(frozen=True, slots=True)
class AssignmentRow:
    """One pair handed to one rater; voted or not. expires_at: when its lease ends (UTC, ISO 8601)."""

    id: str
    rater: str
    pair_id: str
    kind: Kind
    a_side: Side
    position: int
    propensity: float
    assigned_at: str
    expires_at: str
    voted: bool


@dataclass(frozen=True, slots=True)
class RaterRow:
    """One rater. consented_at is empty before consent; invited: came by a signed link."""

    id: str
    invited: bool
    language: str
    joined_at: str
    consented_at: str
