"""The verb ``reproduce``: published numbers beside ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hypersd_bench.errors import InputError

if TYPE_CHECKING:
    from metrics.reproduce.preset import Preset, Study
    from metrics.reproduce.table import Cell, Outcome

ONLY_SHOWN = "not run: --only-show"


@click.command()
@click.argument("preset", required=False)
@click.option("--list", "list_all", is_flag=True, help="Show what there is.")
@click.option("--out", type=click.Path(path_type=Path), help="Run directory.  [default: runs/reproduce-PRESET]")
@click.option("--models", help="Only these of the preset's models, with commas.")
@click.option("--num-prompts", type=click.IntRange(1), help="Only N prompts; windows grow, and FID is not comparable.")
@click.option("--prompts", type=click.Path(path_type=Path), help="A file with the source's own prompts.")
@click.option("--prompts-file", type=click.Path(path_type=Path), help="The prompt set's own file, here already.")
@click.option(
    "--reference", type=click.Path(path_type=Path), help="Images, or statistics in a .npz, that FID compares with."
)
@click.option("--votes", type=click.Path(path_type=Path), help="Of a user study: a CSV as 'study export' writes it.")
@click.option("--pipeline", help="A folder or hub id in place of the base's own pipeline.")
@click.option("--device", help="cpu, cuda, cuda:1; the best there is by default.")
@click.option("--only-show", is_flag=True, help="Download and run nothing: show what is published, and the run so far.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def reproduce(preset: str | None, list_all: bool, as_json: bool, **options: Any) -> None:
    """Run what PRESET, a published table, was measured by, and say of each number whether ours agrees.

    What can be had of its models is run into a folder that goes on when started again. Each number gets a window and a
    verdict: inside, outside (with likely causes), not comparable, or not measured (with the reason).
    """
    from metrics.reproduce.preset import Preset, load_preset, preset_ids
    from metrics.reproduce.show import listing, open_console, print_list

    if list_all:
        if as_json:
            click.echo(json.dumps(listing(), indent=2))
        else:
            print_list(open_console())
        return
    if preset is None:
        raise InputError(f"name a preset: {', '.join(preset_ids())}; --list says what they are")
    found = load_preset(preset)
    _refuse_foreign(found.id, isinstance(found, Preset), options)
    if isinstance(found, Preset):
        _reproduce_table(found, as_json, options)
    else:
        _reproduce_study(found, as_json, options["votes"])


def _refuse_foreign(name: str, is_table: bool, options: dict[str, Any]) -> None:
    """Raise InputError for options that say nothing of this kind of preset."""
    if is_table and options["votes"]:
        raise InputError(f"--votes is of a user study, and {name} is a table of scores; leave it out")
    others = ("out", "models", "num_prompts", "prompts", "prompts_file", "reference", "pipeline", "device")
    given = [f"--{other.replace('_', '-')}" for other in others if options[other]]
    if not is_table and given:
        raise InputError(f"{' and '.join(given)} is of a table of scores, and {name} is a user study; leave it out")


def _reproduce_table(preset: Preset, as_json: bool, options: dict[str, Any]) -> None:
    from hypersd_bench.cli.run import split_names
    from metrics.reproduce.running import chosen_models, run_folder
    from metrics.reproduce.show import as_json as to_json
    from metrics.reproduce.show import open_console, print_table
    from metrics.reproduce.table import compare

    models, folder = chosen_models(preset, split_names(options["models"])), run_folder(preset, options["out"])
    outcome = _so_far(folder) if options["only_show"] else _run(preset, models, folder, options)
    cells = compare(preset, outcome, models)
    if as_json:
        click.echo(json.dumps(to_json(preset, cells, outcome, str(folder)), indent=2, allow_nan=False))
    else:
        print_table(open_console(), preset, cells, outcome)
    if not options["only_show"] and all(cell.ours is None for cell in cells):
        raise InputError(_why_nothing(cells, outcome))


def _run(preset: Preset, models: list[str], folder: Path, options: dict[str, Any]) -> Outcome:
    from hypersd_bench.runner.benchmark import choose_device
    from metrics.reproduce.running import run_preset, run_spec

    names = ("num_prompts", "reference", "prompts", "prompts_file", "pipeline")
    spec = run_spec(preset, models, **{name: options[name] for name in names})
    device = choose_device(options["device"])
    each = spec.num_prompts or preset.protocol.count
    images = sum(len(ref.steps or spec.steps) for ref in spec.models) * (each or 0) * spec.replicates
    click.echo(f"{preset.id}: up to {images:,} images on {device} into {folder}; --num-prompts N makes fewer, "
               "--only-show none", err=True)  # fmt: skip
    return run_preset(preset, spec, folder, device)


def _so_far(folder: Path) -> Outcome:
    """What a folder holds of a run already; nothing is downloaded or run."""
    from hypersd_bench.store import RunStore
    from metrics.reproduce.table import Outcome

    return Outcome(RunStore.begun(folder), blocked=ONLY_SHOWN)


def _why_nothing(cells: list[Cell], outcome: Outcome) -> str:
    reasons = [cell.reason for cell in cells if cell.verdict == "not measured"]
    why = outcome.blocked or next(iter([*outcome.absent.values(), *outcome.not_scored.values(), *reasons]), "")
    return f"nothing could be measured: {why}"


def _reproduce_study(study: Study, as_json: bool, votes: Path | None) -> None:
    from metrics.reproduce.show import open_console, print_study, study_as_json
    from metrics.reproduce.votes import compare_votes, read_votes, unmatched

    given = read_votes(votes) if votes else None
    cells, others = compare_votes(study, given), unmatched(study, given) if given else 0
    if as_json:
        click.echo(json.dumps(study_as_json(study, cells, others), indent=2, allow_nan=False))
    else:
        print_study(open_console(), study, cells, others)
