"""How many votes a study needs, for ``study plan``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from math import ceil
from typing import Any

from metrics.vote_power import intraclass, plan_votes, smallest_rate
from user_study.design import Design
from user_study.records import VoteRow

ICC_RATER, ICC_PROMPT = 0.05, 0.1  # sober guesses before there are votes: a design effect of about 3
LIKENESS_FROM = 100  # votes from which the likeness is estimated rather than guessed
SECONDS_A_VOTE = 7  # a first guess for two pictures and one question; the pilot tells


def plan_study(
    effect: float,
    raters: int,
    prompts: int,
    comparisons: int,
    power: float,
    icc_rater: float,
    icc_prompt: float,
) -> dict[str, Any]:
    """The votes that one comparison, and the whole study, need to show the rate ``effect``; plain JSON."""
    made = plan_votes(
        effect, raters, prompts, icc_rater=icc_rater, icc_prompt=icc_prompt, num_comparisons=comparisons, power=power
    )
    whole = None if made.votes is None else made.votes * comparisons
    each = None if whole is None else ceil(whole / raters)
    return {
        **asdict(made),
        "raters": raters,
        "prompts": prompts,
        "comparisons": comparisons,
        "icc_rater": icc_rater,
        "icc_prompt": icc_prompt,
        "votes_in_all": whole,
        "votes_of_each_rater": each,
        "minutes_of_each_rater": None if each is None else round(each * SECONDS_A_VOTE / 60, 1),
    }


def plan_lines(made: dict[str, Any]) -> list[str]:
    """The plan in words."""
    tests = f" and {made['comparisons']} comparisons (Holm)" if made["comparisons"] > 1 else ""
    lines = [
        f"To show a preference of {made['rate']:.1%} at power {made['power']:.0%}, alpha {made['alpha']:.0%}{tests}:",
        f"  {made['independent']} votes on a comparison if votes were independent",
    ]
    if made["votes"] is None:
        return [*lines, f"  not within reach: {made['reason']}"]
    return [
        *lines,
        f"  {made['votes']} votes with clustering (design effect {made['design_effect']:.1f}: likeness within raters "
        f"{made['icc_rater']:.2g}, within prompts {made['icc_prompt']:.2g})",
        f"  {made['votes_in_all']} votes in all, {made['votes_of_each_rater']} from each of {made['raters']} raters "
        f"(about {made['minutes_of_each_rater']:g} minutes at {SECONDS_A_VOTE} s a vote)",
        f"  {made['votes_per_prompt']:.1f} votes on each of {made['prompts']} prompts of a comparison",
    ]


def smallest_shown(design: Design) -> float:
    """The smallest preference rate that every comparison shows once its pairs have the votes they may get at most."""
    quota = design.session.votes_per_pair or design.planned_raters
    rates = []
    for name in design.comparisons:
        prompts = [pair.prompt_id for pair in design.pairs if pair.comparison == name]
        votes, m = quota * len(prompts), len(design.comparisons)
        alike = {"icc_rater": ICC_RATER, "icc_prompt": ICC_PROMPT}
        rates.append(smallest_rate(votes, design.planned_raters, len(set(prompts)), num_comparisons=m, **alike))
    return max(rates)


def likeness(design: Design, votes: Sequence[VoteRow]) -> dict[str, float]:
    """Intraclass correlations of raters and of prompts in a study's main votes, over its comparisons by their votes."""
    scores: dict[str, list[float]] = {}
    raters: dict[str, list[str]] = {}
    prompts: dict[str, list[str]] = {}
    for vote in votes:
        if vote.kind != "main":
            continue
        pair = design.pair(vote.pair_id)
        preferred = vote.preferred(design.criteria[0])
        scores.setdefault(pair.comparison, []).append({"a": 1.0, "b": 0.0}.get(preferred, 0.5))
        raters.setdefault(pair.comparison, []).append(vote.rater)
        prompts.setdefault(pair.comparison, []).append(pair.prompt_id)
    total = sum(map(len, scores.values()))

    def mean(clusters: dict[str, list[str]]) -> float:
        return sum(intraclass(scores[name], clusters[name]) * len(scores[name]) for name in scores) / max(total, 1)

    return {"icc_rater": mean(raters), "icc_prompt": mean(prompts)}
