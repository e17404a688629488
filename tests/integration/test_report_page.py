"""The page as a browser would read it: parsed, its resources resolved, its numbers compared with the run's."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from hypersd_bench.store import RunStore
from metrics.comparison import summaries
from reports.data import ReportData
from reports.figures import Figure, all_figures
from reports.numbers import decimals, fixed
from reports.read import read_report
from tests.report_pages import write_report
from tests.synthetic_run import FID, MODELS, make_run

LOADING = {"src", "href", "poster", "srcset", "xlink:href", "action"}


class Page(HTMLParser):
    """All tags with their attributes, the ids, and the text of the numbers in the first table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.feed(text)
        self.ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    store = make_run(tmp_path_factory.mktemp("run") / "demo", num_prompts=8)
    rows = [{"stage": stage, "images_seen": 64 * (i + 1), "loss": 1 / (i + 1)} for stage in "84" for i in range(5)]
    (store.folder / "train").mkdir()
    (store.folder / "train" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    store.manifest["models"][0]["training"] = "train"
    (store.folder / "run.json").write_text(json.dumps(store.manifest))
    return store


@pytest.fixture(scope="module")
def folder(run: RunStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = write_report(run.folder, run.folder / "report").parent
    moved = tmp_path_factory.mktemp("elsewhere") / "moved"
    shutil.move(written, moved)
    return moved


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "index.html").read_text()


@pytest.fixture(scope="module")
def drawn(run: RunStore) -> dict[str, list[Figure]]:
    return all_figures(read_report(run))


def test_every_resource_is_in_the_folder(folder: Path, html: str) -> None:
    page = Page(html)
    links = [(name, value) for _, attributes in page.tags for name, value in attributes.items() if name in LOADING]
    grid, noises, enlarged = 8 * len(MODELS) * 4, 6 * len(MODELS) * 2, 2
    assert len([tag for tag, _ in page.tags if tag == "img"]) == grid + noises + enlarged
    for _, value in links:
        assert not re.match(r"\w+:|//", value), f"{value} leaves the folder"
        target = unquote(value)
        assert target.removeprefix("#") in page.ids if target.startswith("#") else (folder / target).is_file(), value
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", html), "no resource by way of CSS"
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}


def test_ids_are_unique(html: str) -> None:
    ids = Page(html).ids
    assert len(ids) == len(set(ids)), "several drawings in one page must not share clip paths"


def test_the_page_says_the_runs_numbers(run: RunStore, folder: Path, html: str) -> None:
    data = read_report(run)
    stored = json.loads((folder / "data.json").read_text())
    for summary, cell in zip(_ordered(run, data), stored["cells"], strict=True):
        assert summary == (cell["metric"], cell["model"], cell["steps"], cell["value"], cell["n"])
        places = decimals(c for c in data.cells if c.metric == cell["metric"])
        assert re.search(f">{re.escape(fixed(cell['value'], places))}</(span|a)>", html)
    for cell in stored["cells"]:
        assert cell["mark"] in ("best", "level", "")


def _ordered(run: RunStore, data: ReportData) -> list[tuple[str, str, int, float, int]]:
    found = {(s.metric, s.model, s.steps): s.estimate for s in summaries(run)}
    return [
        (c.metric, c.model, c.steps, estimate.value, estimate.n)
        for c in data.cells
        if (estimate := found[c.metric, c.model, c.steps])
    ]


def test_sections_and_figures(run: RunStore, folder: Path, html: str, drawn: dict[str, list[Figure]]) -> None:
    assert {name: len(figures) for name, figures in drawn.items()} == {
        "steps": 3, "latency": 3, "memory": 0, "metrics": 3, "differences": 3, "training": 1, "study": 0,
    }  # fmt: skip
    for figure in (figure for figures in drawn.values() for figure in figures):
        text = (folder / "figs" / f"{figure.name}.svg").read_text()
        assert text.startswith("<svg")
        assert figure.title in text, "a figure of its own says what it shows"
    for section in ("verdict", "results", "curves", "differences", "images", "training", "provenance"):
        assert f'<section id="{section}">' in html
    assert run.manifest["spec_hash"] in html
    assert FID.id in html, "no number without its protocol"


def test_one_colour_per_method_everywhere(run: RunStore, drawn: dict[str, list[Figure]]) -> None:
    colours = [model.colour for model in read_report(run).models]
    assert len(set(colours)) == len(MODELS)
    for figure in drawn["steps"]:
        used = set(re.findall(r"#[0-9a-fA-F]{6}", figure.svg))
        assert used == set(colours), "nothing but the methods has a colour; the ink follows the theme"


def test_reports_never_import_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", models=("a", "b"), steps=(1,), num_prompts=2)
    code = (
        "import sys; from pathlib import Path; from tests.report_pages import write_report; "
        "write_report(Path(sys.argv[1]), Path(sys.argv[2])); sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, run.folder, tmp_path / "out"], cwd=root, check=False)
    assert done.returncode == 0
