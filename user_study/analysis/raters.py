"""How good each rater's votes are, under the rules that the design fixed, and how far raters agree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from scipy.stats import binomtest

from metrics.rater_agreement import krippendorff_alpha, leave_one_out_agreement, percent_agreement, retest
from metrics.stats import wilson
from user_study.analysis.votes import Judged, of_kind
from user_study.design import Rules


def rater_sheet(votes: Sequence[Judged], rules: Rules) -> list[dict[str, Any]]:
    """One row for each rater who voted on a main pair, with ``flags``: reasons in words, by ``rules`` alone."""
    main = of_kind(votes, "main")
    agreement = leave_one_out_agreement(
        [vote.score for vote in main], [vote.pair_id for vote in main], [vote.rater for vote in main]
    )
    by_rater: dict[str, list[Judged]] = defaultdict(list)
    for vote in votes:
        by_rater[vote.rater].append(vote)
    return [_row(rater, by_rater[rater], agreement[rater], rules) for rater in agreement]


def flagged(sheet: Sequence[dict[str, Any]]) -> set[str]:
    """The raters with a flag."""
    return {row["rater"] for row in sheet if row["flags"]}


def agreement(votes: Sequence[Judged]) -> dict[str, Any]:
    """Krippendorff's alpha and percent agreement on main pairs, and how often a repeated pair got the same answer."""
    main = of_kind(votes, "main")
    labels = [vote.preferred for vote in main]
    items, raters, prompts = ([getattr(vote, name) for vote in main] for name in ("pair_id", "rater", "prompt_id"))
    first = {(vote.rater, vote.pair_id): vote.preferred for vote in main}
    again = [vote for vote in of_kind(votes, "repeat") if (vote.rater, vote.pair_id) in first]
    before = [first[vote.rater, vote.pair_id] for vote in again]
    return {
        "alpha": asdict(krippendorff_alpha(labels, items, raters, prompts)),
        "percent": asdict(percent_agreement(labels, items, raters, prompts)),
        "retest": asdict(retest(before, [vote.preferred for vote in again], [vote.rater for vote in again])),
    }


def _row(rater: str, votes: Sequence[Judged], agreement: tuple[float, int], rules: Rules) -> dict[str, Any]:
    gold = of_kind(votes, "gold")
    counted = [vote for vote in votes if vote.kind != "practice"]
    sides = [vote.choice for vote in of_kind(votes, "main") if vote.choice in ("left", "right")]
    left = sides.count("left")
    row = {
        "rater": rater,
        "votes": len(of_kind(votes, "main")),
        "gold": len(gold),
        "gold_right": sum(vote.preferred == "a" for vote in gold),
        "left": left,
        "right": len(sides) - left,
        "left_p": float(binomtest(left, len(sides)).pvalue) if sides else 1.0,
        "median_ms": round(median(vote.response_ms for vote in counted)),
        "fast_share": sum(vote.response_ms < rules.fast_ms for vote in counted) / len(counted),
        "agreement": agreement[0] if agreement[1] else None,
        "agreement_n": agreement[1],
    }
    return {**row, "flags": _flags(row, rules)}


def _flags(row: dict[str, Any], rules: Rules) -> list[str]:
    flags = []
    if row["gold"] >= rules.gold_min and row["gold_right"] / row["gold"] < rules.gold_share:
        flags.append(f"gold: {row['gold_right']} of {row['gold']} right")
    if row["left_p"] < rules.side_p:
        flags.append(f"sides: {row['left']} left, {row['right']} right")
    if row["fast_share"] > rules.fast_share:
        flags.append(f"speed: {row['fast_share']:.0%} of votes under {rules.fast_ms} ms")
    n, share = row["agreement_n"], row["agreement"]
    if n >= rules.agreement_min and share < rules.agreement_share:
        agreed = round(share * n)
        p = binomtest(agreed, n, rules.agreement_share, "less").pvalue
        if p < 0.05:
            flags.append(f"agreement: with the others on {agreed} of {n} pairs")
    return flags


def side_choice(votes: Sequence[Judged]) -> dict[str, Any] | None:
    """How often the left picture was chosen where one was, with Wilson's interval."""
    sides = [vote.choice for vote in of_kind(votes, "main") if vote.choice in ("left", "right")]
    return asdict(wilson(sides.count("left"), len(sides))) if sides else None
