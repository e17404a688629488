"""The documentation site builds without a warning, and its reference says what the code says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hypersd_bench
from hypersd_bench import registry
from hypersd_bench.runner.spec import RunSpec

ROOT = Path(hypersd_bench.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built copy: source with the written reference, and ``html`` in it."""
    pytest.importorskip("sphinx", reason="sphinx is not installed")
    copy = tmp_path_factory.mktemp("site") / "docs"
    shutil.copytree(ROOT / "docs", copy, ignore=shutil.ignore_patterns("reference", "__pycache__"))
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(copy), str(copy / "html")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return copy


def test_every_page_is_in_the_table_of_contents(docs: Path) -> None:
    index = (docs / "html" / "index.html").read_text()
    pages = [page.relative_to(docs).with_suffix(".html") for page in docs.rglob("*.md") if "html" not in page.parts]
    assert len(pages) > 15
    for page in pages:
        assert (docs / "html" / page).is_file()
        assert page.name == "index.html" or f'href="{page.as_posix()}"' in index


@pytest.mark.parametrize(("page", "kind"), [("metrics", "metric"), ("methods", "method"), ("command-line", "verb")])
def test_the_reference_names_every_row(docs: Path, page: str, kind: str) -> None:
    text = (docs / "reference" / f"{page}.md").read_text()
    for name in registry.rows(kind):
        assert f"`{name}`" in text or f"`hypersd-bench {name}`" in text


def test_the_reference_names_every_key(docs: Path) -> None:
    text = (docs / "reference" / "spec.md").read_text()
    assert all(f"| `{key}` |" in text for key in RunSpec.model_fields)
