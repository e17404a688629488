"""What was voted on each pair: the evidence behind every rate, for the report's galleries."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from user_study.analysis.votes import Judged
from user_study.design import Design


def pair_tallies(design: Design, main: Sequence[Judged]) -> list[dict[str, Any]]:
    """One row for each main pair in the design's order: what was shown, and how many preferred what.

    file_a, file_b: relative to the run's folder. a, b, tie, both_bad: votes; all zero where nobody voted.
    """
    tallies: dict[str, Counter[str]] = defaultdict(Counter)
    for vote in main:
        tallies[vote.pair_id][vote.preferred] += 1
    return [
        {
            "pair": pair.id,
            "comparison": pair.comparison,
            "prompt_id": pair.prompt_id,
            "prompt": pair.prompt,
            "replicate": pair.replicate,
            "file_a": pair.a.file,
            "file_b": pair.b.file,
            "a": tallies[pair.id]["a"],
            "b": tallies[pair.id]["b"],
            "tie": tallies[pair.id]["tie"],
            "both_bad": tallies[pair.id]["both-bad"],
        }
        for pair in design.pairs
    ]
