"""A small model hub on this machine, for huggingface_hub to talk to as it talks to the real one.

It speaks the part of the hub's protocol that downloads use: listings, commits, ETags, LFS files behind a redirect to
another host, ranges, tokens and gated repositories, and the error codes that huggingface_hub tells apart. What goes
wrong on a network can be asked of it: failing, dropped, truncated, short and tampered answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import NamedTuple
from urllib.parse import unquote

LFS = (".safetensors", ".bin")  # what the hub stores by LFS: named by its SHA-256, served from another host
_LISTING = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_CDN = re.compile(r"/cdn/([^/]+/[^/]+)/(.+)")
_RANGE = re.compile(r"bytes=(\d+)-")


class Request(NamedTuple):
    """A request that arrived; ``range`` is its Range header, or empty."""

    method: str
    path: str
    range: str
    authorized: bool


class Answer(NamedTuple):
    """A status, headers, and a body that HEAD goes without."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass(frozen=True)
class _Repo:
    files: Mapping[str, bytes]
    gated_token: str | None
    commit: str


@dataclass
class _Fault:
    kind: str
    where: str
    method: str
    left: float
    status: int = 0

    def take(self, method: str, path: str) -> bool:
        """Whether this request is one that the fault was asked for; counts it."""
        if self.left <= 0 or self.method not in ("", method) or not path.endswith(f"/{self.where}"):
            return False
        self.left -= 1
        return True


@dataclass
class StandInHub:
    """The hub, from ``with StandInHub() as hub``; ``hub.url`` is for HF_ENDPOINT, ``hub.requests`` is what arrived."""

    requests: list[Request] = field(default_factory=list)
    _repos: dict[str, _Repo] = field(default_factory=dict)
    _faults: list[_Fault] = field(default_factory=list)
    _servers: list[ThreadingHTTPServer] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> StandInHub:
        # two servers, as the real hub has: huggingface_hub takes a redirect to the same host for a renamed repository
        for answer in (self._answer_hub, self._answer_cdn):
            server = _Server(("127.0.0.1", 0), _handler(self, answer))
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            self._servers.append(server)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def cdn(self) -> str:
        return f"http://127.0.0.1:{self._servers[1].server_port}/cdn"

    def add(self, repo_id: str, files: Mapping[str, bytes], gated_token: str | None = None) -> str:
        """Serve a repository; returns its commit, which with ``main`` is all that it answers to.

        With ``gated_token`` only who sends that token gets its files; others get no further than the listing.
        """
        digest = hashlib.sha1(repo_id.encode())
        for name in sorted(files):
            digest.update(f"{name}\0{_git_hash(files[name])}".encode())
        self._repos[repo_id] = _Repo(dict(files), gated_token, digest.hexdigest())
        return digest.hexdigest()

    def fail(self, file: str, status: int = 503, times: float = 2, method: str = "") -> None:
        """Answer the next ``times`` requests (of one ``method`` alone, if given) of a file with an error status.

        ``file`` is a path in a repository or the end of any other path: ``api/models/acme/tiny/revision/main``.
        """
        self._faults.append(_Fault("fail", file, method, times, status))

    def drop(self, file: str, times: float = 1, method: str = "") -> None:
        """Close the connection instead of answering."""
        self._faults.append(_Fault("drop", file, method, times))

    def truncate(self, file: str, times: float = 1) -> None:
        """Announce all that was asked for, send half, and close."""
        self._faults.append(_Fault("truncate", file, "GET", times))

    def shorten(self, file: str) -> None:
        """Send half of a file as if it were all; the hub goes on to announce its whole size."""
        self._faults.append(_Fault("shorten", file, "GET", float("inf")))

    def tamper(self, file: str) -> None:
        """Send other content, of the same size, than the hub announces."""
        self._faults.append(_Fault("tamper", file, "GET", float("inf")))

    def heal(self) -> None:
        """Forget all faults that were asked for."""
        self._faults.clear()

    def fault(self, method: str, path: str) -> _Fault | None:
        """The fault that a request meets, counted."""
        with self._lock:
            return next((fault for fault in self._faults if fault.take(method, path)), None)

    def _answer_hub(self, path: str, token: str) -> Answer:
        if token and token not in {repo.gated_token for repo in self._repos.values()}:
            return _refusal(401, "", "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            if not token:
                return _refusal(401, "", "Invalid username or password.")
            return Answer(200, {}, json.dumps({"type": "user", "name": "tester"}).encode())
        if match := _LISTING.fullmatch(path):
            return self._answer_listing(match[1], match[2], unquote(match[3] or "main"), token)
        if match := _RESOLVE.fullmatch(path):
            return self._answer_file(match[1], unquote(match[2]), unquote(match[3]), token)
        return Answer(404, {})

    def _missing(self, repo_id: str, revision: str, token: str) -> Answer | None:
        """The refusal for a repository or a revision that isn't there; who has no token isn't told which it is."""
        if repo_id not in self._repos:
            return _refusal(404 if token else 401, "RepoNotFound", "Repository not found")
        if revision not in ("main", self._repos[repo_id].commit):
            return _refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _answer_listing(self, repo_id: str, what: str | None, revision: str, token: str) -> Answer:
        if missing := self._missing(repo_id, revision, token):
            return missing
        repo = self._repos[repo_id]
        if what == "tree":
            return Answer(200, {}, json.dumps([_row(name, content) for name, content in repo.files.items()]).encode())
        siblings = [{"rfilename": name} for name in repo.files]
        listing = {"id": repo_id, "sha": repo.commit, "siblings": siblings, "gated": bool(repo.gated_token)}
        return Answer(200, {}, json.dumps(listing).encode())

    def _answer_file(self, repo_id: str, revision: str, name: str, token: str) -> Answer:
        if missing := self._missing(repo_id, revision, token):
            return missing
        repo = self._repos[repo_id]
        if repo.gated_token not in (None, token):
            message = f"Access to model {repo_id} is restricted."
            return _refusal(403 if token else 401, "GatedRepo", message)
        commit = {"X-Repo-Commit": repo.commit}
        if name not in repo.files:
            return _refusal(404, "EntryNotFound", "Entry not found", commit)
        content = repo.files[name]
        if not name.endswith(LFS):
            return Answer(200, {**commit, "ETag": f'"{_git_hash(content)}"'}, content)
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        linked = {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content)), "ETag": etag}
        return Answer(302, {**commit, **linked, "Location": f"{self.cdn}/{repo_id}/{name}"})

    def _answer_cdn(self, path: str, token: str) -> Answer:
        match = _CDN.fullmatch(path)
        return Answer(200, {}, self._repos[match[1]].files[unquote(match[2])]) if match else Answer(404, {})


def environment(hub: StandInHub, home: Path, **more: str) -> dict[str, str]:
    """The environment of a process that knows this hub alone, and no token; all of its caches lie in ``home``."""
    ours = ("HF_", "HUGGING", "TRANSFORMERS_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HYPERSD_BENCH_CACHE": str(home / "hypersd-bench"),
        "NO_PROXY": "127.0.0.1",
    }
    return {**env, **settings, **more}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a client that hung up."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def _handler(hub: StandInHub, answer: Callable[[str, str], Answer]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        wbufsize = -1  # headers and body in one packet

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            hub.requests.append(Request(self.command, path, self.headers.get("Range", ""), bool(token)))
            fault = hub.fault(self.command, unquote(path))
            kind = fault.kind if fault else ""
            if kind == "drop":
                return
            given = Answer(fault.status, {}) if fault and kind == "fail" else answer(path, token)
            if given.status == 200:
                given = self._part(given._replace(body=_damaged(given.body, kind)))
            self.send_response(given.status)
            for name, value in {**given.headers, "Content-Length": str(len(given.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(given.body[: len(given.body) // 2] if kind == "truncate" else given.body)

        do_HEAD = do_GET

        def _part(self, given: Answer) -> Answer:
            """The range that was asked for, if one was."""
            match = _RANGE.fullmatch(self.headers.get("Range", ""))
            if not match:
                return given
            start, size = int(match[1]), len(given.body)
            headers = {**given.headers, "Content-Range": f"bytes {start}-{size - 1}/{size}"}
            return Answer(206, headers, given.body[start:])

    return Handler


def _damaged(body: bytes, kind: str) -> bytes:
    if kind == "shorten":
        return body[: len(body) // 2]
    if kind == "tamper":
        return body[:-1] + bytes([body[-1] ^ 1])
    return body


def _refusal(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> Answer:
    told = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
    return Answer(status, {**(headers or {}), **told}, json.dumps({"error": message}).encode())


def _row(name: str, content: bytes) -> dict[str, object]:
    """A file's row in a tree listing."""
    row: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": _git_hash(content)}
    if name.endswith(LFS):
        row["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return row


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
