"""Verbs on runs: ``run``, ``score``, ``export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


def split_names(value: str | None) -> list[str] | None:
    """``a,b`` to its parts."""
    return [part.strip() for part in value.split(",") if part.strip()] if value else None


@click.command()
@click.argument("spec", required=False, type=click.Path(path_type=Path))
@click.option("--models", help="Families, LoRA files or distill folders, with commas: teacher,hyper-sd,my.safetensors")
@click.option("--base", help="pocket, or a pipeline folder.")
@click.option("--steps", help="Step counts, with commas: 1,2,4,8")
@click.option("--prompts", help="A prompt set by name, or a .txt, .csv or .tsv file.")
@click.option("--num-prompts", type=int, help="Only the first N prompts.")
@click.option("--replicates", type=int, help="Images per prompt, each with noise of its own.")
@click.option("--seed", type=int, help="Seed of all noise.")
@click.option("--metrics", help="Metric ids, with commas; see: hypersd-bench list metrics")
@click.option("--baseline", help="The model that others are compared with.")
@click.option("--reference", type=click.Path(path_type=Path), help="Folder of images that set metrics compare with.")
@click.option("--batch-size", type=int, help="Images made at once; the pictures don't depend on it.")
@click.option("--no-timing", is_flag=True, help="Leave latency out.")
@click.option("--out", type=click.Path(path_type=Path), help="Run directory; the spec's 'out' or runs/<spec name>.")
@click.option("--device", help="cpu, cuda, cuda:1; the best there is by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def run(spec: Path | None, out: Path | None, device: str | None, no_timing: bool, as_json: bool, **flags: Any) -> None:
    """Generate, score and time what SPEC (a YAML file) or the flags name. Started again, it goes on."""
    from hypersd_bench.runner.benchmark import choose_device, run_benchmark
    from hypersd_bench.runner.plan import make_plan
    from hypersd_bench.runner.spec import load_spec

    for name in ("models", "steps", "metrics"):
        flags[name] = split_names(flags[name])
    resolved = load_spec(spec, flags)
    if no_timing:
        resolved = resolved.model_copy(update={"timing": None})
    plan = make_plan(resolved, spec.parent if spec and not flags["models"] else Path())
    folder = out or resolved.out or Path("runs") / (resolved.name or (spec.stem if spec else "run"))
    store, failed = run_benchmark(plan, folder, choose_device(device))
    for metric, reason in failed.items():
        click.echo(f"not scored: {metric}: {reason}", err=True)
    defects = sum(1 for row in store.images() if row.defect)
    if as_json:
        click.echo(json.dumps({"run": str(folder), "images": len(store.images()), "defective": defects,
                               "not_scored": failed}))  # fmt: skip
    else:
        click.echo(f"{len(store.images())} images in {folder} ({defects} defective)")
        click.echo(f"Next: hypersd-bench report {folder}")


@click.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--metrics", help="Metric ids, with commas; the run's own by default.")
@click.option("--reference", type=click.Path(path_type=Path), help="Folder of images that set metrics compare with.")
@click.option("--device", help="cpu, cuda; the best there is by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def score(folder: Path, metrics: str | None, reference: Path | None, device: str | None, as_json: bool) -> None:
    """Score what RUN has not scored yet, by its own metrics or by others."""
    from dataclasses import asdict

    from hypersd_bench.contracts import MetricContext
    from hypersd_bench.runner.benchmark import choose_device
    from hypersd_bench.runner.plan import metric_infos
    from hypersd_bench.runner.score import score_run
    from hypersd_bench.store import RunStore, write_json

    store = RunStore.open(folder)
    own = [entry["id"] for entry in store.manifest["metrics"]]
    ids = split_names(metrics) or own
    added = [asdict(info) for info in metric_infos(ids) if info.id not in own]
    failed = score_run(store, ids, MetricContext(choose_device(device), reference))
    if added:
        store.manifest["metrics"] += added
        write_json(folder / "run.json", store.manifest)
    for metric, reason in failed.items():
        click.echo(f"not scored: {metric}: {reason}", err=True)
    if as_json:
        click.echo(json.dumps({"run": str(folder), "metrics": ids, "not_scored": failed}))
    else:
        click.echo(f"{len(ids) - len(failed)} metrics scored in {folder}")


@click.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--format", "form", type=click.Choice(["csv", "parquet"]), default="csv", help="File format; csv by default."
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write to; RUN/export by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the files' paths as JSON.")
def export(folder: Path, form: str, out: Path | None, as_json: bool) -> None:
    """Write RUN's images with their scores, set scores and timings as tables."""
    import io

    from hypersd_bench.runner.export import tables
    from hypersd_bench.store import RunStore, write_bytes

    target = out or folder / "export"
    paths = []
    for name, frame in tables(RunStore.open(folder)).items():
        buffer = io.BytesIO()
        if form == "csv":
            frame.to_csv(buffer, index=False)
        else:
            frame.to_parquet(buffer, index=False)
        write_bytes(target / f"{name}.{form}", buffer.getvalue())
        paths.append(str(target / f"{name}.{form}"))
    click.echo(json.dumps(paths) if as_json else "\n".join(paths))
