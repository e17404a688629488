"""How often each side of each comparison was preferred, with clustered intervals, corrected together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from metrics.preference import Rate, two_way_rate
from metrics.stats import holm
from user_study.analysis.votes import Judged

ALPHA = 0.05


def rates(votes: Sequence[Judged], comparisons: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each comparison, in the design's order.

    ``rate`` counts ties and both-bad half, ``rate_decided`` leaves them out; None without votes. ``p_holm`` corrects
    the p-values of ``rate`` over all comparisons with votes; ``verdict`` is "a", "b" or "" by it.
    """
    rows = [_row(name, [vote for vote in votes if vote.comparison == name]) for name in comparisons]
    tested = [row for row in rows if row["rate"] is not None]
    for row, p in zip(tested, holm([row["rate"]["p_value"] for row in tested]), strict=True):
        row["p_holm"] = p
        row["verdict"] = ("a" if row["rate"]["value"] > 0.5 else "b") if p < ALPHA else ""
    return rows


def rate_of(votes: Sequence[Judged]) -> Rate:
    """The rate at which a was preferred, ties half, clustered by rater and prompt."""
    return two_way_rate(
        [vote.score for vote in votes], [vote.rater for vote in votes], [vote.prompt_id for vote in votes]
    )


def _row(name: str, votes: Sequence[Judged]) -> dict[str, Any]:
    count = Counter(vote.preferred for vote in votes)
    decided = [vote for vote in votes if vote.preferred in ("a", "b")]
    a, b = (str(votes[0].a), str(votes[0].b)) if votes else split(name)
    return {
        "comparison": name,
        "a": a,
        "b": b,
        "n": len(votes),
        "a_preferred": count["a"],
        "b_preferred": count["b"],
        "ties": count["tie"],
        "both_bad": count["both-bad"],
        "rate": asdict(rate_of(votes)) if votes else None,
        "rate_decided": asdict(rate_of(decided)) if decided else None,
        "p_holm": None,
        "verdict": "",
    }


def split(comparison: str) -> tuple[str, str]:
    """The two configurations of a comparison's name; names may hold a colon, steps can't."""
    parts = comparison.split(":")
    for i in range(1, len(parts)):
        a, b = ":".join(parts[:i]), ":".join(parts[i:])
        if a.rpartition("@")[2].isdigit() and b.rpartition("@")[2].isdigit():
            return a, b
    return comparison, ""
