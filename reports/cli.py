"""The ``report`` command."""

from __future__ import annotations

import json
from pathlib import Path

import click

from hypersd_bench.errors import InputError

FORMATS = ("markdown", "latex", "csv")


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--study", type=click.Path(path_type=Path), help="A study with these images, analysed: people's votes.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the report.  [default: RUN/report]")
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
    out: Path | None,
    single_file: Path | None,
    diff: bool,
    fail_on: tuple[str, ...],
    only: str | None,
    form: str | None,
    results: Path | None,
    as_json: bool,
) -> None:
    """Write a page to decide from, with tables and figures, about RUN.

    The folder holds index.html, data.json, tables/ (CSV, Markdown, LaTeX), figs/ (SVG) and the pictures shown. It
    can be moved, and opened from disk without a network.

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
    if study is not None and (results or diff):
        raise InputError("--study goes into the page; leave out --results and --diff")
    if results is not None:
        _write_results(runs, results, as_json)
        return
    if diff:
        _diff(runs, fail_on, as_json)
        return
    if len(runs) > 1:
        raise InputError(
            f"a report is about one run, not {len(runs)}; --diff compares two, --results PAGE writes about several"
        )
    if only:
        _print_tables(runs[0], study, form or "markdown", as_json)
        return
    from reports.page import write_report, write_single_file

    if single_file is not None:
        page = write_single_file(runs[0], single_file, study)
        told = {"page": str(page), "bytes": page.stat().st_size}
        click.echo(json.dumps(told, indent=2) if as_json else page)
        return
    page = write_report(runs[0], out or runs[0] / "report", study)
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


def _print_tables(run: Path, study: Path | None, form: str, as_json: bool) -> None:
    from hypersd_bench.store import RunStore
    from reports import tables
    from reports.data import read_report
    from reports.study import read_study

    data = read_report(RunStore.open(run), read_study(study) if study else None)
    suffix = {"markdown": "md", "latex": "tex", "csv": "csv"}[form]
    written = {name: text for name, text in tables.files(data).items() if name.endswith(f".{suffix}")}
    if as_json:
        click.echo(json.dumps(written, indent=2, sort_keys=True))
    else:
        click.echo("\n".join(written.values()), nl=False)
