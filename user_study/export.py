"""Votes with what they are about, for analysis elsewhere."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypersd_bench.store import write_bytes
from metrics.preference import preference_rate
from user_study.votes import VoteStore

COLUMNS = (
    "rater",
    "pair",
    "prompt_id",
    "prompt",
    "replicate",
    "model_a",
    "steps_a",
    "model_b",
    "steps_b",
    "side_a",
    "choice",
    "preferred",
    "response_ms",
    "voted_at",
    "design",
)


def export_rows(votes: VoteStore) -> list[dict[str, Any]]:
    """One row per vote, with COLUMNS as keys; ``preferred`` is "a", "b" or "tie", whatever the sides were."""
    pairs = {pair.id: pair for pair in votes.design.pairs}
    rows = []
    for vote in votes.votes():
        pair = pairs[vote.pair_id]
        preferred = "tie" if vote.choice == "tie" else "a" if vote.choice == vote.a_side else "b"
        values = (vote.rater, pair.id, pair.prompt_id, pair.prompt, pair.replicate, pair.a.model, pair.a.steps,
                  pair.b.model, pair.b.steps, vote.a_side, vote.choice, preferred, vote.response_ms, vote.voted_at,
                  votes.design.hash)  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows as CSV (UTF-8), whole or not at all."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, buffer.getvalue().encode())


def summary_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How each comparison stands, in one line each; ties count half, votes are taken as independent."""
    compared: dict[tuple[str, int, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        compared.setdefault((row["model_a"], row["steps_a"], row["model_b"], row["steps_b"]), []).append(row)
    return [_summary_line(*key, votes) for key, votes in sorted(compared.items())]


def _summary_line(model_a: str, steps_a: int, model_b: str, steps_b: int, votes: Sequence[dict[str, Any]]) -> str:
    count = Counter(vote["preferred"] for vote in votes)
    rate = preference_rate(count["a"], count["b"], count["tie"])
    return (
        f"{model_a}@{steps_a} preferred over {model_b}@{steps_b}: {rate.value:.0%} [{rate.low:.0%}, {rate.high:.0%}], "
        f"{len(votes)} votes ({count['tie']} ties) of {len({vote['rater'] for vote in votes})} raters"
    )
