"""The miniature's own pictures put to thirty simulated raters and a spammer: what they like is found out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from fastapi.testclient import TestClient

from hypersd_bench.cli.main import main
from tests.postgres import fresh_schema
from tests.simulated_raters import SimulatedRater, Tastes
from tests.study_load import Load
from tests.study_server import served
from tests.tiny_study import make_study
from user_study.links import make_link
from user_study.making import Plan
from user_study.service import create_service
from user_study.study import ServedStudy, load_study, serve_study

TASTES = Tastes({"hyper-sd@4": 0.8, "tcd@4": 0.0, "lcm@4": -0.8}, side=0.35)
CLIENT = {"input": "key", "viewport": "1280x860", "pixel_ratio": 1.0, "language": "en"}


@pytest.fixture(scope="module")
def served_study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedStudy]:
    folder = tmp_path_factory.mktemp("proof")
    spec = ["run", "--base", "pocket", "--models", "hyper-sd,tcd,lcm", "--steps", "4", "--prompts", "pocket/held-out",
            "--num-prompts", "12", "--no-timing", "--metrics", "clip-score/pocket",
            "--out", str(folder / "run")]  # fmt: skip
    assert main(spec) == 0
    pairs = "hyper-sd@4:tcd@4,hyper-sd@4:lcm@4,tcd@4:lcm@4"
    assert main(["study", "new", str(folder / "run"), "--pairs", pairs, "--pairs-each", "12", "--per-rater", "36",
                 "--raters", "31", "--out", str(folder / "study")]) == 0  # fmt: skip
    opened = serve_study(load_study(folder / "study"))
    yield opened
    opened.votes.close()


def _session(client: TestClient, opened: ServedStudy, rater: SimulatedRater) -> None:
    """Everything a browser sends, from opening the link to the end."""
    by_image = _pairs_by_image(opened)
    expires = datetime.now(UTC) + timedelta(days=1)
    client.get(f"/r/{make_link(opened.key, expires, rater.name)[1]}", follow_redirects=False)
    client.post("/api/consent", json={"language": "en"}).raise_for_status()
    turn = client.post("/api/begin").json()
    number = 0
    while turn["items"]:
        item = turn["items"][0]
        pair_id, arm = by_image[item["left"]]
        choice, time = rater.choose(opened.design.pair(pair_id), arm == "a")
        body = {"key": f"{rater.name}-{number:010d}", "assignment_id": item["assignment_id"],
                "choices": {"overall": choice}, "response_ms": time, **CLIENT}  # fmt: skip
        answer = client.post("/api/vote", json=body)
        answer.raise_for_status()
        turn, number = answer.json()["turn"], number + 1


def _pairs_by_image(opened: ServedStudy) -> dict[str, tuple[str, str]]:
    from user_study.images import image_id

    design = opened.design
    pairs = (*design.pairs, *design.gold, *design.practice)
    return {image_id(opened.key, pair.id, arm): (pair.id, arm) for pair in pairs for arm in ("a", "b")}


@pytest.fixture(scope="module")
def analysis(served_study: ServedStudy) -> dict[str, Any]:
    app = create_service(served_study)
    for r in range(31):
        rater = SimulatedRater(f"rater{r:02d}", TASTES, spammer=r == 30)
        with TestClient(app) as client:
            _session(client, served_study, rater)
    folder = served_study.study.folder
    assert main(["study", "analyse", str(folder)]) == 0
    found: dict[str, Any] = json.loads((folder / "analysis.json").read_text())
    return found


def test_tastes_are_recovered_within_their_intervals(analysis: dict[str, Any]) -> None:
    (ranking,) = analysis["criteria"][0]["rankings"]
    assert [entry["name"] for entry in ranking["strengths"]] == ["hyper-sd@4", "tcd@4", "lcm@4"]
    for entry in ranking["strengths"]:
        assert entry["low"] <= TASTES.strength[entry["name"]] <= entry["high"]
        assert entry["rank_low"] == entry["rank_high"]


def test_the_position_bias_is_reported(analysis: dict[str, Any]) -> None:
    side = analysis["criteria"][0]["rankings"][0]["side_bias"]
    assert 0 < side["low"] <= TASTES.side <= side["high"]


def test_the_spammer_alone_is_flagged(analysis: dict[str, Any]) -> None:
    (flagged,) = [row for row in analysis["raters"] if row["flags"]]
    assert flagged["median_ms"] < 500
    assert len(flagged["flags"]) >= 2


def test_gold_repeats_and_quota_are_as_designed(analysis: dict[str, Any], served_study: ServedStudy) -> None:
    counts, session = analysis["counts"], served_study.design.session
    assert counts["joined"] == counts["consented"] == 31
    assert session.votes_per_pair is not None
    assert counts["votes"] == session.votes_per_pair * len(served_study.design.pairs) == 31 * 36
    rows = served_study.votes.votes()
    per_rater = [
        sum(row.rater == rater.id and row.kind == "gold" for row in rows) for rater in served_study.votes.raters()
    ]
    assert sum(per_rater) == counts["gold"]
    assert max(per_rater) - min(per_rater) <= 1
    metric = analysis["criteria"][0]["metrics"]["metrics"][0]
    assert metric["id"] == "clip-score/pocket"
    assert 0 < metric["agreement"]["low"] < metric["agreement"]["high"] < 1


@pytest.mark.parametrize("database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.nightly)])
def test_no_vote_is_lost_or_doubled_when_the_server_is_killed(
    tmp_path: Path, database: str, request: pytest.FixtureRequest
) -> None:
    """Every request sent twice, the server killed in between (kill -9); the long trial is in benchmarks/."""
    import socket

    db = [] if database == "sqlite" else ["--db", fresh_schema(request.getfixturevalue("postgres"))]
    study = make_study(tmp_path, num_prompts=20, plan=Plan(pairs_each=20, votes_per_pair=8), gold_every=10)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    load = Load(study, f"http://127.0.0.1:{port}", num_raters=8, seconds=60, pause=0.3, copies=2)
    thread = Thread(target=load.run)
    with served(study.folder, *db, port=port):
        thread.start()
        thread.join(3)
    with served(study.folder, *db, port=port):
        thread.join()
    votes = study.open_votes(db[1] if db else None)
    assert load.failures > 0
    assert (*load.lost_or_doubled(votes), load.contradicted) == (0, 0, 0)
    assert len(votes.votes()) == len(load.acknowledged) >= 160  # everybody came to the end
    votes.close()
