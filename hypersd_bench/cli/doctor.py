"""``doctor``: what on this machine would spoil a result."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import click

from hypersd_bench.errors import CheckFailed, InputError
from hypersd_bench.health.compute import examine_compute, examine_load
from hypersd_bench.health.finding import Finding
from hypersd_bench.health.storage import examine_caches, examine_disk, start_hub_check
from hypersd_bench.health.versions import examine_requirements, examine_rules, own_requirements
from hypersd_bench.pocket import WEIGHTS
from hypersd_bench.sampling import read_safetensors_metadata

LIBRARIES = (
    "torch",
    "torchvision",
    "huggingface_hub",
    "diffusers",
    "transformers",
    "peft",
    "open_clip",
    "torchmetrics",
)
_MIB = 2**20


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Look for what on this machine would spoil a result; exit code 1 when something won't work."""
    findings = list(examine())
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            click.echo(_lines(finding, width))
    if bad := [finding.name for finding in findings if finding.state == "bad"]:
        raise CheckFailed(f"this machine is not ready: {', '.join(bad)}")


def examine() -> Iterator[Finding]:
    """Look at everything, in the order in which it should be mended."""
    hub = start_hub_check()  # it answers while the libraries load
    yield Finding("python", "ok", sys.version.split()[0])
    yield from examine_requirements(own_requirements())
    libraries = list(map(_library, LIBRARIES))
    yield from libraries
    yield from examine_rules()
    if all(finding.state == "ok" for finding in libraries):
        yield from examine_compute()
        yield from examine_caches()
    yield examine_load()
    yield examine_disk(Path.cwd())
    yield hub()
    yield _miniature(WEIGHTS)


def _lines(finding: Finding, width: int) -> str:
    line = f"{finding.state:4}  {finding.name:{width}}  {finding.detail}"
    return line if finding.state == "ok" else f"{line}\n{'':{width + 8}}remedy: {finding.remedy}"


def _library(name: str) -> Finding:
    """Import a library: torchvision or open_clip that do not fit the torch beside them fail only then."""
    try:
        import_module(name)
    except Exception as error:  # a broken binary can raise anything
        return Finding(name, "bad", f"does not load ({type(error).__name__}: {error})", "run `make setup` again")
    return Finding(name, "ok", version("open_clip_torch" if name == "open_clip" else name))


def _miniature(weights: Path) -> Finding:
    """Every file of the shipped miniature must be whole."""
    files = sorted(weights.rglob("*.safetensors"))
    if not files:
        return Finding("miniature", "bad", f"no weights in {weights}", "build them with: hypersd-bench pocket build")
    try:
        for file in files:
            read_safetensors_metadata(file)
    except InputError as error:
        remedy = "restore the file from the repository or the package, or: hypersd-bench pocket build"
        return Finding("miniature", "bad", str(error), remedy)
    size = sum(file.stat().st_size for file in files)
    return Finding("miniature", "ok", f"{len(files)} weight files, {size / _MIB:.0f} MiB, all whole")
