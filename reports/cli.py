"""The ``report`` command."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the report.  [default: RUN/report]")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def report(run: Path, out: Path | None, as_json: bool) -> None:
    """Write a page to decide from, with tables and figures, about RUN.

    The folder holds index.html, data.json, tables/ (CSV, Markdown, LaTeX), figs/ (SVG) and the pictures shown. It can
    be moved, and opened from disk without a network.
    """
    from reports.page import write_report

    page = write_report(run, out or run / "report")
    if as_json:
        click.echo((page.with_name("data.json")).read_text(), nl=False)
    else:
        click.echo(page)
