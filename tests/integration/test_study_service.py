"""The study's service over HTTP: exactly-once votes, raters kept apart, and nothing that tells who made a picture."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from tests.study_server import served
from tests.synthetic_run import make_run
from user_study.service import create_service
from user_study.study import Study, open_study

MODELS = ("sentinel-alpha", "sentinel-beta", "sentinel-gamma")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", models=MODELS, steps=(1, 4), num_prompts=3, replicates=1).folder


@pytest.fixture
def study(run: Path) -> Iterator[Study]:
    opened = open_study(run, 8)
    yield opened
    opened.votes.close()


@pytest.fixture
def client(study: Study) -> Iterator[TestClient]:
    with TestClient(create_service(study)) as opened:
        yield opened


def _join(client: TestClient) -> dict[str, Any]:
    client.post("/api/join").raise_for_status()
    return _json(client.get("/api/next"))


def _vote(client: TestClient, pair: dict[str, Any], choice: str = "left") -> Any:
    body = {"assignment_id": pair["assignment_id"], "choice": choice, "response_ms": 1234}
    return client.post("/api/vote", json=body)


def _json(response: Any) -> dict[str, Any]:
    response.raise_for_status()
    value: dict[str, Any] = response.json()
    return value


def test_a_rater_votes_to_the_end(client: TestClient, study: Study) -> None:
    turn = _join(client)
    for done in range(8):
        assert (turn["done"], turn["total"]) == (done, 8)
        turn = _json(_vote(client, turn["pair"], ("left", "tie", "right")[done % 3]))["next"]
    assert turn == {"done": 8, "total": 8, "pair": None}
    assert [row.choice for row in study.votes.votes()] == ["left", "tie", "right"] * 2 + ["left", "tie"]


def test_the_same_post_twice_gets_the_same_answer(client: TestClient, study: Study) -> None:
    pair = _join(client)["pair"]
    first, second = _vote(client, pair), _vote(client, pair)
    assert first.json() == second.json()
    assert first.json()["recorded"] == {"assignment_id": pair["assignment_id"], "choice": "left"}
    assert len(study.votes.votes()) == 1


def test_a_refresh_resumes_with_the_same_pair(client: TestClient) -> None:
    turn = _join(client)
    assert _join(client) == turn  # the cookie says that this rater has joined


def test_raters_are_kept_apart(study: Study) -> None:
    app = create_service(study)
    with TestClient(app) as ann, TestClient(app) as ben:
        hers, his = _join(ann), _join(ben)
        assert hers["pair"]["assignment_id"] != his["pair"]["assignment_id"]
        assert _vote(ben, hers["pair"]).status_code == 404
        assert _vote(ann, hers["pair"]).status_code == 200
        assert _json(ben.get("/api/next")) == his
    assert len(study.votes.votes()) == 1


@pytest.mark.parametrize("token", [None, "forged"])
def test_nobody_votes_without_having_joined(client: TestClient, study: Study, token: str | None) -> None:
    headers = {"Cookie": f"study_{study.id}={token}"} if token else {}
    assert client.get("/api/next", headers=headers).status_code == 401
    body = {"assignment_id": "x" * 22, "choice": "left", "response_ms": 1}
    assert client.post("/api/vote", json=body, headers=headers).status_code == 401


def test_a_restarted_server_goes_on(run: Path, study: Study) -> None:
    with TestClient(create_service(study)) as client:
        following = _json(_vote(client, _join(client)["pair"]))["next"]
        cookies = dict(client.cookies)
    study.votes.close()
    again = open_study(run)
    assert again.images == study.images
    with TestClient(create_service(again), cookies=cookies) as client:
        assert _join(client) == following
    again.votes.close()


@pytest.mark.parametrize(
    "change",
    [
        {"choice": "both"},
        {"choice": None},
        {"response_ms": -1},
        {"response_ms": "12"},
        {"response_ms": 1.5},
        {"assignment_id": "../../etc/passwd"},
        {"rater": "somebody"},
    ],
)
def test_malformed_votes_are_refused(client: TestClient, study: Study, change: dict[str, Any]) -> None:
    pair = _join(client)["pair"]
    body = {"assignment_id": pair["assignment_id"], "choice": "left", "response_ms": 1, **change}
    assert client.post("/api/vote", json=body).status_code == 422
    assert study.votes.votes() == []


def test_oversized_and_unannounced_bodies_are_refused(client: TestClient) -> None:
    _join(client)
    assert client.post("/api/vote", content=b"x" * 20_000).status_code == 413
    assert client.post("/api/vote", content=iter([b"x"])).status_code == 411


def test_images_are_immutable_private_and_known(client: TestClient, study: Study) -> None:
    pair = _join(client)["pair"]
    answer = client.get(f"/img/{pair['left']}")
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["cache-control"] == "private, max-age=31536000, immutable"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not {"last-modified", "etag"} & set(answer.headers)
    for unknown in ("nothing", "..%2f..%2frun.json", f"{pair['left']}.png"):
        assert client.get(f"/img/{unknown}").status_code == 404


def test_health_and_the_way_in(client: TestClient, study: Study) -> None:
    assert client.get("/livez").text == client.get("/readyz").text == "ok"
    assert client.get("/", follow_redirects=False).headers["location"] == "study/"
    assert {client.get(path).status_code for path in ("/docs", "/openapi.json")} == {404}
    study.votes.close()
    study.votes.path.write_bytes(b"overwritten" * 1000)
    for name in ("votes.sqlite-wal", "votes.sqlite-shm"):
        study.votes.path.with_name(name).unlink(missing_ok=True)
    assert client.get("/readyz").status_code == 503


def test_nothing_a_browser_gets_tells_who_made_a_picture(run: Path) -> None:
    """A whole session on the real server, every byte of every answer, the page included; then its files."""
    received: list[bytes] = []

    def keep(response: httpx.Response) -> None:
        headers = "\n".join(f"{name}: {value}" for name, value in response.headers.items())
        received.append(f"{response.request.url}\n{headers}\n".encode() + response.read())

    with served(run, "--pairs", "4") as origin, httpx.Client(base_url=origin, timeout=60) as client:
        client.event_hooks = {"request": [], "response": [keep]}
        client.post("/api/join").raise_for_status()
        turn = _json(client.get("/api/next"))
        while turn["pair"]:
            for side in ("left", "right"):
                client.get(f"/img/{turn['pair'][side]}").raise_for_status()
            body = {"assignment_id": turn["pair"]["assignment_id"], "choice": "tie", "response_ms": 1}
            turn = _json(client.post("/api/vote", json=body))["next"]
        client.post("/api/vote", json={"assignment_id": 1})
        for path in ("/img/unknown", "/api/unknown", "/study/", "/study/config", "/study/gradio_api/info"):
            client.get(path)
        assert len(received) == 2 + 4 * 3 + 6
        everything = b"\n".join(received).lower()
        for secret in ("sentinel", "p0000", "p0001", "p0002", ".safetensors", str(run).lower()):
            assert secret.encode() not in everything, secret

        for file in (run / "run.json", run / "study" / "votes.sqlite", run / "study" / "design.json"):
            assert client.get(f"/study/gradio_api/file={file}").status_code in (403, 404)
        assert client.post("/study/gradio_api/upload", files={"files": ("x.txt", b"hello")}).status_code >= 400


def test_no_order_or_side_tells_the_baseline(study: Study) -> None:
    """Ids are random; the baseline is on both sides about equally often."""
    ids = study.votes.image_ids()
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{22}", image_id) for image_id in ids.values())
    left = 0
    baseline = {ids[pair.id, "a"] for pair in study.design.pairs}
    for _ in range(4):
        with TestClient(create_service(study)) as client:
            turn = _join(client)
            while turn["pair"]:
                left += turn["pair"]["left"] in baseline
                turn = _json(_vote(client, turn["pair"]))["next"]
    assert left == 4 * 4  # four pairs of each of the two method pairs: exactly half, for every rater
