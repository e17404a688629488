"""``pocket``: build, check and sample the miniature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hypersd_bench.errors import CheckFailed, InputError

if TYPE_CHECKING:
    from hypersd_bench.pocket.check import CheckRow


@click.group()
def pocket() -> None:
    """Build, check and sample the miniature: a complete small text-to-image world."""


@pocket.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/pocket"), show_default=True, help="Folder.")
@click.option("--stages", help="Only these, with commas: vae,teacher,clip,aesthetic,checker,segmenter")
@click.option("--scale", type=click.FloatRange(0.0001, 100), default=1.0, help="Train this many times as long.")
@click.option("--device", help="cpu, cuda; the best there is by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the card as JSON at the end.")
def build(out: Path, stages: str | None, scale: float, device: str | None, as_json: bool) -> None:
    """Train the miniature from artwork to weights. Started again, it goes on; finished stages are kept."""
    import torch

    from hypersd_bench.cli.run import split_names
    from hypersd_bench.pocket.build import SHIPPED, shortened
    from hypersd_bench.pocket.build import build as build_miniature
    from hypersd_bench.pocket.card import read_card
    from hypersd_bench.runner.benchmark import choose_device

    recipe = shortened(SHIPPED, scale)
    build_miniature(out, torch.device(choose_device(device)), recipe, tuple(split_names(stages) or ()))
    card = read_card(out)
    click.echo(json.dumps(card) if as_json else f"built: {', '.join(card['stages'])} in {out}")


@pocket.command()
@click.option("--weights", type=click.Path(path_type=Path), help="A folder that build made; shipped by default.")
@click.option("--images", "num_images", type=click.IntRange(8), default=96, show_default=True, help="Images per rate.")
@click.option("--device", help="cpu, cuda; the best there is by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def check(weights: Path | None, num_images: int, device: str | None, as_json: bool) -> None:
    """Measure the miniature against its bars, on held-out prompts and scenes; exit code 1 when one is missed."""
    import torch

    from hypersd_bench.pocket import WEIGHTS
    from hypersd_bench.pocket.check import run_check
    from hypersd_bench.runner.benchmark import choose_device

    folder = weights or WEIGHTS
    if not folder.is_dir():
        raise InputError(f"no miniature in {folder}; build it with: hypersd-bench pocket build")
    rows = run_check(folder, torch.device(choose_device(device)), num_images=num_images)
    if as_json:
        click.echo(json.dumps([row.to_json() for row in rows]))
    else:
        _print_rows(rows)
    missed = [row.name for row in rows if not row.passed]
    if missed:
        raise CheckFailed(f"below the bar: {', '.join(missed)}")


@pocket.command()
@click.argument("captions", nargs=-1)
@click.option("--model", default="teacher", show_default=True, help="teacher, or a shipped student: hyper-sd, lcm, ...")
@click.option("--steps", type=int, default=25, show_default=True, help="A step count the model was made for.")
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed, other noise.")
@click.option("--columns", type=click.IntRange(1, 32), default=8, show_default=True, help="Images per caption.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("pocket-sample.png"), help="The picture's file.")
@click.option("--json", "as_json", is_flag=True, help="Print path and captions as JSON.")
def sample(
    captions: tuple[str, ...], model: str, steps: int, seed: int, columns: int, out: Path, as_json: bool
) -> None:
    """Draw CAPTIONS (held-out prompts when none is given), one row each, as one picture."""
    import io

    import numpy as np
    from PIL import Image

    from hypersd_bench.bench import Bench
    from hypersd_bench.pipelines import sample as draw
    from hypersd_bench.prompts import load_prompts
    from hypersd_bench.runner.plan import make_plan
    from hypersd_bench.runner.spec import load_spec
    from hypersd_bench.seeding import image_seed
    from hypersd_bench.store import write_bytes

    texts = list(captions) or [prompt.text for prompt in load_prompts("pocket/held-out").prompts[:8]]
    chosen = make_plan(load_spec(None, {"models": [model], "steps": [steps]})).configurations[0]
    pipe = Bench().seat(chosen.model, "pocket")
    seeds = [image_seed(seed, text, column) for text in texts for column in range(columns)]
    repeated = [text for text in texts for _ in range(columns)]
    images = draw(pipe, chosen.model.contract, steps, repeated, seeds).numpy()
    size = images.shape[-1]
    grid = images.reshape(len(texts), columns, 3, size, size).transpose(0, 3, 1, 4, 2)
    picture = Image.fromarray(np.ascontiguousarray(grid.reshape(len(texts) * size, columns * size, 3)))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_bytes(out, buffer.getvalue())
    click.echo(json.dumps({"file": str(out), "captions": texts}) if as_json else "\n".join([*texts, f"-> {out}"]))


def _print_rows(rows: list[CheckRow]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "what", "measured", "95 % interval", "n", "bar")
    for row in rows:
        table.add_row(
            "ok" if row.passed else "MISSED", row.name, f"{row.value:.3g} {row.unit}",
            f"{row.low:.3g} to {row.high:.3g}", str(row.n), f"{row.bar:g}",
        )  # fmt: skip
    Console().print(table)
