"""The report: a folder made beside its place and moved into it whole, or one self-contained file."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hypersd_bench.errors import InputError
from hypersd_bench.store import RunStore, write_bytes, write_json
from reports import tables, verdict
from reports.data import ReportData, read_report
from reports.figures import all_figures
from reports.methods import methods_paragraph
from reports.numbers import counted, decimals, fixed, interval, percent
from reports.pictures import Carried, Picture, PromptRow, carry_picture, embed_picture
from reports.study import PairVotes, StudyData, contested, read_study

FORMAT = "hypersd-bench report"  # in data.json: what tells a folder of ours from anybody's
MARK = f'<meta name="generator" content="{FORMAT}">'  # the same of a single file
NUM_OPEN_PROMPTS = 6  # the others unfold
MAX_FILE_BYTES = 25 * 2**20  # of a single file: pictures beyond it are left out


def write_report(run: Path, out: Path, study: Path | None = None) -> Path:
    """Write the report of a run directory into ``out``, replacing an older one; returns the page's path."""
    store = RunStore.open(run)
    data = read_report(store, read_study(study) if study else None)
    with _replaced(out) as folder:
        carried = {file: carry_picture(run, file, folder) for file in _files(data)}
        sections = all_figures(data)
        for figure in (figure for drawn in sections.values() for figure in drawn):
            write_bytes(folder / "figs" / f"{figure.name}.svg", figure.file_svg.encode())
        for name, text in tables.files(data).items():
            write_bytes(folder / "tables" / name, text.encode())
        if data.study is not None and data.study.card:
            write_bytes(folder / "human-evaluation.md", data.study.card.encode())
        write_json(folder / "spec.json", data.spec)
        write_json(folder / "data.json", {"format": FORMAT, **data.to_json()})
        write_bytes(folder / "index.html", _page(data, sections, carried, data.grid, in_folder=True).encode())
    return out / "index.html"


def write_single_file(run: Path, file: Path, study: Path | None = None) -> Path:
    """Write the report as one file with everything in it, replacing an older one; returns its path.

    Pictures beyond MAX_FILE_BYTES are left out, prompt by prompt from the end, and a warning says so.
    """
    if file.is_dir() or (file.exists() and MARK not in file.read_text(encoding="utf-8", errors="replace")[:2000]):
        raise InputError(f"{file} exists and is no report; name another --single-file, or remove it")
    data = read_report(RunStore.open(run), read_study(study) if study else None)
    sections = all_figures(data)
    carried = {pair_file: embed_picture(run, pair_file) for pair_file in _study_files(data)}
    left = MAX_FILE_BYTES - len(_page(data, sections, carried, (), in_folder=False).encode())
    shown: list[PromptRow] = []
    for row in data.grid:
        here = {p.file: embed_picture(run, p.file) for p in row.pictures if p.file not in carried}
        left -= sum(len(picture.src) + 400 for picture in here.values())  # 400: the tags around it
        if left < 0:
            break
        carried |= here
        shown.append(row)
    if len(shown) < len(data.grid):
        print(f"{file}: the pictures of {len(shown)} of {len(data.grid)} prompts fit into {MAX_FILE_BYTES >> 20} MiB; "
              "a folder (--out) shows them all", file=sys.stderr)  # fmt: skip
    write_bytes(file, _page(data, sections, carried, shown, in_folder=False).encode())
    return file


def _files(data: ReportData) -> list[str]:
    shown = [picture.file for row in data.grid for picture in row.pictures]
    return list(dict.fromkeys([*shown, *_study_files(data)]))


def _study_files(data: ReportData) -> list[str]:
    """The pictures of the pairs that the study's galleries show."""
    if data.study is None:
        return []
    return [file for pair in _shown_pairs(data.study) for file in (pair.file_a, pair.file_b)]


def _shown_pairs(study: StudyData) -> list[PairVotes]:
    criterion = study.criteria[0]
    by_id = {pair.pair: pair for pair in criterion.pairs}
    disputed = [by_id[row["pair"]] for metric in criterion.metrics for row in metric.disagreements]
    return list(dict.fromkeys([*contested(criterion.pairs), *disputed]))


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


def _page(
    data: ReportData,
    sections: dict[str, Any],
    carried: dict[str, Carried],
    grid: Sequence[PromptRow],
    *,
    in_folder: bool,
) -> str:
    """Render the page. in_folder: files lie beside it, to which it links."""
    judged = verdict.budgets(data)
    environment = Environment(
        loader=PackageLoader("reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"counted": counted, "svg": _inline, "percent": percent}
    return environment.get_template("report.html.j2").render(
        mark=Markup(MARK),
        in_folder=in_folder,
        data=data,
        grid=grid,
        summary=verdict.summary(data),
        overall=verdict.overall(data, judged),
        cheapest=verdict.cheapest(data),
        resolution=verdict.resolution(data),
        preferences=verdict.preferences(data.study) if data.study else [],
        budgets=judged,
        caveats=verdict.caveats(data),
        results=tables.results(data),
        differences=tables.differences(data) if data.differences else None,
        copies=_for_script({**tables.files(data), "methods": methods_paragraph(data)}),
        figures=sections,
        references=[model for model in data.models if model.is_reference],
        rivals=[model for model in data.models if not model.is_reference],
        shared_steps=sorted({steps for model in data.models if not model.is_reference for steps in model.steps}),
        compared=[metric for metric in data.metrics if any(d.metric == metric.id for d in data.differences)],
        per_image=[metric for metric in data.metrics if metric.kind == "image"],
        carried=carried,
        photo_attributes=_photo_attributes(data),
        study=data.study,
        contested=contested(data.study.criteria[0].pairs) if data.study else (),
        sides_of={f"{p.a}:{p.b}": (p.a, p.b) for p in data.study.criteria[0].preferences} if data.study else {},
        pair_of={pair.pair: pair for pair in data.study.criteria[0].pairs} if data.study else {},
        methods=methods_paragraph(data),
        num_open=NUM_OPEN_PROMPTS,
        spec=json.dumps(data.spec, indent=2, sort_keys=True),
        protocol=tables.protocol,
        share=lambda value, low, high: f"{percent(value)} [{percent(low)}, {percent(high)}]",
        interval=interval,
    )


def _inline(svg: str) -> Markup:
    """Mark a drawing as safe: vl-convert has escaped every text in it."""
    return Markup(svg)


def _for_script(value: Any) -> Markup:
    """JSON for a script element: nothing in it can end the element, or start a comment."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _photo_attributes(data: ReportData) -> Callable[[Picture], dict[str, str]]:
    """What a photo says of itself: its scores in words, for the enlarged view, and in numbers, to sort by."""
    places = {m.id: decimals(c for c in data.cells if c.metric == m.id) for m in data.metrics}
    labels = {m.id: m.label for m in data.metrics}

    def attributes(picture: Picture) -> dict[str, str]:
        known = [metric for metric in labels if metric in picture.scores]
        return {
            "words": " \u00b7 ".join(f"{labels[m]} {fixed(picture.scores[m], places[m])}" for m in known),
            "numbers": json.dumps({m: picture.scores[m] for m in known}, separators=(",", ":")),
        }

    return attributes
