"""People against metrics: how often a vote prefers the image that a metric scores better."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from hypersd_bench.contracts import MetricInfo
from hypersd_bench.store import RunStore
from metrics.comparison import is_trained_on
from metrics.preference import two_way_rate
from metrics.rater_agreement import leave_one_out_agreement
from user_study.analysis.votes import Judged
from user_study.design import Design

MOST = 10  # pairs shown where people and a metric disagree


def against_metrics(design: Design, votes: Sequence[Judged], run: RunStore | None) -> dict[str, Any]:
    """For each per-image metric of the run: its agreement with the votes, and where they disagree most.

    votes: main votes. ``ceiling`` is how often a rater agrees with the majority of the others; no metric can be
    expected above. ``reason`` says why there is nothing.
    """
    if run is None:
        return {"reason": "the run is not at hand", "ceiling": None, "metrics": []}
    decided = [vote for vote in votes if vote.preferred in ("a", "b")]
    infos = [info for info in _infos(run) if info.kind == "image"]
    if not infos or not decided:
        reason = "the run has no metric with a value for each image" if decided else "no vote prefers an image"
        return {"reason": reason, "ceiling": None, "metrics": []}
    ids = {(row.file, row.sha256): row.id for row in run.images()}
    trained = {
        model["name"]: [info.id for info in infos if is_trained_on(model.get("trained_on", ()), info.id)]
        for model in run.manifest["models"]
    }
    found = [_metric(design, decided, run, info, ids, trained) for info in infos]
    return {"reason": "", "ceiling": _ceiling(votes), "metrics": found}


def _infos(run: RunStore) -> list[MetricInfo]:
    names = {field.name for field in fields(MetricInfo)}
    return [
        MetricInfo(**{name: value for name, value in raw.items() if name in names})
        for raw in run.manifest.get("metrics", [])
    ]


def _metric(
    design: Design,
    decided: Sequence[Judged],
    run: RunStore,
    info: MetricInfo,
    ids: Mapping[tuple[str, str], int | None],
    trained: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    lead = _leads(design, run, info, ids)
    able = [vote for vote in decided if vote.pair_id in lead]
    row: dict[str, Any] = {"id": info.id, "label": info.label, "unit": info.unit, "direction": info.direction}
    models = sorted({c.model for vote in decided for c in (vote.a, vote.b)})
    row["trained_on_by"] = [model for model in models if info.id in trained.get(model, ())]
    if not able:
        return {**row, "agreement": None, "disagreements": [], "reason": "no pair of which both images are scored"}
    agrees = [0.5 if lead[v.pair_id] == 0 else float((lead[v.pair_id] > 0) == (v.preferred == "a")) for v in able]
    rate = two_way_rate(agrees, [vote.rater for vote in able], [vote.prompt_id for vote in able])
    return {**row, "agreement": asdict(rate), "disagreements": _disagreements(design, able, lead), "reason": ""}


def _leads(
    design: Design, run: RunStore, info: MetricInfo, ids: Mapping[tuple[str, str], int | None]
) -> dict[str, float]:
    """By pair, how much better the metric scores image a than image b; only images that are as they were designed."""
    scores = run.scores(info.id)
    sign = 1 if info.direction == "higher" else -1
    lead = {}
    for pair in design.pairs:
        rows = [scores.get(ids.get((arm.file, arm.sha256)) or -1) for arm in (pair.a, pair.b)]
        a, b = (None if row is None else row.value for row in rows)
        if a is not None and b is not None:
            lead[pair.id] = sign * (a - b)
    return lead


def _disagreements(design: Design, votes: Sequence[Judged], lead: Mapping[str, float]) -> list[dict[str, Any]]:
    """Pairs on which most people prefer what the metric scores worse; the most one-sided first."""
    for_a: dict[str, list[float]] = defaultdict(list)
    for vote in votes:
        for_a[vote.pair_id].append(vote.score)
    against = []
    for pair_id, scores in for_a.items():
        share = sum(scores) / len(scores)
        excess = sum(scores) - len(scores) / 2
        if excess * lead[pair_id] < 0:
            against.append((abs(excess), pair_id, share, len(scores)))
    against.sort(key=lambda entry: (-entry[0], -abs(lead[entry[1]]), entry[1]))
    return [
        {
            "pair": pair_id,
            "prompt": design.pair(pair_id).prompt,
            "comparison": design.pair(pair_id).comparison,
            "a_preferred": share,
            "votes": n,
            "metric_lead_of_a": lead[pair_id],
        }
        for _, pair_id, share, n in against[:MOST]
    ]


def _ceiling(votes: Sequence[Judged]) -> dict[str, Any] | None:
    """How often votes agree with the majority of the others on the pair, over all raters."""
    found = leave_one_out_agreement(
        [vote.score for vote in votes], [vote.pair_id for vote in votes], [vote.rater for vote in votes]
    )
    n = sum(count for _, count in found.values())
    return {"value": sum(share * count for share, count in found.values() if count) / n, "n": n} if n else None
