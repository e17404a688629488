"""A ranking of the configurations, as far as votes connect them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from metrics.paired_comparison import connected_components, davidson
from user_study.analysis.votes import Judged


def rankings(votes: Sequence[Judged]) -> list[dict[str, Any]]:
    """A ranking for each group of configurations that votes connect, the largest first; plain JSON."""
    if not votes:
        return []
    groups = connected_components([vote.left for vote in votes], [vote.right for vote in votes])
    return [_ranking([vote for vote in votes if vote.left in group]) for group in groups]


def _ranking(votes: Sequence[Judged]) -> dict[str, Any]:
    found = davidson(
        [vote.left for vote in votes],
        [vote.right for vote in votes],
        [vote.left_score for vote in votes],
        [vote.rater for vote in votes],
        [vote.prompt_id for vote in votes],
    )
    return asdict(found)
