"""Verbs on runs: ``run``, ``score``, ``export``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hypersd_bench import registry
from hypersd_bench.cli.quiet import debugging
from hypersd_bench.errors import InputError

if TYPE_CHECKING:
    from hypersd_bench.runner.plan import Plan


def split_names(value: str | None) -> list[str] | None:
    """``a,b`` to its parts."""
    return [part.strip() for part in value.split(",") if part.strip()] if value else None


_SPEC_OPTIONS = (
    click.argument("spec", required=False, type=click.Path(path_type=Path)),
    click.option("--models", help="Families, models or paths, with commas: teacher,my.safetensors"),
    click.option("--model", multiple=True, help="One more model, as in --models."),
    click.option("--contract", help="How weights that carry no contract are sampled: MODEL, FILE or lcm:steps=1-8."),
    click.option("--base", help="pocket, sd15, sd21, sdxl, a pipeline folder, or a hub id."),
    click.option("--pipeline", help="A folder or hub id in place of the base's own pipeline."),
    click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Precision of the UNet."),
    click.option("--steps", help="Step counts, with commas: 1,2,4,8"),
    click.option("--prompts", help="A prompt set by name, or a .txt, .csv, .tsv, .jsonl or .parquet file."),
    click.option("--prompts-file", type=click.Path(path_type=Path), help="The prompt set's own file, here already."),
    click.option("--num-prompts", type=int, help="Only N prompts."),
    click.option("--selection", type=click.Choice(["first", "random"]), help="Which N: the first, or drawn by seed."),
    click.option("--replicates", type=int, help="Images per prompt, each with noise of its own."),
    click.option("--seed", type=int, help="Seed of all noise."),
    click.option("--metrics", help="Metric ids, with commas; see: hypersd-bench list metrics"),
    click.option("--baseline", help="The model that others are compared with."),
    click.option(
        "--reference", type=click.Path(path_type=Path), help="Folder of images that set metrics compare with."
    ),
    click.option("--batch-size", type=int, help="Images made at once; by default what the free memory holds."),
    click.option("--force", is_flag=True, default=None, help="Run what breaks a model's contract, and record it."),
    click.option("--no-timing", is_flag=True, help="Leave latency, memory and throughput out."),
    click.option("--out", type=click.Path(path_type=Path), help="Run directory; the spec's 'out' or runs/<spec name>."),
    click.option("--device", help="cpu, cuda, cuda:1; the best there is by default."),
)


def spec_options(command: Callable[..., None]) -> Callable[..., None]:
    """The argument SPEC and the flags that say the same; the command is given what ``read_spec`` takes."""
    for option in reversed(_SPEC_OPTIONS):
        command = option(command)
    return command


def read_spec(spec: Path | None, flags: dict[str, Any], device: str | None = None) -> tuple[Plan, Path, str]:
    """A spec and the flags laid over it: the plan, the run directory, and the device (None: the flags' or the best)."""
    from hypersd_bench.runner.benchmark import choose_device
    from hypersd_bench.runner.plan import make_plan
    from hypersd_bench.runner.spec import add_models, load_spec

    out, asked, no_timing = flags.pop("out"), flags.pop("device"), flags.pop("no_timing")
    more, contract = flags.pop("model"), flags.pop("contract")
    for name in ("models", "steps", "metrics"):
        flags[name] = split_names(flags[name])
    resolved = load_spec(spec, add_models(spec, flags, more, contract))
    if no_timing:
        resolved = resolved.model_copy(update={"timing": None})
    chosen = device or choose_device(asked)
    plan = make_plan(resolved, spec.parent if spec else Path(), chosen)
    return plan, out or resolved.out or Path("runs") / (resolved.name or (spec.stem if spec else "run")), chosen


@click.command()
@spec_options
@click.option("--time-again", is_flag=True, help="Measure latency, memory and throughput anew, for what has them.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Make images in this process, or on the workers of a Ray cluster.",
)
@click.option("--address", help="The Ray cluster: auto, or HOST:PORT; by default one is started on this machine.")
@click.option("--workers", type=click.IntRange(1), help="Ray workers; by default one for each GPU.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def run(
    spec: Path | None, time_again: bool, engine: str, address: str | None, workers: int | None, as_json: bool,
    **flags: Any,
) -> None:  # fmt: skip
    """Generate, score and time what SPEC (a YAML file) or the flags name. Started again, it goes on."""
    from hypersd_bench.runner.benchmark import choose_device, run_benchmark
    from hypersd_bench.runner.doubtful import doubtful_images

    if time_again and flags["no_timing"]:
        raise InputError("--time-again measures what --no-timing leaves out; leave one of them out")
    if engine == "ray":
        from hypersd_bench.runner.ray_engine import RayEngine

        with RayEngine(address, workers, flags["device"], verbose=debugging()) as cluster:
            plan, folder, device = read_spec(spec, flags, cluster.device)
            store, failed = run_benchmark(plan, folder, choose_device(None), cluster, time_again)
    elif address or workers:
        raise InputError("--address and --workers are of --engine ray; add it, or leave them out")
    else:
        plan, folder, device = read_spec(spec, flags)
        store, failed = run_benchmark(plan, folder, device, time_again=time_again)
    for metric, reason in failed.items():
        click.echo(f"not scored: {metric}: {reason}", err=True)
    rows = doubtful_images(store.images())
    if as_json:
        summary: dict[str, Any] = {"run": str(folder), "images": len(store.images()), "not_scored": failed}
        summary["defective"] = sum(row.defective for row in rows)
        summary["doubtful"] = [asdict(row) for row in rows]
        summary["truncated_prompts"] = store.manifest["prompts"]["truncated"]["count"]
        click.echo(json.dumps(summary))
        raise click.exceptions.Exit(2 if failed else 0)
    for row in rows:
        if row.problems:
            click.echo(f"{row.model}@{row.steps}: {row.problems} of {row.images} images", err=True)
    _tell_truncated(store.manifest["prompts"]["truncated"])
    count = sum(row.images for row in rows)
    more = f", {plan.num_images} of them asked for now" if count > plan.num_images else ""
    click.echo(f"{count} images in {folder} ({sum(row.defective for row in rows)} defective{more})")
    click.echo(f"Next: hypersd-bench report {shlex.quote(str(folder))}")
    if failed:
        raise click.exceptions.Exit(2)


def _tell_truncated(cut: dict[str, Any]) -> None:
    if cut["count"]:
        click.echo(f"{cut['count']} prompts are longer than the {cut['limit']} tokens that the text encoder reads; "
                   "their ends are not drawn (run.json names them)", err=True)  # fmt: skip


@click.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--metrics", help="Metric ids, with commas; the run's own by default.")
@click.option("--reference", type=click.Path(path_type=Path), help="Folder of images that set metrics compare with.")
@click.option("--device", help="cpu, cuda; the best there is by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def score(folder: Path, metrics: str | None, reference: Path | None, device: str | None, as_json: bool) -> None:
    """Score what RUN has not scored yet, by its own metrics or by others."""
    from hypersd_bench.reference import open_reference
    from hypersd_bench.runner.benchmark import choose_device
    from hypersd_bench.runner.plan import draw_scenes, metric_infos
    from hypersd_bench.runner.score import score_run
    from hypersd_bench.store import RunStore, write_json

    store = RunStore.open(folder)
    own = [entry["id"] for entry in store.manifest["metrics"]]
    gone = [] if metrics else [name for name in own if name not in registry.rows("metric")]
    ids = list(dict.fromkeys(split_names(metrics) or [name for name in own if name not in gone]))
    added = [asdict(info) for info in metric_infos(ids) if info.id not in own]
    spec = store.manifest["spec"]
    if reference:
        open_reference(reference, scenes=False)
        spec["reference"] = str(reference.resolve())  # the run's from now on: its set scores are all of one reference
    own_reference = Path(spec["reference"]) if spec.get("reference") else None
    scenes = draw_scenes(model.get("pipeline", "") for model in store.manifest["models"])
    chosen, compared_with = choose_device(device), open_reference(own_reference, scenes)
    if added or reference:
        store.manifest["metrics"] += added
        write_json(folder / "run.json", store.manifest)
    failed = score_run(store, ids, chosen, compared_with)
    for name in gone:
        click.echo(f"left as it is: {name}: no such metric is installed (see: hypersd-bench list metrics)", err=True)
    for metric, reason in failed.items():
        click.echo(f"not scored: {metric}: {reason}", err=True)
    if as_json:
        click.echo(json.dumps({"run": str(folder), "metrics": ids, "not_scored": failed}))
    else:
        click.echo(f"{len(ids) - len(failed)} metrics scored in {folder}")
    if failed:
        raise click.exceptions.Exit(2)


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
