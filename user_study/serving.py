"""Serving a study from the command line: the port, what is said about it, and stopping."""

from __future__ import annotations

import json
import os
import secrets
import socket

import click

from hypersd_bench.errors import InputError
from user_study.study import Study, serve_study

PASSWORD = "HYPERSD_BENCH_ADMIN_PASSWORD"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve_until_stopped(study: Study, host: str, port: int, db: str | None, invited_only: bool, as_json: bool) -> None:
    """Serve until Ctrl-C; raises InputError before anything is served when port, images or database don't do."""
    with _listen(host, port) as listener:
        served = serve_study(study, db, invited_only)
        try:
            password = os.environ.get(PASSWORD) or secrets.token_urlsafe(9)
            import uvicorn

            from user_study.app import create_app

            config = uvicorn.Config(create_app(served, password), log_level="warning", server_header=False)
            origin = f"http://{_url_host(host)}:{listener.getsockname()[1]}"
            _announce(study, origin, host, password, invited_only, as_json)
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            click.echo(f"\nstopped; the votes: hypersd-bench study analyse {study.folder}", err=True)
        finally:
            served.votes.close()


def _announce(study: Study, origin: str, host: str, password: str, invited_only: bool, as_json: bool) -> None:
    rating, admin = f"{origin}/study/", f"{origin}/admin/"
    own = None if PASSWORD in os.environ else password  # a chosen password is not repeated
    if as_json:
        click.echo(json.dumps({"url": rating, "admin": admin, "password": own, "study": study.id}))
    else:
        click.echo(f"{len(study.design.pairs)} pairs to vote on at {rating}  (Ctrl-C stops; votes are kept)")
        click.echo(f"admin page {admin}  user admin, password {own or f'as in {PASSWORD}'}")
    if invited_only:
        click.echo(f"only invited raters get in: hypersd-bench study links {study.folder} --help", err=True)
    if host not in LOOPBACK:
        click.echo(
            f"{host} is reachable from other machines, over plain http: "
            + ("whoever has an invited rater's link" if invited_only else "anybody who has the address")
            + " can vote, and passwords and links can be read on the way; put a proxy with https before it",
            err=True,
        )


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before anything slow happens; raises InputError when it is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)  # whoever has the address may come at once, and waits until the page is ready
    except OSError as error:
        listener.close()
        other = port + 1 if port < 65535 else 7860
        raise InputError(f"can't listen on {host}:{port} ({error.strerror}); try --port {other}") from error
    return listener


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
