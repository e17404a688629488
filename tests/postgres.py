"""A PostgreSQL server of the tests' own, in a temporary folder, reached by a Unix socket."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from urllib.parse import quote

_schemas = count()


def server_programs() -> Path | None:
    """Where initdb and pg_ctl lie; None where PostgreSQL is not installed."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in reversed(folders) if (folder / "pg_ctl").exists()), None)


@contextmanager
def postgres_server() -> Iterator[str]:
    """Start a server; yields the URL of its database. It refuses to run as root, so it runs as "postgres" there."""
    programs = server_programs()
    assert programs is not None
    root = Path(tempfile.mkdtemp(prefix="pg"))  # short: a socket's path has a limit
    owner = "postgres" if os.getuid() == 0 else None
    if owner:
        os.chown(root, pwd.getpwnam(owner).pw_uid, -1)

    def call(*command: str | Path) -> None:
        done = subprocess.run(command, user=owner, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    data = root / "data"
    try:
        call(programs / "initdb", "--auth=trust", "--username=study", "--no-sync", "-D", data)
        options = f"-c listen_addresses='' -c unix_socket_directories='{root}' -c max_connections=60"
        call(programs / "pg_ctl", "-w", "-D", data, "-l", root / "log", "-o", options, "start")
        try:
            yield f"postgresql+psycopg://study@/postgres?host={quote(str(root), safe='')}"
        finally:
            call(programs / "pg_ctl", "-w", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(root, ignore_errors=True)


def fresh_schema(url: str) -> str:
    """The URL of an empty schema of its own in the server's database."""
    import psycopg

    name = f"study_{next(_schemas)}"
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as db:
        db.execute(f"CREATE SCHEMA {name}")
    return f"{url}&options={quote(f'-csearch_path={name}')}"
