"""The page: a folder made beside its place and moved into it whole, or one self-contained file."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from tqdm import tqdm

from hypersd_bench.errors import InputError
from hypersd_bench.store import write_bytes, write_json
from reports import tables, verdict
from reports.caveats import caveats, unfinished
from reports.data import ReportData
from reports.drawings import slug
from reports.figures import Figure, all_figures
from reports.methods import methods_paragraph
from reports.numbers import decimals, fixed, interval, percent
from reports.pictures import Carried, NoiseRow, Picture, PromptRow, carry_picture, embed_picture
from reports.strings import LANGUAGES, Said, catalogue, counted, say
from reports.study import PairVotes, StudyData, contested

FORMAT = "hypersd-bench report"  # in data.json: what tells a folder of ours from anybody's
MARK = f'<meta name="generator" content="{FORMAT}">'  # the same of a single file
NUM_OPEN_PROMPTS = 6  # the others unfold
SHOWN_AFTER = 2.0  # seconds that a part may take without a bar
MAX_FILE_BYTES = 25 * 2**20  # of a single file: pictures beyond it are left out

File = tuple[int, str]  # of which run, and relative to that run's folder


def write_report(data: ReportData, runs: Sequence[Path], out: Path) -> Path:
    """Write the report of these runs' folders into ``out``, replacing an older one; returns the page's path."""
    with _replaced(out) as folder:
        carried = _carry(data, runs, folder)
        figures = all_figures(data)
        for figure in (figure for drawn in figures.values() for figure in drawn):
            write_bytes(folder / "figs" / f"{figure.name}.svg", figure.file_svg())
            write_bytes(folder / "figs" / f"{figure.name}.pdf", figure.file_pdf())
        for name, text in tables.files(data).items():
            write_bytes(folder / "tables" / name, text.encode())
        if data.study is not None and data.study.card:
            write_bytes(folder / "human-evaluation.md", data.study.card.encode())
        for file, run in zip(_spec_files(data), data.runs, strict=True):
            write_json(folder / file, run.spec)
        write_json(folder / "data.json", {"format": FORMAT, **data.to_json()})
        page = _page(data, figures, carried, data.grid, data.diversity, in_folder=True)
        write_bytes(folder / "index.html", page.encode())
    return out / "index.html"


def write_single_file(data: ReportData, runs: Sequence[Path], file: Path) -> Path:
    """Write the report as one file with everything in it, replacing an older one; returns its path.

    Pictures beyond MAX_FILE_BYTES are left out, prompt by prompt from the end, and a warning says so.
    """
    if file.is_dir() or (file.exists() and MARK not in file.read_text(encoding="utf-8", errors="replace")[:2000]):
        raise InputError(f"{file} exists and is no report; name another --single-file, or remove it")
    figures = all_figures(data)
    carried = {(run, name): embed_picture(runs[run], name) for run, name in _study_files(data)}
    left = MAX_FILE_BYTES - len(_page(data, figures, carried, (), (), in_folder=False).encode())
    shown: list[PromptRow] = []
    for row in data.grid:
        files = [(p.run, p.file) for p in row.pictures if (p.run, p.file) not in carried]
        here = {(run, name): embed_picture(runs[run], name) for run, name in files}
        left -= sum(len(picture.src) + 400 for picture in here.values())  # 400: the tags around it
        if left < 0:
            break
        carried |= here
        shown.append(row)
    if len(shown) < len(data.grid):
        print(f"{file}: the pictures of {len(shown)} of {len(data.grid)} prompts fit into {MAX_FILE_BYTES >> 20} MiB; "
              "a folder (--out) shows them all", file=sys.stderr)  # fmt: skip
    write_bytes(file, _page(data, figures, carried, shown, (), in_folder=False).encode())
    return file


def _carry(data: ReportData, runs: Sequence[Path], folder: Path) -> dict[File, Carried]:
    """Copy all pictures of the report into its folder, several at once: Pillow works outside the interpreter's lock."""
    rows = [picture for row in data.grid for picture in row.pictures]
    noises = [picture for row in data.diversity for pictures in row.pictures.values() for picture in pictures]
    files = list(dict.fromkeys([*((p.run, p.file) for p in (*rows, *noises)), *_study_files(data)]))

    def carry(file: File) -> Carried:
        run, name = file
        return carry_picture(runs[run], name, folder, under=_folder_name(data, run))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        shown = tqdm(pool.map(carry, files), total=len(files), desc="pictures", delay=SHOWN_AFTER, leave=False)
        return dict(zip(files, shown, strict=True))


def _folder_name(data: ReportData, run: int) -> str:
    """Where a run's pictures lie in the report: in a folder of the run's where there are several."""
    return f"run-{run + 1}-{slug(data.runs[run].name)}" if len(data.runs) > 1 else ""


def _spec_files(data: ReportData) -> list[str]:
    if len(data.runs) == 1:
        return ["spec.json"]
    return [f"spec-{i}-{slug(run.name)}.json" for i, run in enumerate(data.runs, start=1)]


def _study_run(data: ReportData) -> int:
    """Which run the study's images are of."""
    return [run.spec_hash for run in data.runs].index(data.study.run) if data.study else 0


def _study_files(data: ReportData) -> list[File]:
    """The pictures of the pairs that the study's galleries show."""
    if data.study is None:
        return []
    run = _study_run(data)
    return [(run, file) for pair in _shown_pairs(data.study) for file in (pair.file_a, pair.file_b)]


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
    figures: Mapping[str, Sequence[Figure]],
    carried: Mapping[File, Carried],
    grid: Sequence[PromptRow],
    noises: Sequence[NoiseRow],
    *,
    in_folder: bool,
) -> str:
    """Render the page. in_folder: files lie beside it, to which it links."""
    environment = Environment(
        loader=PackageLoader("reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"svg": Markup, "percent": percent}  # vl-convert has escaped every text in a drawing
    environment.globals |= {"say": say, "counted": counted, "attr": _attribute, "option": _option}
    judged = verdict.budgets(data)
    methods = methods_paragraph(data) if data.runs else ""
    return environment.get_template("report.html.j2").render(
        mark=Markup(MARK),
        in_folder=in_folder,
        data=data,
        number={model.name: i for i, model in enumerate(data.models)},
        sections=_sections(data, figures),
        grid=grid,
        noises=noises,
        carried=carried,
        photo_attributes=_photo_attributes(data),
        summary=verdict.summary(data),
        partial=list(unfinished(data)),
        overall=verdict.overall(data, judged),
        cheapest=verdict.cheapest(data),
        resolution=verdict.resolution(data),
        budgets=judged,
        caveats=caveats(data),
        results=tables.results(data),
        differences=tables.differences(data) if data.differences else None,
        contrasts=_contrasts(data),
        published=[(model, row) for model in data.models for row in model.published],
        per_image=[metric for metric in data.metrics if metric.kind == "image"],
        figures=figures,
        copies=_for_script({**tables.files(data), "methods": methods}),
        words=_for_script({language: _script_words(language) for language in LANGUAGES}),
        methods=methods,
        num_open=NUM_OPEN_PROMPTS,
        specs=[json.dumps(run.spec, indent=2, sort_keys=True) for run in data.runs],
        spec_files=_spec_files(data),
        protocol=tables.protocol,
        study=data.study,
        **_people(data),
    )


def _sections(data: ReportData, figures: Mapping[str, Sequence[Figure]]) -> list[tuple[str, Said]]:
    """The sections that the page has, with their titles, in order."""
    known = {
        "verdict": bool(data.runs),
        "results": bool(data.runs),
        "people": data.study is not None,
        "curves": bool(figures["steps"]),
        "differences": bool(data.differences),
        "contrasts": bool(data.contrasts),
        "images": bool(data.runs),
        "training": bool(figures["training"] or data.made),
        "provenance": bool(data.runs),
    }
    baseline = data.model(data.baseline).label if data.baseline else ""
    return [(name, say(f"page.{name}", baseline=baseline)) for name, there in known.items() if there]


def _contrasts(data: ReportData) -> list[tuple[Any, Said, tables.Table | None]]:
    count = tables.num_contrasted(data)
    return [
        (c, verdict.contrast_outcome(data, c), tables.contrast(data, c, count) if c.differences else None)
        for c in data.contrasts
    ]


def _people(data: ReportData) -> dict[str, Any]:
    """What the part about a study needs; nothing without one."""
    if data.study is None:
        return {"preferences": []}
    study, first = data.study, data.study.criteria[0]
    lead = say(
        "people.lead",
        votes=counted(study.counts["votes"], "blind vote"),
        raters=counted(study.counts["voted"], "rater"),
        pairs=counted(study.counts["pairs"], "pair"),
        prompts=counted(study.counts["prompts"], "prompt"),
        design=study.design_hash[:12],
    )
    return {
        "people_lead": lead,
        "preferences": verdict.preferences(study),
        "contested": contested(first.pairs),
        "sides_of": {f"{p.a}:{p.b}": (p.a, p.b) for p in first.preferences},
        "pair_of": {pair.pair: pair for pair in first.pairs},
        "study_run": _study_run(data),
        "win_matrix": tables.win_matrix,
        "alpha_words": _alpha_words,
    }


def _alpha_words(alpha: tuple[float, float | None, float | None]) -> str:
    value, low, high = alpha
    return f"{fixed(value, 2)} {interval(low, high, 2)}".rstrip()


def _attribute(name: str, text: Said) -> Markup:
    """An attribute in English, with its Chinese beside it for the page's script."""
    return Markup('{}="{}" data-zh-{}="{}"').format(Markup(name), str(text), Markup(name), text.zh)


def _option(text: Said) -> Markup:
    """The rest of an option's tag and its text: options hold no markup, so the script changes their language."""
    return Markup('data-en="{}" data-zh="{}">{}').format(str(text), text.zh, str(text))


def _script_words(language: str) -> dict[str, str]:
    """What the page's script says."""
    texts = catalogue(language)
    words = {key.removeprefix("script."): text for key, text in texts.items() if key.startswith("script.")}
    return words | {"copied": texts["page.copied"]}


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
