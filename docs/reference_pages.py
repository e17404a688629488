"""The reference, written from the code each time the site is built: it can't be out of date.

command-line.md   every verb with its help, as the terminal shows it
spec.md           every key of a spec, with its type and default
metrics.md, models.md, methods.md   the registries
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

from hypersd_bench import registry
from hypersd_bench.catalog.spec import ModelSpec
from hypersd_bench.cli.main import PROGRAM, program
from hypersd_bench.runner.spec import Contrast, ModelRef, RunSpec, Sampler, Timing


@dataclass(frozen=True)
class Page:
    """A page of the reference; parts are joined by empty lines."""

    name: str
    title: str
    lead: str
    parts: Iterable[str]


def write_reference(folder: Path) -> None:
    """Write all pages into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for page in (_command_line(), _spec(), _metrics(), _models(), _methods()):
        text = "\n\n".join([f"# {page.title}", page.lead, *page.parts])
        (folder / page.name).write_text(f"{text}\n", encoding="utf-8")


def _command_line() -> Page:
    context = click.Context(program, info_name=PROGRAM, max_content_width=100)
    lead = "Every verb takes `--help`, and `--json` where it has something to say. Exit codes are those of the readme."
    return Page("command-line.md", "Command line", lead, _verbs(program, context))


def _verbs(group: click.Group, parent: click.Context) -> Iterator[str]:
    for name in group.list_commands(parent):
        command = group.get_command(parent, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=parent, max_content_width=100, terminal_width=100)
        yield f"{'#' * (2 + parent.command_path.count(' '))} `{context.command_path}`"
        yield f"```text\n{command.get_help(context).rstrip()}\n```"
        if isinstance(command, click.Group):
            yield from _verbs(command, context)


def _spec() -> Page:
    lead = "A spec is a YAML file for `hypersd-bench run`; each key of it is also a flag, where a flag makes sense."
    models: Sequence[type[BaseModel]] = (RunSpec, ModelRef, Sampler, Timing, Contrast)
    titles = ("The spec", "An entry of `models`", "`sampler` of a model", "`timing`", "An entry of `contrasts`")
    return Page("spec.md", "Spec keys", lead, (_keys(t, m) for t, m in zip(titles, models, strict=True)))


def _keys(title: str, model: type[BaseModel]) -> str:
    rows = [
        [f"`{name}`", f"`{_type(field.annotation)}`", "needed" if field.is_required() else f"`{_shown(field.default)}`"]
        for name, field in model.model_fields.items()
    ]
    about = inspect.cleandoc(model.__doc__ or "").replace("``", "`")
    return f"## {title}\n\n{about}\n\n{_table(['key', 'type', 'default'], rows)}"


def _type(annotation: Any) -> str:
    words = getattr(annotation, "__name__", "") if isinstance(annotation, type) else str(annotation)
    for long, short in (("typing.", ""), ("pathlib.", ""), ("hypersd_bench.runner.spec.", ""), ("NoneType", "None")):
        words = words.replace(long, short)
    return words.partition("[Annotated")[0] if "Annotated" in words else words


def _shown(default: Any) -> str:
    if isinstance(default, BaseModel):
        return "its own defaults"
    return "none" if default is None else str(default) or '""'


def _metrics() -> Page:
    infos = [registry.resolve("metric", name).info for name in registry.rows("metric")]
    rows = [
        [f"`{info.id}`", info.label, info.direction, info.unit, info.kind, info.version, info.note] for info in infos
    ]
    header = ["id", "label", "better", "unit", "a value is of", "version", "note"]
    lead = "An id stands for the whole protocol; numbers of two ids, or of two versions, are never compared."
    return Page("metrics.md", "Metrics", lead, [_table(header, rows)])


def _models() -> Page:
    specs: list[ModelSpec] = [spec for row in registry.rows("family") for spec in registry.resolve("family", row)()]
    parts = []
    for base in dict.fromkeys(spec.base for spec in specs):
        rows = [
            [f"`{spec.name}`", spec.family, spec.kind, ", ".join(map(str, sorted(spec.contract.timesteps))),
             spec.contract.scheduler, f"{spec.contract.guidance_scale:g}", spec.license or "\u2013"]
            for spec in specs if spec.base == base
        ]  # fmt: skip
        header = ["model", "family", "kind", "steps", "sampler", "guidance", "licence"]
        parts.append(f"## {base}\n\n{_table(header, rows)}")
    lead = "A spec names a family (`hyper-sd`), which has the right checkpoint for each number of steps, or a model."
    return Page("models.md", "Models", lead, parts)


def _methods() -> Page:
    rows = [[f"`{name}`", _summary(row)] for name, row in registry.rows("method").items()]
    lead = "What `hypersd-bench distill METHOD` trains; `distill METHOD --help` names its settings and presets."
    return Page("methods.md", "Methods", lead, [_table(["method", "what it is"], rows)])


def _summary(row: str) -> str:
    """The first line of a method's docstring."""
    method = registry.resolve("method", next(name for name, known in registry.rows("method").items() if known == row))
    return str(method.__doc__ or "").strip().splitlines()[0]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
