"""The study's service over HTTP: exactly-once votes, raters kept apart, and nothing that tells who made a picture."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from tests.study_server import PASSWORD, served
from tests.tiny_study import make_study
from user_study.links import make_cookie, make_link
from user_study.service import create_service
from user_study.study import ServedStudy, Study, load_study, serve_study

MODELS = ("sentinel-alpha", "sentinel-beta", "sentinel-gamma")
CLIENT = {"input": "key", "viewport": "1280x860", "pixel_ratio": 1.0, "language": "en"}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(tmp_path, MODELS, (1, 4), 3, practice=1, gold_every=4)


@pytest.fixture
def opened(study: Study) -> Iterator[ServedStudy]:
    served_ = serve_study(study)
    yield served_
    served_.votes.close()


Connect = Callable[..., TestClient]


@pytest.fixture
def connect(opened: ServedStudy) -> Iterator[Connect]:
    """Open browsers, each with cookies of its own, on one application."""
    app = create_service(opened, PASSWORD)
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(TestClient(app, **options))


@pytest.fixture
def client(connect: Connect) -> TestClient:
    return connect()


def _json(response: Any) -> dict[str, Any]:
    response.raise_for_status()
    value: dict[str, Any] = response.json()
    return value


def _join(client: Any) -> dict[str, Any]:
    client.post("/api/join").raise_for_status()
    client.post("/api/consent", json={"language": "en"}).raise_for_status()
    return _json(client.post("/api/begin"))


_keys = iter(range(10**9))


def _body(turn: dict[str, Any], choice: str = "left", **changes: Any) -> dict[str, Any]:
    name = turn["items"][0]["assignment_id"]
    key = f"test-key-{next(_keys):016d}"
    return {"key": key, "assignment_id": name, "choices": {"overall": choice}, "response_ms": 1234, **CLIENT, **changes}


def _vote(client: Any, turn: dict[str, Any], choice: str = "left", **changes: Any) -> Any:
    return client.post("/api/vote", json=_body(turn, choice, **changes))


def test_a_rater_goes_from_consent_to_thanks(client: TestClient, opened: ServedStudy) -> None:
    welcome = _json(client.get("/api/welcome"))
    assert (welcome["known"], welcome["criteria"], welcome["languages"]) == (False, ["overall"], ["en", "zh"])
    client.post("/api/join").raise_for_status()
    assert _json(client.get("/api/next"))["phase"] == "consent"
    assert client.post("/api/begin").json() == {"error": "not-consented"}
    assert _json(client.post("/api/consent", json={"language": "zh"}))["phase"] == "instructions"
    turn = _json(client.post("/api/begin"))
    assert (turn["phase"], turn["practice_total"]) == ("practice", 1)
    answer = _json(_vote(client, turn, "left"))
    assert answer["feedback"]["correct"] == (answer["feedback"]["better"] == "left")
    turn = answer["turn"]
    total = turn["total"]
    for done in range(total):
        assert (turn["phase"], turn["done"], turn["total"]) == ("rating", done, total)
        answer = _json(_vote(client, turn, ("left", "tie", "right", "both-bad")[done % 4]))
        assert answer["feedback"] is None  # gold is not told
        turn = answer["turn"]
    assert (turn["phase"], turn["items"], turn["done"]) == ("finished", [], total)
    assert len([vote for vote in opened.votes.votes() if vote.kind == "main"]) == 12
    welcome = _json(client.get("/api/welcome"))
    assert (welcome["known"], welcome["language"]) == (True, "zh")


def test_the_same_post_twice_gets_the_same_answer(client: TestClient, opened: ServedStudy) -> None:
    body = _body(_join(client))
    first, second = client.post("/api/vote", json=body), client.post("/api/vote", json=body)
    assert _json(first) == _json(second)
    assert first.json()["recorded"] == {"assignment_id": body["assignment_id"], "choices": {"overall": "left"}}
    assert len(opened.votes.votes()) == 1


def test_an_undo_takes_the_last_vote_back_once(client: TestClient, opened: ServedStudy) -> None:
    turn = _json(_vote(client, _join(client)))["turn"]
    body = _body(turn)
    after = _json(client.post("/api/vote", json=body))["turn"]
    assert after["undo"] == body["key"]
    back = _json(client.post("/api/undo", json={"key": body["key"]}))["turn"]
    assert back["items"][0] == turn["items"][0]
    assert _json(client.post("/api/undo", json={"key": body["key"]}))["turn"]["items"] == back["items"]
    assert len(opened.votes.votes()) == 1  # the practice vote


def test_a_refresh_resumes_with_the_same_pair(client: TestClient) -> None:
    turn = _join(client)
    assert _json(client.get("/api/next")) == turn
    assert _join(client) == turn  # the cookie says that this rater has joined


def test_raters_are_kept_apart(connect: Connect, opened: ServedStudy) -> None:
    ann, ben = connect(), connect()
    hers, his = _join(ann), _join(ben)
    assert hers["items"][0]["assignment_id"] != his["items"][0]["assignment_id"]
    answer = _vote(ben, hers)
    assert (answer.status_code, answer.json()) == (404, {"error": "unknown-assignment"})
    assert _vote(ann, hers).status_code == 200
    assert _json(ben.get("/api/next")) == his
    assert len(opened.votes.votes()) == 1


def test_nobody_votes_without_having_joined(connect: Connect, opened: ServedStudy) -> None:
    turn = _join(connect())
    forged = make_cookie(b"x" * 32, opened.votes.raters()[0].id)
    unknown = make_cookie(opened.key, "nobody")
    for value in (None, "nonsense", forged, unknown):
        client = connect(headers={"Cookie": f"study_{opened.id}={value}"} if value else {})
        for answer in (client.get("/api/next"), _vote(client, turn)):
            assert (answer.status_code, answer.json()) == (401, {"error": "join-first"})
    assert opened.votes.votes() == []


def test_an_invited_rater_is_the_same_on_two_devices(connect: Connect, opened: ServedStudy) -> None:
    rater, token = make_link(opened.key, datetime.now(UTC) + timedelta(days=1))
    laptop, phone = connect(), connect()
    for device in (laptop, phone):
        answer = device.get(f"/r/{token}", follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, "../study/")
    turn = _join(laptop)
    assert _json(phone.get("/api/next")) == turn
    assert [row.id for row in opened.votes.raters()] == [rater]


def test_forged_and_expired_links_say_so(connect: Connect, opened: ServedStudy) -> None:
    _, good = make_link(opened.key, datetime.now(UTC) + timedelta(days=1))
    _, old = make_link(opened.key, datetime.now(UTC) - timedelta(seconds=1))
    _, foreign = make_link(b"y" * 32, datetime.now(UTC) + timedelta(days=1))
    for token, words in ((old, "no longer valid"), (foreign, "not made by this study"), (good[:-2], "not made by")):
        answer = connect().get(f"/r/{token}", follow_redirects=False)
        assert answer.status_code == 403
        assert words in answer.text
        assert 'lang="zh"' in answer.text
        assert "set-cookie" not in answer.headers
    assert opened.votes.raters() == []


def test_an_invited_study_lets_nobody_else_in(study: Study) -> None:
    closed = serve_study(study, invited_only=True)
    with TestClient(create_service(closed)) as client:
        assert _json(client.get("/api/welcome"))["invited_only"]
        answer = client.post("/api/join")
        assert (answer.status_code, answer.json()) == (403, {"error": "invitation-needed"})
        _, token = make_link(closed.key, datetime.now(UTC) + timedelta(days=1))
        client.get(f"/r/{token}", follow_redirects=False)
        assert _join(client)["items"]
    closed.votes.close()


def test_a_restarted_server_goes_on(study: Study, opened: ServedStudy) -> None:
    with TestClient(create_service(opened)) as client:
        following = _json(_vote(client, _join(client)))["turn"]
        cookies = dict(client.cookies)
    opened.votes.close()
    again = serve_study(load_study(study.folder))
    assert again.images == opened.images
    with TestClient(create_service(again), cookies=cookies) as client:
        assert _json(client.get("/api/next")) == following
    again.votes.close()


@pytest.mark.parametrize(
    "change",
    [
        {"choices": {"overall": "both"}},
        {"choices": {}},
        {"choices": {"appeal": "left"}},
        {"choices": {"overall": "left", "appeal": "left"}},
        {"choices": None},
        {"response_ms": -1},
        {"response_ms": "12"},
        {"response_ms": 1.5},
        {"response_ms": 10**12},
        {"pixel_ratio": float("1e9")},
        {"viewport": "wide"},
        {"input": "telepathy"},
        {"language": "xx"},
        {"key": "short"},
        {"assignment_id": "../../etc/passwd"},
        {"rater": "somebody"},
    ],
    ids=str,
)
def test_malformed_votes_are_refused(client: TestClient, opened: ServedStudy, change: dict[str, Any]) -> None:
    answer = _vote(client, _join(client), **change)
    assert (answer.status_code, answer.json()) == (422, {"error": "wrong-request"})
    assert opened.votes.votes() == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"key": 1}', b"[" * 8000])
def test_what_is_no_json_is_refused(client: TestClient, content: bytes) -> None:
    _join(client)
    answer = client.post("/api/vote", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()) == (422, {"error": "wrong-request"})


def test_oversized_and_unannounced_bodies_are_refused(client: TestClient) -> None:
    _join(client)
    answer = client.post("/api/vote", content=b"x" * 20_000)
    assert (answer.status_code, answer.json()) == (413, {"error": "too-large"})
    assert client.post("/api/vote", content=iter([b"x"])).status_code == 411


def test_whoever_writes_too_often_is_told_when_to_go_on(client: TestClient) -> None:
    _join(client)
    answers = [client.post("/api/undo", json={"key": "k" * 20}) for _ in range(190)]
    assert answers[0].status_code == 200
    assert answers[-1].status_code == 429
    assert answers[-1].json() == {"error": "slow-down"}
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60


def test_images_are_immutable_private_and_known(client: TestClient, opened: ServedStudy) -> None:
    item = _join(client)["items"][0]
    answer = client.get(f"/img/{item['left']}")
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["cache-control"] == "private, max-age=31536000, immutable"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not {"last-modified", "etag"} & set(answer.headers)
    for unknown in ("nothing", "..%2f..%2frun.json", f"{item['left']}.png"):
        assert client.get(f"/img/{unknown}").status_code == 404


def test_health_and_the_way_in(client: TestClient, opened: ServedStudy) -> None:
    assert client.get("/livez").text == client.get("/readyz").text == "ok"
    assert client.get("/", follow_redirects=False).headers["location"] == "study/"
    assert {client.get(path).status_code for path in ("/docs", "/openapi.json")} == {404}
    _join(client)
    opened.votes.close()
    for name in ("votes.sqlite-wal", "votes.sqlite-shm"):
        (opened.study.folder / name).unlink(missing_ok=True)
    (opened.study.folder / "votes.sqlite").write_bytes(b"overwritten" * 1000)
    assert client.get("/readyz").status_code == 503
    answer = client.get("/api/next")
    assert (answer.status_code, answer.json()) == (503, {"error": "database"})


def test_the_admin_page_is_behind_its_password(connect: Connect, opened: ServedStudy) -> None:
    def knock(password: str) -> int:
        value = b64encode(f"admin:{password}".encode()).decode()
        return connect().get("/admin/state.json", headers={"Authorization": f"Basic {value}"}).status_code

    assert connect().get("/admin/").status_code == 401
    assert connect().get("/admin/export").status_code == 401
    assert knock(PASSWORD) == 200
    assert [knock("wrong") for _ in range(11)] == [401] * 10 + [429]
    assert knock(PASSWORD) == 200
    with TestClient(create_service(opened)) as without:
        assert without.get("/admin/").status_code == 404


def test_the_administrator_sees_pauses_and_exports(connect: Connect, opened: ServedStudy) -> None:
    rater = connect()
    turn = _join(rater)
    while turn["items"]:
        turn = _json(_vote(rater, turn))["turn"]
    admin = connect()
    admin.auth = ("admin", PASSWORD)
    page = admin.get("/admin/")
    assert "nonce-" in page.headers["content-security-policy"]
    state = _json(admin.get("/admin/state.json"))
    assert (state["votes"], state["joined"], state["consented"], state["left_share"]) == (12, 1, 1, 1.0)
    assert [row["votes"] for row in state["comparisons"]] == [3] * 4
    assert all(abs(row["a_left"] - row["a_right"]) <= 1 for row in state["comparisons"])
    assert state["coverage"] == [1, 1, 1]
    assert state["gold"] == state["raters"][0]["gold"] > 0
    header = {"X-Study-Admin": "1"}
    assert admin.post("/admin/pause", json={"paused": True}).status_code == 403  # as another site's form would
    assert admin.post("/admin/pause", json={"paused": "yes"}, headers=header).status_code == 422
    assert _json(admin.post("/admin/pause", json={"paused": True}, headers=header)) == {"paused": True}
    assert _json(rater.get("/api/next"))["phase"] == "paused"
    csv = admin.get("/admin/export")
    assert csv.text.startswith("rater,kind,comparison,")
    assert csv.text.count("\n") == 1 + len(opened.votes.votes())
    assert admin.get("/admin/export?form=parquet").content[:4] == b"PAR1"
    assert admin.get("/admin/export?form=exe").status_code == 422


def test_nothing_a_browser_gets_tells_who_made_a_picture(study: Study) -> None:
    """A whole session on the real server, every byte of every answer, the page included; then its files."""
    received: list[bytes] = []

    def keep(response: httpx.Response) -> None:
        headers = "\n".join(f"{name}: {value}" for name, value in response.headers.items())
        received.append(f"{response.request.url}\n{headers}\n".encode() + response.read())

    images: set[str] = set()
    with served(study.folder) as origin, httpx.Client(base_url=origin, timeout=60) as client:
        client.event_hooks = {"request": [], "response": [keep]}
        client.get("/api/welcome")
        turn = _join(client)
        while turn["items"]:
            for item in turn["items"]:
                images |= {item["left"], item["right"]}
            for side in ("left", "right"):
                client.get(f"/img/{turn['items'][0][side]}").raise_for_status()
            turn = _json(_vote(client, turn, "tie"))["turn"]
        client.post("/api/vote", json={"assignment_id": 1})
        for path in ("/img/unknown", "/api/unknown", "/r/unknown", "/study/", "/study/config",
                     "/study/gradio_api/info", "/admin/", "/admin/state.json"):  # fmt: skip
            client.get(path)
        assert len(received) > 3 * 12
        everything = b"\n".join(received).lower()
        secrets = ("sentinel", "p0000", "p0001", "p0002", ".safetensors", str(study.folder).lower(), "@4", "@1")
        for secret in (*secrets, "gold", "repeat_"):
            assert secret.encode() not in everything, secret
        files = (study.folder / "design.json", study.folder / "votes.sqlite", study.folder / "study.key",
                 study.folder.parent / "run" / "run.json")  # fmt: skip
        for file in files:
            assert client.get(f"/study/gradio_api/file={file}").status_code in (403, 404)
        assert client.post("/study/gradio_api/upload", files={"files": ("x.txt", b"hello")}).status_code >= 400
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{22}", name) for name in images)


def test_the_baseline_is_on_both_sides_equally_often(connect: Connect, opened: ServedStudy) -> None:
    from user_study.images import image_id

    baseline = {image_id(opened.key, pair.id, "a"): pair.comparison for pair in opened.design.pairs}
    for _ in range(4):
        client = connect()
        turn = _join(client)
        balance = dict.fromkeys(opened.design.comparisons, 0)
        while turn["items"]:
            item = turn["items"][0]
            for side, sign in (("left", 1), ("right", -1)):
                if item[side] in baseline:
                    balance[baseline[item[side]]] += sign
            turn = _json(_vote(client, turn))["turn"]
        assert all(abs(difference) <= 1 for difference in balance.values())


def test_a_changed_design_is_refused_once_votes_exist(study: Study, opened: ServedStudy) -> None:
    from hypersd_bench.errors import InputError
    from user_study.design import write_design

    write_design(study.folder / "design.json", replace(study.design, planned_rate=0.9), "../run")
    with pytest.raises(InputError, match="another design"):
        serve_study(load_study(study.folder))
