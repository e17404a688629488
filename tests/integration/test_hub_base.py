"""A base by its hub id, through huggingface_hub as users have it, from a small local server of its protocol."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.tiny_base import make_tiny_base

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).parents[2]


def hub(files: dict[str, bytes]) -> type[BaseHTTPRequestHandler]:
    """A handler that serves one model repository, acme/tiny, and knows no other."""

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def _answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/api/models/acme/tiny/tree/"):
                rows = [{"type": "file", "path": name, "size": len(files[name]), "oid": name} for name in files]
                return self._send(json.dumps(rows).encode(), "tree", body)
            if path.startswith("/api/models/acme/tiny"):
                listing = {"id": "acme/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                return self._send(json.dumps(listing).encode(), "listing", body)
            name = path.removeprefix(f"/acme/tiny/resolve/{COMMIT}/")
            if name in files:
                return self._send(files[name], hashlib.sha256(files[name]).hexdigest(), body)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if "tiny" not in path else "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, content: bytes, etag: str, body: bool) -> None:
            self.send_response(200)
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

    return Hub


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    base = make_tiny_base(tmp_path_factory.mktemp("hub") / "base")
    files = {str(path.relative_to(base)): path.read_bytes() for path in sorted(base.rglob("*")) if path.is_file()}
    files["unet/diffusion_pytorch_model.fp16.safetensors"] = b"not asked for"
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub(files))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run(code: str, endpoint: str, home: Path, **more: str) -> str:
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", **more}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_base_is_downloaded_once_and_then_found_offline(endpoint: str, tmp_path: Path) -> None:
    code = "from hypersd_bench.pipelines import base_folder, load_base; load_base('acme/tiny')\n"
    code += "folder = base_folder('acme/tiny'); print(sorted(p.name for p in (folder / 'unet').iterdir()))"
    listed = run(code, endpoint, tmp_path)
    assert listed.strip() == "['config.json', 'diffusion_pytorch_model.safetensors']"
    assert run(code, "http://127.0.0.1:1", tmp_path, HF_HUB_OFFLINE="1") == listed


@pytest.mark.parametrize("name", ["acme/nothing", "acme/tiny"])
def test_a_base_that_cannot_be_had_is_one_line(endpoint: str, tmp_path: Path, name: str) -> None:
    where = endpoint if name == "acme/nothing" else "http://127.0.0.1:1"  # nobody listens there
    code = (
        "from hypersd_bench.errors import InputError\nfrom hypersd_bench.pipelines import base_folder\n"
        f"try:\n    base_folder({name!r})\nexcept InputError as error:\n    print(error)\n"
    )
    said = run(code, where, tmp_path)
    assert said.startswith(f"base {name!r} can't be had from the hub: ")
    assert "HF_TOKEN" in said
    assert said.count("\n") == 1
