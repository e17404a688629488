"""``doctor``: what on this machine would spoil a result."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import click

from hypersd_bench.errors import CheckFailed, InputError
from hypersd_bench.pocket import WEIGHTS
from hypersd_bench.sampling import read_safetensors_metadata

LIBRARIES = ("torch", "torchvision", "diffusers", "transformers", "peft", "open_clip", "torchmetrics")
_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. state: ``ok``; ``note``, worth knowing before numbers are published; ``bad``, won't work."""

    name: str
    state: Literal["ok", "note", "bad"]
    detail: str


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
            click.echo(f"{finding.state:4}  {finding.name:{width}}  {finding.detail}")
    if bad := [finding.name for finding in findings if finding.state == "bad"]:
        raise CheckFailed(f"this machine is not ready: {', '.join(bad)}")


def examine() -> Iterator[Finding]:
    """Look at everything, in the order in which it should be mended."""
    yield Finding("python", "ok", sys.version.split()[0])
    libraries = list(map(_library, LIBRARIES))
    yield from libraries
    if all(finding.state == "ok" for finding in libraries):
        yield from _compute()
    yield _load()
    yield _disk(Path.cwd())
    yield _miniature(WEIGHTS)


def _library(name: str) -> Finding:
    """Import a library: torchvision or open_clip that do not fit the torch beside them fail only then."""
    try:
        import_module(name)
    except Exception as error:  # a broken binary can raise anything
        return Finding(name, "bad", f"does not load ({type(error).__name__}: {error}); run `make setup` again")
    return Finding(name, "ok", version("open_clip_torch" if name == "open_clip" else name))


def _compute() -> Iterator[Finding]:
    import torch

    from hypersd_bench.pocket.training import fast_bf16

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        yield Finding("device", "ok", f"cuda: {torch.cuda.get_device_name(0)}, {memory / _GIB:.0f} GiB")
    else:
        yield Finding("device", "note", "cpu: enough for the miniature, not for models of SDXL's size")
    threads, cores = torch.get_num_threads(), _num_cores()
    state: Literal["ok", "note"] = "ok" if threads == cores else "note"
    yield Finding("threads", state, f"torch uses {threads} on {cores} cores (OMP_NUM_THREADS sets them)")
    fast = fast_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    yield Finding("bf16", "ok" if fast else "note", "fast" if fast else "slow here: training uses float32")


def _load() -> Finding:
    """Other work on the machine makes every latency wrong."""
    load, cores = os.getloadavg()[0], _num_cores()
    if load > 0.5 * cores:
        return Finding("load", "note", f"{load:.1f} on {cores} cores: latencies would be wrong")
    return Finding("load", "ok", f"{load:.1f} on {cores} cores")


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    state: Literal["ok", "note", "bad"] = "ok" if free > 5 * _GIB else "note" if free > _GIB / 4 else "bad"
    return Finding("disk", state, f"{free / _GIB:.1f} GiB free in {folder}")


def _miniature(weights: Path) -> Finding:
    """Every file of the shipped miniature must be whole."""
    files = sorted(weights.rglob("*.safetensors"))
    if not files:
        return Finding("miniature", "bad", f"no weights in {weights}; build them with: hypersd-bench pocket build")
    try:
        for file in files:
            read_safetensors_metadata(file)
    except InputError as error:
        return Finding("miniature", "bad", str(error))
    size = sum(file.stat().st_size for file in files)
    return Finding("miniature", "ok", f"{len(files)} weight files, {size / _MIB:.0f} MiB, all whole")
