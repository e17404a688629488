"""``hypersd-bench study``: serve a run's study, export its votes."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import click

from hypersd_bench.errors import InputError


@click.group()
def study() -> None:
    """Blind pairwise votes from people."""


@study.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--port", default=7860, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--pairs", type=int, help="How many pairs, when the study is new.  [default: 60]")
@click.option("--json", "as_json", is_flag=True, help="Print where it listens as JSON.")
def serve(run: Path, port: int, host: str, pairs: int | None, as_json: bool) -> None:
    """Serve the study of RUN: two pictures, A, B or tie. Stop it with Ctrl-C and start it again at any time."""
    from user_study.study import open_study

    with _listen(host, port) as listener:
        opened = open_study(run, pairs)
        import uvicorn

        from user_study.app import create_app

        config = uvicorn.Config(create_app(opened), log_level="warning", server_header=False)
        address = f"http://{_url_host(host)}:{listener.getsockname()[1]}/study/"
        if as_json:
            click.echo(json.dumps({"url": address, "study": opened.id, "pairs": len(opened.design.pairs)}))
        else:
            click.echo(f"{len(opened.design.pairs)} pairs to vote on at {address}  (Ctrl-C stops; votes are kept)")
        if host not in ("127.0.0.1", "::1", "localhost"):
            click.echo(f"{host} is reachable from other machines: anybody who has the address can vote", err=True)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            click.echo(f"\nstopped; the votes: hypersd-bench study export {run}", err=True)
        finally:
            opened.votes.close()


@study.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The CSV file to write.  [default: RUN/study/votes.csv]")
@click.option("--json", "as_json", is_flag=True, help="Print the votes as JSON instead of writing CSV.")
def export(run: Path, out: Path | None, as_json: bool) -> None:
    """Write the votes of RUN's study as CSV, one row per vote, raters under random names."""
    from user_study.export import export_rows, summary_lines, write_csv
    from user_study.study import open_votes

    votes = open_votes(run)
    rows = export_rows(votes)
    votes.close()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    if out is not None and out.exists():
        raise InputError(f"{out} exists; name another file with --out")
    target = out or run / "study" / "votes.csv"
    write_csv(target, rows)
    for line in summary_lines(rows):
        click.echo(line, err=True)
    click.echo(f"{len(rows)} votes in {target}")


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before anything slow happens; raises InputError when it is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # whoever has the address may come at once, and waits until the page is ready
    except OSError as error:
        listener.close()
        other = port + 1 if port < 65535 else 7860
        raise InputError(f"can't listen on {host}:{port} ({error.strerror}); try --port {other}") from error
    return listener


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
