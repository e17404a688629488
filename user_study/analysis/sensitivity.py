"""How the rates change with what is left out: flagged raters, ties, fast votes, any one rater, any one prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from user_study.analysis.rates import rate_of
from user_study.analysis.votes import Judged
from user_study.design import Rules

_Keep = Callable[[Judged], bool]


def sensitivity(
    votes: Sequence[Judged], comparisons: Sequence[str], flagged: set[str], rules: Rules
) -> list[dict[str, Any]]:
    """For each comparison: the rate in each scenario, and its range over leaving out one rater, or one prompt.

    votes: all main votes, flagged raters' included.
    """
    scenarios: dict[str, _Keep] = {
        "all raters": lambda vote: True,
        "without flagged raters": lambda vote: vote.rater not in flagged,
        "ties left out": lambda vote: vote.preferred != "tie",
        "both bad left out": lambda vote: vote.preferred != "both-bad",
        "ties and both bad left out": lambda vote: vote.preferred in ("a", "b"),
        "without fast votes": lambda vote: vote.response_ms >= rules.fast_ms,
        "without surplus votes": lambda vote: not vote.surplus,
    }
    return [
        _row(name, [vote for vote in votes if vote.comparison == name], scenarios) for name in comparisons
    ]  # fmt: skip


def _row(name: str, votes: Sequence[Judged], scenarios: dict[str, _Keep]) -> dict[str, Any]:
    found = {}
    for scenario, keep in scenarios.items():
        kept = [vote for vote in votes if keep(vote)]
        found[scenario] = asdict(rate_of(kept)) if kept else None
    return {
        "comparison": name,
        "scenarios": found,
        "leaving_out_a_rater": _range(votes, "rater"),
        "leaving_out_a_prompt": _range(votes, "prompt_id"),
    }


def _range(votes: Sequence[Judged], by: str) -> dict[str, Any] | None:
    """The smallest and largest rate over leaving out one cluster, and whose absence gives it."""
    scores: dict[str, list[float]] = defaultdict(list)
    for vote in votes:
        scores[getattr(vote, by)].append(vote.score)
    if len(scores) < 2:
        return None
    names = list(scores)
    sums, sizes = np.array([sum(s) for s in scores.values()]), np.array([len(s) for s in scores.values()])
    rates = (sums.sum() - sums) / (sizes.sum() - sizes)
    least, most = int(rates.argmin()), int(rates.argmax())
    return {
        "low": float(rates[least]),
        "low_without": names[least],
        "high": float(rates[most]),
        "high_without": names[most],
    }
