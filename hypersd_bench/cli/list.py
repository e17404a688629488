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
from hypersd_bench.catalog.spec import ModelSpec
from hypersd_bench.errors import InputError, unknown_name


def _models(family: str | None, base: str | None) -> list[dict[str, Any]]:
    """The catalogue, or of it one family's or one base's models; raises InputError where there are none."""
    specs = [spec for row in registry.rows("family") for spec in registry.resolve("family", row)()]
    for kind, wanted in (("family", family), ("base", base)):
        known = {getattr(spec, kind) for spec in specs}
        if wanted and wanted not in known:
            raise unknown_name(kind, wanted, known)
    found = [spec for spec in specs if family in (None, spec.family) and base in (None, spec.base)]
    if not found:
        others = ", ".join(sorted({spec.base for spec in specs if spec.family == family}))
        raise InputError(f"{family} has no model for base {base!r}; it has some for: {others}")
    return [_model(spec) for spec in found]


def _model(spec: ModelSpec) -> dict[str, Any]:
    contract = spec.contract
    embedded = contract.embedded_guidance
    return {
        "name": spec.name,
        "family": spec.family,
        "base": spec.base,
        "kind": spec.kind,
        "steps": sorted(contract.timesteps),
        "scheduler": contract.scheduler,
        "guidance_scale": contract.guidance_scale,
        "guidance": f"{contract.guidance_scale:g}" if embedded is None else f"{embedded:g} (told to the UNet)",
        "contract": asdict(contract),
        "weights": spec.weights.name if isinstance(spec.weights, Path) else str(spec.weights or spec.pipeline),
        "pipeline": spec.pipeline,
        "allowed": dict(spec.allowed),
        "trained_on": list(spec.trained_on),
        "license": spec.license,
        "unconfirmed": spec.unconfirmed,
        "published": [asdict(row) for row in spec.published],
        "notes": spec.notes,
    }


def _methods() -> list[dict[str, Any]]:
    return [{"name": name, "summary": _summary(row)} for name, row in registry.rows("method").items()]


def _metrics() -> list[dict[str, Any]]:
    return [_metric(name, registry.resolve("metric", name)) for name in registry.rows("metric")]


def _metric(name: str, factory: Any) -> dict[str, Any]:
    lacks = getattr(factory, "lacks", None)  # a third party's need not say
    needs = list(getattr(factory, "needs", ()))
    return {"name": name, **asdict(factory.info), "needs": needs, "here": (lacks() if lacks else "") or "yes"}


def _prompts() -> list[dict[str, Any]]:
    sources = [registry.resolve("prompts", name) for name in registry.rows("prompts")]
    return [
        {
            "name": source.id,
            "count": source.count,
            "state": source.state,
            "license": source.license,
            "note": source.note,
            "url": source.url,
            "files": [asdict(file) for file in source.files],
            "prompts_sha256": source.prompts_sha256,
        }
        for source in sources
    ]


_KINDS: dict[str, tuple[Callable[..., list[dict[str, Any]]], tuple[str, ...]]] = {
    "models": (
        _models,
        ("name", "family", "base", "steps", "scheduler", "guidance", "weights", "license", "unconfirmed"),
    ),
    "methods": (_methods, ("name", "summary")),
    "metrics": (_metrics, ("name", "direction", "kind", "unit", "needs", "here")),
    "prompts": (_prompts, ("name", "count", "state", "license", "note")),
}


@click.command("list")
@click.argument("kind", type=click.Choice(list(_KINDS)))
@click.option("--family", metavar="NAME", help="Of the models, only this family's: hyper-sd, lightning-lora, ...")
@click.option("--base", metavar="NAME", help="Of the models, only those of this base: sdxl, sd15, sd21, pocket.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every field.")
def list_command(kind: str, family: str | None, base: str | None, as_json: bool) -> None:
    """Show what there is: models, methods, metrics or prompts."""
    read, columns = _KINDS[kind]
    if kind != "models" and (family or base):
        raise InputError(f"--family and --base choose among models; list {kind} has neither")
    items = read(family, base) if kind == "models" else read()
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
