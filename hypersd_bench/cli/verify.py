"""``verify``: whether a run, made here or elsewhere, holds what it says."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from hypersd_bench.runner.verify import Verification

SHOWN = 20  # findings; --json has all


@click.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--prompts", type=click.IntRange(1), help="Score only N prompts again; every file is hashed.")
@click.option("--reference", type=click.Path(path_type=Path), help="The reference's images, to check it too.")
@click.option("--device", help="cpu, cuda; the best there is by default.")
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def verify(folder: Path, prompts: int | None, reference: Path | None, device: str | None, as_json: bool) -> None:
    """Hash RUN's images again, derive their seeds, score them again, and say what differs; exit code 1 if anything."""
    from hypersd_bench.reference import open_reference
    from hypersd_bench.runner.benchmark import choose_device
    from hypersd_bench.runner.verify import verify_run
    from hypersd_bench.store import RunStore

    store = RunStore.open(folder)
    given = open_reference(reference, scenes=False) if reference else None
    found = verify_run(store, choose_device(device), prompts, given)
    if as_json:
        click.echo(json.dumps({"run": str(folder), "holds": found.holds, **asdict(found)}, indent=2))
    else:
        _tell(folder, found)
    if not found.holds:
        raise click.exceptions.Exit(1)


def _tell(folder: Path, found: Verification) -> None:
    click.echo(f"{found.images} images hashed, {found.prompts} prompts scored again")
    for metric, count in sorted(found.values.items()):
        click.echo(f"  {metric}: {count} values compared")
    for name, reason in found.unchecked.items():
        click.echo(f"not checked: {name}: {reason}")
    for one in found.findings[:SHOWN]:
        others = f" (the worst of {one.count})" if one.count > 1 else ""
        click.echo(f"DIFFERS: {one.kind}: {one.name}: recorded {one.recorded}, here {one.found}{others}")
    if len(found.findings) > SHOWN:
        click.echo(f"... and {len(found.findings) - SHOWN} more; --json lists all")
    if found.findings and found.packages:
        listed = ", ".join(f"{name} {change}" for name, change in found.packages.items())
        click.echo(f"other packages here than where it was made: {listed}")
    checked = "" if not found.unchecked else ", as far as it was checked"
    checked = checked if found.values else "; no score could be checked"
    click.echo(f"{folder} holds what it says{checked}" if found.holds else f"{folder} does not hold what it says")
