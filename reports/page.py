"""The report folder: page, data, tables, figures and pictures, made beside its place and moved into it whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hypersd_bench.errors import InputError
from hypersd_bench.store import RunStore, write_bytes, write_json
from reports import tables, verdict
from reports.data import ReportData, read_report
from reports.figures import all_figures
from reports.numbers import counted, decimals, fixed
from reports.pictures import Carried, PromptRow, carry_picture

FORMAT = "hypersd-bench report"  # in data.json: what tells a folder of ours from anybody's
NUM_OPEN_PROMPTS = 6  # the others unfold


def write_report(run: Path, out: Path) -> Path:
    """Write the report of a run directory into ``out``, replacing an older one; returns the page's path."""
    store = RunStore.open(run)
    data = read_report(store)
    with _replaced(out) as folder:
        carried = {
            picture.file: carry_picture(run, picture.file, folder) for row in data.grid for picture in row.pictures
        }
        sections = all_figures(data)
        for figure in (figure for drawn in sections.values() for figure in drawn):
            write_bytes(folder / "figs" / f"{figure.name}.svg", figure.file_svg.encode())
        for name, text in tables.files(data).items():
            write_bytes(folder / "tables" / name, text.encode())
        write_json(folder / "spec.json", data.spec)
        write_json(folder / "data.json", {"format": FORMAT, **data.to_json()})
        write_bytes(folder / "index.html", _page(data, sections, carried).encode())
    return out / "index.html"


@contextmanager
def _replaced(out: Path) -> Iterator[Path]:
    """Give a fresh folder beside ``out`` and put it in ``out``'s place once all is written."""
    if out.exists() and not _is_ours(out):
        raise InputError(f"{out} exists and is no report; choose another --out, or remove it")
    folder = out.with_name(f".{out.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
        shutil.rmtree(out, ignore_errors=True)
        folder.replace(out)
    except OSError as error:
        raise InputError(f"can't write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_ours(out: Path) -> bool:
    if not out.is_dir():
        return False
    if not any(out.iterdir()):
        return True
    try:
        return bool(json.loads((out / "data.json").read_text()).get("format") == FORMAT)
    except (OSError, ValueError, AttributeError):
        return False


def _page(data: ReportData, sections: dict[str, Any], carried: dict[str, Carried]) -> str:
    judged = verdict.budgets(data)
    environment = Environment(
        loader=PackageLoader("reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"counted": counted, "url": quote, "svg": _inline}
    return environment.get_template("report.html.j2").render(
        data=data,
        summary=verdict.summary(data),
        overall=verdict.overall(data, judged),
        budgets=judged,
        caveats=verdict.caveats(data),
        results=tables.results(data),
        differences=tables.differences(data) if data.differences else None,
        figures=sections,
        references=[model for model in data.models if model.is_reference],
        rivals=[model for model in data.models if not model.is_reference],
        shared_steps=sorted({steps for model in data.models if not model.is_reference for steps in model.steps}),
        compared=[metric for metric in data.metrics if any(d.metric == metric.id for d in data.differences)],
        carried=carried,
        picture_scores={row.prompt_id: _score_lines(data, row) for row in data.grid},
        num_open=NUM_OPEN_PROMPTS,
        spec=json.dumps(data.spec, indent=2, sort_keys=True),
        protocol=tables.protocol,
    )


def _inline(svg: str) -> Markup:
    """Mark a drawing as safe: vl-convert has escaped every text in it."""
    return Markup(svg)


def _score_lines(data: ReportData, row: PromptRow) -> dict[str, str]:
    """What each picture of a prompt scored, by file, for the enlarged view."""
    places = {m.id: decimals(c for c in data.cells if c.metric == m.id) for m in data.metrics}
    labels = {m.id: m.label for m in data.metrics}
    return {
        picture.file: " \u00b7 ".join(
            f"{label} {fixed(picture.scores[metric], places[metric])}"
            for metric, label in labels.items()
            if metric in picture.scores
        )
        for picture in row.pictures
    }
