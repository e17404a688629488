"""Raters, assignments and votes: the study's only SQL, and the place where a vote is counted exactly once."""

from user_study.votes.store import (
    Ballot,
    NotConsented,
    Recorded,
    Turn,
    TurnItem,
    UnknownAssignment,
    UnknownRater,
    VoteStore,
)

__all__ = [
    "Ballot",
    "NotConsented",
    "Recorded",
    "Turn",
    "TurnItem",
    "UnknownAssignment",
    "UnknownRater",
    "VoteStore",
]
