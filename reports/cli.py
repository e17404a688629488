"""The ``report`` command."""

from __future__ import annotations

import json
from pathlib import Path

import click

from hypersd_bench.errors import InputError


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the report.  [default: RUN/report]")
@click.option("--results", metavar="PAGE", type=click.Path(path_type=Path),
              help="Write only this Markdown page, about one RUN or several; remarks on it are kept.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def report(runs: tuple[Path, ...], out: Path | None, results: Path | None, as_json: bool) -> None:
    """Write a page to decide from, with tables and figures, about RUN.

    The folder holds index.html, data.json, tables/ (CSV, Markdown, LaTeX), figs/ (SVG) and the pictures shown. It can
    be moved, and opened from disk without a network.

    With --results it is one Markdown page instead, for a repository: verdicts, tables, the spec's contrasts, how each
    model was made, provenance. What stands between <!-- remarks --> and <!-- /remarks --> on it is yours and is kept.
    """
    if results is not None:
        if out is not None:
            raise InputError("--results writes a page and --out a folder; give one of them")
        _write_results(runs, results, as_json)
        return
    if len(runs) > 1:
        raise InputError(f"a report is about one run, not {len(runs)}; --results PAGE writes a page about several")
    from reports.page import write_report

    page = write_report(runs[0], out or runs[0] / "report")
    if as_json:
        click.echo((page.with_name("data.json")).read_text(), nl=False)
    else:
        click.echo(page)


def _write_results(runs: tuple[Path, ...], page: Path, as_json: bool) -> None:
    from reports.results import write_results

    sections = write_results(runs, page)
    if as_json:
        found = {"page": str(page), "runs": [section.to_json() for section in sections]}
        click.echo(json.dumps(found, indent=2, sort_keys=True, allow_nan=False))
    else:
        click.echo(page)
