"""A study served by the real command in a process of its own, for tests that need the real bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SERVE = "from user_study.cli import study; study()"


@contextmanager
def served(run: Path, *options: str) -> Iterator[str]:
    """Serve a run's study on a free port; yields its origin, ``http://127.0.0.1:<port>``."""
    command = [sys.executable, "-c", SERVE, "serve", str(run), "--port", "0", "--json", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield json.loads(server.stdout.readline())["url"].removesuffix("/study/")
        finally:
            server.kill()  # as hard as it gets: votes must have been stored by then
