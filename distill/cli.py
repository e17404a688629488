"""The verb ``distill``: train a method, plan it, export what came out. Parse, call, say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hypersd_bench import registry
from hypersd_bench.errors import InputError, unknown_name
from hypersd_bench.machine import busy_cores, num_cores

if TYPE_CHECKING:
    from distill.presets import Preset


BUSY = 0.5  # cores
FILTERS = ("min_side", "min_aesthetic", "min_sharpness")


class MethodGroup(click.Group):
    """``distill METHOD`` for every registered method, beside ``distill plan`` and ``distill export``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Methods first."""
        return [*registry.rows("method"), *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        """A method's training command, without importing the method; unknown names raise InputError."""
        if (command := super().get_command(ctx, cmd_name)) is not None:
            return command
        known = registry.rows("method")
        if cmd_name not in known:
            raise unknown_name("method", cmd_name, [*known, *super().list_commands(ctx)])
        return _training_command(cmd_name)


@click.group(cls=MethodGroup, subcommand_metavar="METHOD|plan|export [ARGS]...")
def distill() -> None:
    """Train few-step students from a base: hyper-sd, lcm, tcd or lightning.

    Stopped at any moment, the same command goes on from the last checkpoint, and so does --resume FOLDER. Every student
    carries its sampler contract.
    """


def _size_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what is trained, shared by training and planning."""
    options = (
        click.option(
            "--base", default="pocket", show_default=True,
            help="Teacher: pocket, sd15, sdxl, a diffusers pipeline folder, or a hub id.",
        ),
        click.option("--preset", help="pocket, pocket-demo, tiny, sd15, sdxl, sdxl-24gb; by default, the base's."),
        click.option("--images", type=click.IntRange(min=1), help="Training images to see, instead of the preset's."),
        click.option("--rank", type=click.IntRange(min=1), help="Rank of the LoRAs, instead of the preset's."),
        click.option("--student", type=click.Choice(["lora", "unet"]), help="LoRAs, or full weights."),
        click.option(
            "--set", "assignments", multiple=True, metavar="NAME=VALUE",
            help="Any setting, such as hyper_sd.feedback_ratio=0.5 or data.crop=random; may be given again.",
        ),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="auto: CUDA if any."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _training_command(method: str) -> click.Command:
    @click.command(method)
    @_size_options
    @click.option("--data", help="scenes, shards/{000..999}.tar, an image folder, prompts.txt, or a data set's hub id.")
    @click.option("--min-side", type=click.IntRange(min=0), help="Leave out pictures with a shorter side, in pixels.")
    @click.option("--min-aesthetic", type=float, help="Leave out pictures whose metadata rate them lower.")
    @click.option("--min-sharpness", type=float, help="Leave out pictures with less variance of the Laplacian.")
    @click.option("--cache/--no-cache", default=None, help="Keep latents and embeddings on disk; see distill plan.")
    @click.option("--out", type=click.Path(path_type=Path), help="Run folder; default runs/distill/METHOD.")
    @click.option("--resume", type=click.Path(path_type=Path), help="Go on in this folder, with its own settings.")
    @click.option("--fresh", is_flag=True, help="Start over in --out; what an earlier run wrote there is removed.")
    @click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of everything random.")
    @click.option("--json", "as_json", is_flag=True, help="Print the run's manifest as JSON.")
    @click.pass_context
    def train(context: click.Context, /, resume: Path | None, out: Path | None, fresh: bool, device: str, as_json: bool,
              **given: Any) -> None:  # fmt: skip
        from accelerate import PartialState

        from distill.loop import train as run
        from distill.settings import read_settings

        if resume is not None:
            _refuse_beside_resume(context)
            settings, folder = read_settings(resume, method), resume
        else:
            settings, folder = _settings(method, given), out or Path("runs/distill") / method
        _warn_of_others(used := _device(device))
        manifest = run(settings, folder, used, fresh=fresh)
        if not PartialState().is_main_process:  # one of several speaks
            return
        click.echo(json.dumps(manifest, indent=2, sort_keys=True)) if as_json else _tell(manifest, folder)

    train.help = f"Train {method}'s few-step students; started again, it goes on."
    return train


@distill.command()
@click.argument("method")
@_size_options
@click.option("--gpu", help="Plan for a card that is not here: rtx-4090, a100-40gb, a100-80gb, h100.")
@click.option("--tflops", type=click.FloatRange(min=0, min_open=True), help="The device's TFLOP/s, instead of a guess.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(method: str, device: str, gpu: str | None, tflops: float | None, as_json: bool, **given: Any) -> None:
    """Say what METHOD will take, memory, time, caches, before anything is downloaded or trained."""
    if method not in (known := registry.rows("method")):
        raise unknown_name("method", method, known)
    from distill.planning import make_plan, render

    made = make_plan(method, given["base"], _preset(given), gpu or _device(device), tflops=tflops)
    click.echo(json.dumps(made.to_json(), indent=2, sort_keys=True) if as_json else render(made))


@distill.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--format", "form", default="diffusers", show_default=True, help="Keys of the LoRAs: diffusers, kohya.")
@click.option("--dtype", default="fp16", show_default=True, help="fp16, bf16 or fp32.")
@click.option("--fuse", is_flag=True, help="Whole UNets with the LoRA fused in.")
@click.option("--file", "files", multiple=True, help="Only this student of the run; may be given again.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write to; RUN/export by default.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def export(
    folder: Path, form: str, dtype: str, fuse: bool, files: tuple[str, ...], out: Path | None, as_json: bool
) -> None:
    """Write RUN's students for other programs; each is loaded again and compared with what was trained."""
    from distill.export_verb import export_run

    written = export_run(folder, form=form, dtype=dtype, fuse=fuse, files=files, out=out)
    if as_json:
        rows = [{"path": str(x.path), "form": x.form, "dtype": x.dtype, "bytes": x.size,
                 "largest_difference": x.largest_difference} for x in written]  # fmt: skip
        click.echo(json.dumps(rows, indent=2))
        return
    for file in written:
        click.echo(f"{file.path}  {file.size / 1e6:.1f} MB, loaded again: off by at most {file.largest_difference:.1e}")


def _settings(method: str, given: dict[str, Any]) -> Any:
    from distill.overrides import override
    from distill.settings import Settings
    from distill.sources.pictures import DataSettings

    size = _preset(given)
    source = given["data"] or ("scenes" if given["base"] == "pocket" else "")
    if not source:
        raise InputError("--data: name what to train on, for example shards/{000..999}.tar, a folder, or prompts.txt")
    filters = [f"filters.{key}={given[key]}" for key in FILTERS if given[key] is not None]
    cache = size.cache if given["cache"] is None else given["cache"]
    caches = [f"cache_{what}={cache}" for what in ("latents", "prompts")]
    own = [text.removeprefix("data.") for text in given["assignments"] if text.startswith("data.")]
    return Settings(
        method, given["base"], size, given["seed"], override(DataSettings(source=source), [*filters, *caches, *own])
    )


def _preset(given: dict[str, Any]) -> Preset:
    from distill.overrides import override
    from distill.presets import PRESETS, find_preset

    base = given["base"]
    if given["preset"] is None and base not in PRESETS:
        raise InputError(f"--preset: say how large a run on base {base!r} is; known: {', '.join(PRESETS)}")
    size = find_preset(given["preset"] or base)
    changes = {key: given[key] for key in ("images", "rank", "student") if given[key] is not None}
    return override(replace(size, **changes), [text for text in given["assignments"] if not text.startswith("data.")])


def _refuse_beside_resume(context: click.Context) -> None:
    """--resume takes every setting from the folder: one that is given beside it would be silently ignored."""
    allowed = ("resume", "device", "as_json")
    source = click.core.ParameterSource.COMMANDLINE
    for name in context.params:
        if name not in allowed and context.get_parameter_source(name) == source:
            raise InputError(f"--resume goes on with the folder's own settings; leave --{name.replace('_', '-')} out")


def _device(name: str) -> str:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device here; leave --device out, or say cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _warn_of_others(device: str) -> None:
    """Say so where other programs use the CPU: threads that wait for each other then cost far more than they gain."""
    import torch

    if device == "cpu" and torch.get_num_threads() > 1 and (busy := busy_cores()) > BUSY:
        click.echo(
            f"other programs use {busy:.1f} of {num_cores()} cores: training beside them can take several times as "
            "long, for its threads wait for each other; end them, or set OMP_NUM_THREADS=1",
            err=True,
        )


def _tell(manifest: dict[str, Any], folder: Path) -> None:
    last = manifest["stages"][-1]
    click.echo(f"done: {last['images_seen']} images seen in {last['seconds']:.0f} s of training")
    for stage in manifest["stages"]:
        if "/" not in stage["file"]:
            steps = ", ".join(map(str, stage["steps"]))
            plural = "s" if stage["steps"] != [1] else ""
            click.echo(f"  {folder / stage['file']}  {steps} step{plural}, {stage['scheduler']}")
    click.echo(f"samples: {folder / 'samples'}; how to use the files: {folder / 'README.md'}")
