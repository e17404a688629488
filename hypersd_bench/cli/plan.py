"""Before a run: ``plan``, what it will take, and ``fetch``, all that it needs brought to this disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hypersd_bench import registry
from hypersd_bench.cli.run import read_spec, spec_options
from hypersd_bench.errors import InputError, unknown_name

if TYPE_CHECKING:
    from hypersd_bench.runner.forecast import Forecast
    from hypersd_bench.runner.needs import Fetched
    from hypersd_bench.runner.plan import Plan

GIB = 2**30
HEADINGS = ("configuration", "images", "to make", "batch", "s/image", "time", "GiB", "from")


@click.command()
@spec_options
@click.option("--probe/--no-probe", default=True, help="Make a few batches to measure what nothing else tells.")
@click.option(
    "--effect", multiple=True, metavar="[METRIC=]X", help="How many prompts show a difference of X, in a metric's unit?"
)
@click.option("--like", type=click.Path(path_type=Path), help="A scored run to learn from how much scores spread.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(
    spec: Path | None, probe: bool, effect: tuple[str, ...], like: Path | None, as_json: bool, **flags: Any
) -> None:
    """Say what running SPEC (a YAML file) or the flags will take, and what it can show; nothing is downloaded."""
    from hypersd_bench.runner.forecast import forecast
    from hypersd_bench.store import RunStore

    made, folder, device = read_spec(spec, flags)
    effects = _effects(effect, [info.id for info in made.metrics])
    pilot = RunStore.open(like) if like else RunStore.begun(folder)
    shown = registry.resolve("adviser", "power")(
        made.metrics, len(made.prompts.prompts), made.spec.replicates, num_comparisons(made), effects, pilot
    )
    found = forecast(made, folder, device, probe)
    if as_json:
        values = found.to_json() | {"power": [asdict(one) for one in shown]}
        click.echo(json.dumps(values, indent=2, sort_keys=True))
        return
    click.echo(render(found))
    click.echo(render_power(shown, len(made.prompts.prompts), made.spec.replicates))


def num_comparisons(made: Plan) -> int:
    """How many comparisons with the baseline ``compare`` will correct together."""
    baseline = {c.steps for c in made.configurations if c.label == made.baseline}
    return max(
        1, len(made.metrics) * sum(c.label != made.baseline and c.steps in baseline for c in made.configurations)
    )


def render_power(shown: Sequence[Any], num_prompts: int, seeds: int) -> str:
    """What a run can show, as plain text."""
    if not shown:
        return "no metrics: nothing to be shown"
    lines = [
        f"smallest difference that {num_prompts:,} prompts x {seeds} show, paired, 80 % power, level 5 % corrected for "
        f"{shown[0].comparisons} comparisons:"
    ]
    for one in shown:
        if one.detectable is None:
            lines.append(f"  {one.metric}: unknown; {one.source}")
            continue
        more = [f"{one.twice_the_prompts:.2g} with twice the prompts"]
        if one.twice_the_seeds is not None:
            more.append(f"{one.twice_the_seeds:.2g} with twice the seeds")
        lines.append(f"  {one.metric}: {one.detectable:.2g} {one.unit} ({', '.join(more)}; {one.source})")
        if one.prompts_needed is not None:
            lines.append(f"    a difference of {one.effect:g} needs {one.prompts_needed:,} prompts x {seeds}")
    return "\n".join(lines)


def _effects(given: Sequence[str], metrics: Sequence[str]) -> dict[str, float]:
    """``0.1`` for every metric, ``METRIC=0.1`` for one; InputError for what is neither."""
    found: dict[str, float] = {}
    for text in given:
        name, _, number = text.rpartition("=")
        if name and name not in metrics:
            raise unknown_name("metric", name, metrics, "this spec")
        try:
            effect = float(number)
        except ValueError:
            effect = 0.0
        if not 1e-9 < effect < float("inf"):
            raise InputError(f"--effect {text}: give a difference above 0, as 0.1 or clip-score/vit-b-32=0.1")
        found |= {name: effect} if name else dict.fromkeys(metrics, effect)
    return found


@click.command()
@spec_options
@click.option("--json", "as_json", is_flag=True, help="Print what is here as JSON.")
def fetch(spec: Path | None, as_json: bool, **flags: Any) -> None:
    """Bring all that SPEC (a YAML file) or the flags need to this disk and check it, for a run without network."""
    from hypersd_bench.runner.needs import fetched, unscorable
    from hypersd_bench.runner.weights import bring
    from hypersd_bench.store import RunStore

    made, folder, device = read_spec(spec, flags)
    begun = RunStore.begun(folder)
    local, _ = bring(made, begun.manifest.get("pins") if begun else None)
    here = fetched(local)
    lacking = unscorable(made, device)
    if as_json:
        rows = [{**asdict(one), "path": str(one.path)} for one in here]
        prompts = {"id": made.prompts.id, "count": len(made.prompts.prompts), "source": made.prompts.source}
        click.echo(json.dumps({"weights": rows, "prompts": prompts, "not_scored": lacking}, indent=2, sort_keys=True))
        return
    for one in here:
        click.echo(_fetched_line(one))
    click.echo(f"{made.prompts.id}: {len(made.prompts.prompts)} prompts, {made.prompts.source}")
    for metric, reason in lacking.items():
        click.echo(f"not to be scored: {metric}: {reason}", err=True)
    size = sum(one.size for one in here)
    click.echo(f"All here and whole: {_bytes(size)}. Without network: HF_HUB_OFFLINE=1 hypersd-bench run ...")


def render(found: Forecast) -> str:
    """A forecast as plain text."""
    import io

    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("configuration", "from") else "right")
    for row in found.configurations:
        table.add_row(
            row.name, f"{row.images:,}", f"{row.missing:,}", "?" if row.batch_size is None else str(row.batch_size),
            "?" if row.seconds_per_image is None else f"{row.seconds_per_image:.3g}", _duration(row.seconds),
            "?" if row.peak_memory is None else f"{row.peak_memory / GIB:.2f}", row.source,
        )  # fmt: skip
    out = io.StringIO()
    console = Console(file=out, width=120, color_system=None)
    tell = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    tell(_images_line(found))
    prompts = found.prompts
    cut = "" if prompts["count"] == prompts["of"] else f" of {prompts['of']:,} ({prompts['selection']})"
    tell(f"prompts: {prompts['id']}, {prompts['count']:,}{cut}; licence: {prompts['license'] or 'unstated'}")
    here = [need for need in found.needs if need.here]
    tell(f"weights: {len(here)} of {len(found.needs)} here, {_bytes(sum(need.size or 0 for need in here))}")
    for need in found.needs:
        if not need.here:
            tell(f"to be downloaded: {need.name}: {'size unknown' if need.lacking is None else _bytes(need.lacking)}")
    console.print(table)
    tell("GiB: the most memory " + ("of the process" if found.device == "cpu" else "of the device's tensors"))
    tell(_time_line(found))
    for why in dict.fromkeys(phase.note for phase in found.phases if phase.note):
        tell(f"      {', '.join(phase.name for phase in found.phases if phase.note == why)}: {why}")
    disk = found.disk
    tell(f"disk: {_bytes(disk.images)} of images ({_bytes(disk.image)} each, {disk.source}), {_bytes(disk.weights)} of "
         f"weights to come; {_bytes(disk.free_for_images)} free")  # fmt: skip
    for note in found.notes:
        tell(f"note: {note}")
    for warning in found.warnings:
        tell(f"WARNING: {warning}")
    return out.getvalue().rstrip()


def _images_line(found: Forecast) -> str:
    count = f"{found.images:,} images: {len(found.configurations)} configurations x {found.prompts['count']:,} prompts"
    here = found.images - found.missing
    return (
        f"{count} x {found.replicates}; {here:,} of them are in {found.run}"
        if here
        else f"{count} x {found.replicates}"
    )


def _time_line(found: Forecast) -> str:
    known = [f"{phase.name} {_duration(phase.seconds)}" for phase in found.phases if phase.seconds is not None]
    if found.seconds is None:
        return f"time: unknown on {found.device}"
    least = "at least " if len(known) < len(found.phases) else ""
    return f"time: {least}{_duration(found.seconds)} on {found.device}: {', '.join(known)}"


def _fetched_line(one: Fetched) -> str:
    commit = f" at commit {one.commit}" if one.commit else ""
    where = "" if one.name == str(one.path) else f", in {one.path}"
    files = "1 weight file" if len(one.files) == 1 else f"{len(one.files)} weight files"
    return f"{one.name}: {_bytes(one.size)}{commit}, {files} whole{where}"


def _bytes(count: float | None) -> str:
    if count is None:
        return "?"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:,.1f} h"
