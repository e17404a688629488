"""The ``report`` command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hypersd_bench.errors import InputError
from metrics.cli import names, step_counts

if TYPE_CHECKING:
    from reports.data import ReportData

FORMATS = ("markdown", "latex", "csv")


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--study", type=click.Path(path_type=Path), help="A study with these images, analysed: people's votes.")
@click.option("--metrics", metavar="ID,ID", help="Only these metrics.")
@click.option("--steps", metavar="N,N", help="Only these step counts.")
@click.option("--within", metavar="DELTA", type=float,
              help="What is nearly the best, in the metric's unit.  [default: 1 % of the best]")  # fmt: skip
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the report.  [default: RUN/report; of several runs, report]",
)
@click.option("--single-file", metavar="FILE", type=click.Path(path_type=Path),
              help="Write one self-contained HTML file instead of a folder.")  # fmt: skip
@click.option("--diff", is_flag=True, help="Instead: what changed from the first RUN to the second.")
@click.option("--fail-on", metavar="METRIC:LIMIT", multiple=True,
              help="With --diff: exit code 1 where a change is beyond it: clip-score:-0.2, latency:+10%.")  # fmt: skip
@click.option("--only", type=click.Choice(["tables"]), help="Print only the tables.")
@click.option("--format", "form", type=click.Choice(FORMATS), help="Of --only tables.  [default: markdown]")
@click.option("--results", metavar="PAGE", type=click.Path(path_type=Path),
              help="Write only this Markdown page, about one RUN or several; remarks on it are kept.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def report(
    runs: tuple[Path, ...],
    study: Path | None,
    metrics: str | None,
    steps: str | None,
    within: float | None,
    out: Path | None,
    single_file: Path | None,
    diff: bool,
    fail_on: tuple[str, ...],
    only: str | None,
    form: str | None,
    results: Path | None,
    as_json: bool,
) -> None:
    """Write a page to decide from, with tables and figures, about each RUN: a run, or a folder that distill trains in.

    The folder holds index.html (English and Chinese), data.json, tables/ (CSV, Markdown, LaTeX), figs/ (SVG, PDF) and
    the pictures shown. It can be moved, and opened from disk without a network. Several runs stand side by side where
    they pair: the same prompts, noise and protocols.

    With --results it is one Markdown page instead, for a repository: verdicts, tables, the spec's contrasts, how each
    model was made, provenance. What stands between <!-- remarks --> and <!-- /remarks --> on it is yours and is kept.

    With --diff it says what changed between two runs of the same prompts and noise, and with --fail-on it is a gate.
    """
    _require_one_form({"--results": results, "--out": out, "--single-file": single_file, "--diff": diff or None,
                       "--only": only})  # fmt: skip
    if fail_on and not diff:
        raise InputError("--fail-on is of a comparison of two runs; give --diff too")
    if form and not only:
        raise InputError("--format goes with --only tables")
    for_page = {"--study": study, "--metrics": metrics, "--steps": steps, "--within": within}
    if (results or diff) and (given := [name for name, value in for_page.items() if value is not None]):
        raise InputError(f"{' and '.join(given)} go with the page; leave out --results and --diff")
    if results is not None:
        _write_results(runs, results, as_json)
        return
    if diff:
        _diff(runs, fail_on, as_json)
        return
    from reports.read import open_report

    folders, data = open_report(runs, study, names(metrics), step_counts(steps), within)
    if only:
        _print_tables(data, form or "markdown", as_json)
        return
    from reports.page import write_report, write_single_file

    if single_file is not None:
        page = write_single_file(data, folders, single_file)
        told = {"page": str(page), "bytes": page.stat().st_size}
        click.echo(json.dumps(told, indent=2) if as_json else page)
        return
    page = write_report(data, folders, out or (runs[0] / "report" if len(runs) == 1 else Path("report")))
    if as_json:
        click.echo((page.with_name("data.json")).read_text(), nl=False)
    else:
        click.echo(page)


def _require_one_form(given: dict[str, object]) -> None:
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise InputError(f"{' and '.join(chosen)} ask for different things; give one of them")


def _write_results(runs: tuple[Path, ...], page: Path, as_json: bool) -> None:
    from reports.results import write_results

    sections = write_results(runs, page)
    if as_json:
        found = {"page": str(page), "runs": [section.to_json() for section in sections]}
        click.echo(json.dumps(found, indent=2, sort_keys=True, allow_nan=False))
    else:
        click.echo(page)


def _diff(runs: tuple[Path, ...], fail_on: tuple[str, ...], as_json: bool) -> None:
    from hypersd_bench.store import RunStore
    from reports.diff import diff_runs, gate_lines, parse_gate, require_known, to_markdown

    if len(runs) != 2:
        raise InputError(f"--diff compares two runs, the older first, not {len(runs)}")
    gates = [parse_gate(text) for text in fail_on]
    found = diff_runs(RunStore.open(runs[0]), RunStore.open(runs[1]))
    require_known(gates, found)
    if as_json:
        click.echo(json.dumps(found.to_json(gates), indent=2, sort_keys=True, allow_nan=False))
    else:
        click.echo(to_markdown(found))
        if gates:
            click.echo("\n" + "\n".join(gate_lines(found, gates)))
    if found.broken(gates):
        raise SystemExit(1)


def _print_tables(data: ReportData, form: str, as_json: bool) -> None:
    from reports import tables

    suffix = {"markdown": "md", "latex": "tex", "csv": "csv"}[form]
    written = {name: text for name, text in tables.files(data).items() if name.endswith(f".{suffix}")}
    if as_json:
        click.echo(json.dumps(written, indent=2, sort_keys=True))
    else:
        click.echo("\n".join(written.values()), nl=False)
