"""A study served by the real command in a process of its own, for tests that need the real bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SERVE = "from user_study.cli import study; study()"
PASSWORD = "correct horse"


@contextmanager
def served(study: Path, *options: str, port: int = 0) -> Iterator[str]:
    """Serve a study, on a free port unless named; yields its origin, ``http://127.0.0.1:<port>``."""
    command = [sys.executable, "-c", SERVE, "serve", str(study), "--port", str(port), "--json", *options]
    environment = {**os.environ, "HYPERSD_BENCH_ADMIN_PASSWORD": PASSWORD}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            yield json.loads(server.stdout.readline())["url"].removesuffix("/study/")
        finally:
            server.kill()  # as hard as it gets: votes must have been stored by then
