"""Hostile requests to the study's server: an answer to each, never an error of the server, and no vote spoiled.

The default suite tries a seeded few; ``pytest -m nightly tests/unit/test_fuzz_study.py`` tries 2,000.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from tests.hostile import FEW, JUNK, MANY, garbled, mutated
from tests.tiny_study import make_study
from user_study.guard import RateLimits
from user_study.service import create_service
from user_study.study import ServedStudy, serve_study

METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "x")
PATHS = ("/", "/livez", "/readyz", "/img/", "/r/", "/api/welcome", "/api/join", "/api/consent", "/api/begin",
         "/api/language", "/api/next", "/api/vote", "/api/undo", "/admin/", "/admin/export", "/study", "/../key",
         "/img/..%2f..%2fkey", "/%00", "//", "/api//vote", "/r/%ff")  # fmt: skip
HEADERS = ("Content-Type", "Content-Length", "Origin", "Host", "Cookie", "Authorization", "X-Forwarded-For", "Range",
           "Accept-Encoding", "Sec-Fetch-Site")  # fmt: skip
VALUES = ("", "x", "-1", "application/json", "text/plain", "Basic YWRtaW46", "Basic \u00e9", "bytes=0-99999999999",
          "http://evil.example", "a=b; study_x=y", "x" * 5000)  # fmt: skip


class Server:
    """A study being served, with a rater who has pairs to vote on, and requests that go wrong."""

    def __init__(self, study: ServedStudy, folder: Path) -> None:
        self.study, self.folder, self.service = study, folder, create_service(study, "a password")
        self.client = TestClient(self.service, raise_server_exceptions=False, follow_redirects=False)
        self.client.post("/api/join").raise_for_status()
        self.client.post("/api/consent", json={"language": "en"}).raise_for_status()
        self.turn = self.client.post("/api/begin").raise_for_status().json()
        self.cookies = dict(self.client.cookies)

    def attempt(self, seed: int) -> None:
        """Send one request that something is wrong with, or nothing; then the study must stand as before or better."""
        rng = random.Random(seed)
        self.service.state.limits = RateLimits()
        self.client.cookies = {name: _spoiled(value, rng) for name, value in self.cookies.items()}
        request: dict[str, Any] = {"headers": _headers(rng)}
        if rng.random() < 0.8:
            body = json.dumps(mutated(self._sound(rng), seed) if rng.random() < 0.7 else self._sound(rng)).encode()
            request["content"] = garbled(body, seed) if rng.random() < 0.3 else body
        path = rng.choice(PATHS) + (quote(str(rng.choice(JUNK))) if rng.random() < 0.2 else "")
        method = rng.choice(METHODS[:2]) if rng.random() < 0.7 else rng.choice(METHODS)
        answer = self.client.request(method, f"http://testserver{path}", **request)
        assert answer.status_code < 500, (path, answer.text)
        assert "Traceback" not in answer.text
        for name in ('"one', '"two', "one@4", str(self.folder)):
            assert name not in answer.text
        for vote in self.study.votes.votes():
            assert set(vote.choices.values()) <= {"left", "right", "tie", "both-bad"}
            assert set(vote.choices) == set(self.study.design.criteria)

    def _sound(self, rng: random.Random) -> dict[str, Any]:
        """A body that some route takes."""
        item = rng.choice(self.turn["items"])["assignment_id"]
        return rng.choice([
            {"language": "en"},
            {"key": "k" * 20},
            {"key": f"{rng.getrandbits(80):020x}", "assignment_id": item, "choices": {"overall": "left"},
             "response_ms": 900, "input": "key", "viewport": "800x600", "pixel_ratio": 1.0, "language": "en"},
        ])  # fmt: skip


def _spoiled(cookie: str, rng: random.Random) -> str:
    """The rater's cookie, mostly as it is."""
    return cookie if rng.random() < 0.8 else rng.choice(["", "x", cookie[:-3], cookie[::-1], cookie + "x"])


def _headers(rng: random.Random) -> dict[str, bytes]:
    said = {name: rng.choice(VALUES).encode("latin-1") for name in rng.sample(HEADERS, rng.randint(0, 2))}
    return {"Content-Type": b"application/json", **said}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    study = serve_study(make_study(tmp_path, ("one", "two"), (4,), 12))
    yield Server(study, tmp_path)
    study.votes.close()


def test_a_few_requests(server: Server) -> None:
    FEW(given(st.integers(0, 2**32))(server.attempt))()


@pytest.mark.nightly
def test_many_requests(server: Server) -> None:
    MANY(given(st.integers(0, 2**32))(server.attempt))()
    assert server.study.votes.votes()  # some were sound, and are kept
