"""``demo``: the whole story on the miniature, through the same verbs a user would type."""

from __future__ import annotations

import json
from pathlib import Path

import click

SHORT = "hyper-sd-short"  # what the live run is called everywhere, so that nobody takes it for the full one


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True, help="Folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the paths as JSON at the end.")
def demo(out: Path, as_json: bool) -> None:
    """Distil a short Hyper-SD live, benchmark it beside the shipped students, score, report. Resumable."""
    student = out.parent / f"{out.name}-{SHORT}"
    _say(f"1/3  Distilling a short Hyper-SD run of the miniature into {student} (a quarter of the shipped budget)")
    _verb("distill", ["hyper-sd", "--base", "pocket", "--preset", "pocket-demo", "--out", str(student)])
    _say("2/3  Benchmarking it beside the shipped full-budget students at 1, 2, 4 and 8 steps")
    _verb("run", [str(_spec(student)), "--out", str(out)])
    _say("3/3  Writing the report")
    _verb("report", [str(out)])
    page = out / "report" / "index.html"
    if as_json:
        click.echo(json.dumps({"run": str(out), "student": str(student), "report": str(page)}))
        return
    _say(
        f"Done. Open {page.resolve()}\n"
        f"'{SHORT}' is the run you just watched: far shorter than the shipped ones, and worse for it.\n"
        f"Next: hypersd-bench study new {out} --out study, then study serve study      (blind votes in the browser)"
    )


def _spec(student: Path) -> Path:
    """Write the demo's benchmark with the live student added, beside the student."""
    import yaml

    from hypersd_bench.store import write_bytes

    spec = yaml.safe_load((Path(__file__).parent / "demo.yaml").read_text())
    spec["models"].append({"name": SHORT, "path": str(student.resolve())})
    path = student / "benchmark.yaml"
    write_bytes(path, yaml.safe_dump(spec, sort_keys=False).encode())
    return path


def _verb(name: str, arguments: list[str]) -> None:
    from hypersd_bench import registry

    command = registry.resolve("verb", name)
    with command.make_context(f"hypersd-bench {name}", arguments) as context:
        command.invoke(context)


def _say(text: str) -> None:
    click.secho(f"\n{text}", bold=True, err=True)
