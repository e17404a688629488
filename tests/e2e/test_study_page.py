"""The rating page in a real browser: a study by keyboard, a refresh, and a look at the rows it left."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.study_server import served
from tests.synthetic_run import make_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
READY = ".study[data-state=rating][aria-busy=false]"
PAIRS = 5

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found; install it with: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "run"
    return make_run(folder, models=("one", "two"), steps=(4,), num_prompts=5, replicates=1).folder


@pytest.fixture(scope="module")
def origin(run: Path) -> Iterator[str]:
    with served(run, "--pairs", str(PAIRS)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


def _wait_for_pair(page: Page, done: int) -> None:
    page.wait_for_selector(READY, timeout=120_000)
    page.wait_for_function(f"document.querySelector('[data-part=count]').textContent === '{done} of {PAIRS}'")
    page.wait_for_function(
        "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
    )


def _votes(run: Path) -> list[tuple[str, str, int]]:
    with sqlite3.connect(run / "study" / "votes.sqlite") as db:
        rows = db.execute(
            "SELECT pair_id, choice, response_ms FROM vote JOIN assignment ON id = assignment_id"
        ).fetchall()
    db.close()
    return sorted(rows)


def test_a_study_by_keyboard_survives_a_refresh(browser: Browser, origin: str, run: Path, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 860})
    page.set_default_timeout(120_000)
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    outside: list[str] = []
    page.on(
        "request", lambda request: None if request.url.startswith((origin, "data:")) else outside.append(request.url)
    )

    page.goto(origin)
    _wait_for_pair(page, 0)
    page.screenshot(path=tmp_path / "study.png")
    boxes = [page.locator(f"[data-part={side}]").bounding_box() for side in ("left", "right")]
    assert boxes[0]
    assert boxes[1]
    assert [boxes[0][side] for side in ("y", "width", "height")] == [
        boxes[1][side] for side in ("y", "width", "height")
    ]
    assert page.locator("h1:visible").count() == 1

    page.keyboard.press("Control+ArrowLeft")  # a browser's own shortcut is no vote
    for done, key in enumerate(("ArrowLeft", "ArrowRight")):
        page.keyboard.press(key)
        _wait_for_pair(page, done + 1)
    prompt = page.text_content("[data-part=prompt]")
    page.reload()
    _wait_for_pair(page, 2)
    assert page.text_content("[data-part=prompt]") == prompt
    for done, key in enumerate((" ", "ArrowDown"), start=2):
        page.keyboard.press(key)
        _wait_for_pair(page, done + 1)
    page.click("button[data-choice=left]")
    page.wait_for_selector(".study[data-state=finished]")
    page.reload()
    page.wait_for_selector(".study[data-state=finished]")

    votes = _votes(run)
    assert len({pair for pair, _, _ in votes}) == len(votes) == PAIRS
    assert sorted(choice for _, choice, _ in votes) == ["left", "left", "right", "tie", "tie"]
    assert all(0 < response_ms < 120_000 for _, _, response_ms in votes)
    assert troubles == []
    assert outside == []
    page.close()


def test_a_lost_connection_delays_a_vote_and_loses_none(browser: Browser, origin: str, run: Path) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark", has_touch=True)
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.goto(f"{origin}/study/")
    _wait_for_pair(page, 0)
    before = len(_votes(run))
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    context.set_offline(True)
    page.tap("button[data-choice=tie]")
    page.wait_for_function("document.querySelector('[data-part=notice]').textContent.startsWith('No connection')")
    assert len(_votes(run)) == before
    context.set_offline(False)
    _wait_for_pair(page, 1)
    assert page.text_content("[data-part=notice]") == ""
    assert len(_votes(run)) == before + 1
    context.close()
