"""The analysis from end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from hypersd_bench.store import RunStore
from user_study.analysis.against_metrics import against_metrics
from user_study.analysis.axes import axes
from user_study.analysis.pairs import pair_tallies
from user_study.analysis.ranking import rankings
from user_study.analysis.raters import agreement, flagged, rater_sheet, side_choice
from user_study.analysis.rates import rates
from user_study.analysis.result import Analysis, CriterionResult
from user_study.analysis.sensitivity import sensitivity
from user_study.analysis.votes import Judged, judged, of_kind
from user_study.assignment import kinds_of
from user_study.design import Design
from user_study.records import AssignmentRow, RaterRow, VoteRow


def analyse(
    design: Design,
    votes: Sequence[VoteRow],
    assignments: Sequence[AssignmentRow],
    raters: Sequence[RaterRow],
    run: RunStore | None,
) -> Analysis:
    """Analyse a study's votes; ``run`` gives metrics and timings, None leaves them out.

    Rules judge raters on the first criterion. Only main pairs count in rates and rankings.
    """
    first = judged(design, votes, design.criteria[0])
    sheet = rater_sheet(first, design.rules)
    marked = flagged(sheet)
    left_out = marked if design.rules.exclude_flagged else set()
    criteria = [
        _criterion(design, criterion, judged(design, votes, criterion), marked, left_out, run)
        for criterion in design.criteria
    ]
    return Analysis(
        study=design.hash[:12],
        design_hash=design.hash,
        run=design.run,
        planned_rate=design.planned_rate,
        rules=asdict(design.rules),
        counts=_counts(design, votes, assignments, raters),
        sides=side_choice(first),
        raters=sheet,
        excluded=sorted(left_out),
        criteria=criteria,
        deviations=_deviations(design, votes),
        wording={language: dict(words) for language, words in design.wording.items()},
        session=asdict(design.session),
    )


def _criterion(
    design: Design, criterion: str, votes: list[Judged], marked: set[str], left_out: set[str], run: RunStore | None
) -> CriterionResult:
    kept = [vote for vote in votes if vote.rater not in left_out]
    main = of_kind(kept, "main")
    found = rates(main, design.comparisons)
    return CriterionResult(
        criterion=criterion,
        rates=found,
        rankings=rankings(main),
        agreement=agreement(kept),
        sensitivity=sensitivity(of_kind(votes, "main"), design.comparisons, marked, design.rules),
        metrics=against_metrics(design, main, run),
        axes=axes(found, run),
        pairs=pair_tallies(design, main),
    )


def _counts(
    design: Design, votes: Sequence[VoteRow], assignments: Sequence[AssignmentRow], raters: Sequence[RaterRow]
) -> dict[str, Any]:
    main = [vote for vote in votes if vote.kind == "main"]
    gold = [vote for vote in votes if vote.kind == "gold"]
    by_rater: dict[str, int] = {}
    for vote in votes:
        by_rater[vote.rater] = by_rater.get(vote.rater, 0) + 1
    finished = sum(count >= len(kinds_of(design, rater)) for rater, count in by_rater.items())
    return {
        "votes": len(main),
        "pairs": len(design.pairs),
        "prompts": len({pair.prompt_id for pair in design.pairs}),
        "configurations": sorted({name for pair in design.pairs for name in _names(pair)}),
        "joined": len(raters),
        "consented": sum(bool(rater.consented_at) for rater in raters),
        "voted": len({vote.rater for vote in main}),
        "finished": finished,
        "surplus": sum(vote.surplus for vote in main),
        "unanswered": sum(not row.voted for row in assignments),
        "gold": len(gold),
        "gold_right": sum(vote.preferred(design.criteria[0]) == "a" for vote in gold),
        "median_ms": round(median(vote.response_ms for vote in main)) if main else None,
        "languages": {name: sum(vote.language == name for vote in main) for name in design.wording},
        "inputs": {name: sum(vote.input == name for vote in main) for name in ("key", "pointer", "touch")},
    }


def _names(pair: Any) -> tuple[str, str]:
    return str(pair.a.configuration), str(pair.b.configuration)


def _deviations(design: Design, votes: Sequence[VoteRow]) -> list[str]:
    found = []
    other = sum(vote.design_hash != design.hash for vote in votes)
    if other:
        found.append(f"{other} votes were given on another design")
    surplus = sum(vote.surplus for vote in votes)
    if surplus:
        found.append(f"{surplus} votes came after their pair's quota was filled; they count")
    short = design.session.votes_per_pair
    if short is not None:
        main = sum(vote.kind == "main" for vote in votes)
        if main < short * len(design.pairs):
            found.append(f"the quota was not reached: {main} of {short * len(design.pairs)} votes")
    return found
