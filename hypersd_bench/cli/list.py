"""``list``: what there is, from the registries. Nothing here loads weights or imports torch."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from hypersd_bench import registry


def _models() -> list[dict[str, Any]]:
    specs = [spec for family in registry.rows("family") for spec in registry.resolve("family", family)()]
    return [
        {
            "name": spec.name,
            "family": spec.family,
            "base": spec.base,
            "steps": sorted(spec.contract.timesteps),
            "scheduler": spec.contract.scheduler,
            "guidance_scale": spec.contract.guidance_scale,
            "trained_on": list(spec.trained_on),
            "license": spec.license,
        }
        for spec in specs
    ]


def _methods() -> list[dict[str, Any]]:
    return [{"name": name, "summary": _summary(row)} for name, row in registry.rows("method").items()]


def _metrics() -> list[dict[str, Any]]:
    return [{"name": name, **asdict(registry.resolve("metric", name).info)} for name in registry.rows("metric")]


def _prompts() -> list[dict[str, Any]]:
    sets = [registry.resolve("prompts", name)() for name in registry.rows("prompts")]
    return [{"name": s.id, "count": len(s.prompts), "sha256": s.sha256, "first": s.prompts[0].text} for s in sets]


_KINDS: dict[str, tuple[Callable[[], list[dict[str, Any]]], tuple[str, ...]]] = {
    "models": (_models, ("name", "base", "steps", "scheduler", "guidance_scale", "license")),
    "methods": (_methods, ("name", "summary")),
    "metrics": (_metrics, ("name", "label", "direction", "kind", "unit", "note")),
    "prompts": (_prompts, ("name", "count", "first")),
}


@click.command("list")
@click.argument("kind", type=click.Choice(list(_KINDS)))
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every field.")
def list_command(kind: str, as_json: bool) -> None:
    """Show what there is: models, methods, metrics or prompts."""
    read, columns = _KINDS[kind]
    items = read()
    if as_json:
        click.echo(json.dumps(items, indent=2))
        return
    rows = [[name.replace("_", " ") for name in columns], *([_text(item[name]) for name in columns] for item in items)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _summary(row: str) -> str:
    """The first line of a row's module docstring, read from its source: importing a method would import torch."""
    spec = find_spec(row.partition(":")[0])
    source = Path(spec.origin).read_text() if spec and spec.origin else ""
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
