"""The verb ``distill``: parse, train, say what came out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from hypersd_bench import registry
from hypersd_bench.errors import InputError, unknown_name


@click.command()
@click.argument("method")
@click.option("--base", default="pocket", show_default=True, help="Teacher: pocket, or a diffusers pipeline folder.")
@click.option("--preset", default="pocket", show_default=True, help="Size of the run: pocket, pocket-demo, tiny.")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder; default runs/distill/METHOD.")
@click.option("--images", type=click.IntRange(min=1), help="Training images to see, instead of the preset's.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of everything random.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="auto: CUDA if there.")
@click.option("--resume/--fresh", default=True, show_default=True, help="Go on in --out, or start over.")
@click.option("--json", "as_json", is_flag=True, help="Print the run's manifest as JSON.")
def distill(
    method: str,
    base: str,
    preset: str,
    out: Path | None,
    images: int | None,
    seed: int,
    device: str,
    resume: bool,
    as_json: bool,
) -> None:
    """Train METHOD's few-step LoRAs from a base: hyper-sd, lcm, tcd or lightning.

    Stopped at any moment, the same command goes on from the last checkpoint. Every LoRA carries its sampler contract.
    """
    if method not in (known := registry.rows("method")):
        raise unknown_name("method", method, known)
    from distill.presets import find_preset

    size = find_preset(preset)
    if images is not None:
        size = replace(size, images=images)
    from distill.checkpoint import Settings
    from distill.loop import train

    folder = out or Path("runs/distill") / method
    manifest = train(Settings(method, base, size, seed), folder, _device(device), fresh=not resume)
    if as_json:
        click.echo(json.dumps(manifest, indent=2, sort_keys=True))
    else:
        _tell(manifest, folder)


def _device(name: str) -> str:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device here; leave --device out, or say cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _tell(manifest: dict[str, Any], folder: Path) -> None:
    last = manifest["stages"][-1]
    click.echo(f"done: {last['images_seen']} images seen in {last['seconds']:.0f} s of training")
    for stage in manifest["stages"]:
        if "/" not in stage["file"]:
            steps = ", ".join(map(str, stage["steps"]))
            click.echo(
                f"  {folder / stage['file']}  {steps} step{'s' if stage['steps'] != [1] else ''}, {stage['scheduler']}"
            )
    click.echo(f"samples: {folder / 'samples'}; how to use the files: {folder / 'README.md'}")
