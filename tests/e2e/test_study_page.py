"""The rating page and the admin page in a real browser: whole sessions, and all that can get in their way."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser import CHROMIUM, Troubles, violations
from tests.study_server import PASSWORD, served
from tests.tiny_study import make_study
from user_study.records import VoteRow
from user_study.study import Study

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page, Route

SHOWN = ":is([data-phase=practice], [data-phase=rating])[aria-busy=false]"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found; install it with: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("page"), num_prompts=6, practice=1, gold_every=4)


@pytest.fixture(scope="module")
def origin(study: Study) -> Iterator[str]:
    with served(study.folder) as address:
        yield address


def _shown(page: Page, done: int | None = None) -> None:
    """Wait until a pair is on show, and, where told, until so many are done."""
    page.wait_for_selector(f".study{SHOWN}")
    if done is not None:
        page.wait_for_function(
            f"document.querySelector('[data-part=count]').textContent.match(/\\d+/)[0] === '{done}'"
            f" && document.querySelector('.study').matches('{SHOWN}')"
        )
    page.wait_for_selector("button[data-choice=left]:enabled")


def _start(context: BrowserContext, origin: str) -> Page:
    """A rater past consent, instructions and practice."""
    page = context.new_page()
    page.goto(origin)
    page.click("[data-do=consent]")
    page.click("[data-do=begin]")
    _shown(page)
    page.keyboard.press("ArrowLeft")
    page.click("[data-do=continue]")
    _shown(page, 0)
    return page


def _votes(study: Study, since: set[str], num: int = 0) -> list[VoteRow]:
    """Votes of raters who came since, practice left out, by position; waits for so many, which may be on their way."""
    with closing(study.open_votes()) as votes:
        for _ in range(100):
            found = [vote for vote in votes.votes() if vote.rater not in since and vote.kind != "practice"]
            if len(found) >= num:
                break
            time.sleep(0.1)
    return sorted(found, key=lambda vote: vote.position)


@pytest.fixture
def before(study: Study, origin: str) -> set[str]:
    """Raters there are already."""
    votes = study.open_votes()
    known = {rater.id for rater in votes.raters()}
    votes.close()
    return known


def test_a_whole_session_by_keyboard_only(
    context: BrowserContext, origin: str, study: Study, before: set[str], tmp_path: Path
) -> None:
    page = context.new_page()
    troubles = Troubles(page, origin)
    page.goto(origin)
    page.wait_for_selector("[data-phase=consent]")
    findings = {"consent": violations(page)}
    for phase in ("consent", "instructions"):
        page.wait_for_selector(f"[data-phase={phase}]")
        while page.evaluate("document.activeElement.dataset.do") not in ("consent", "begin"):
            page.keyboard.press("Tab")
        findings[phase] = violations(page)
        page.keyboard.press("Enter")
    _shown(page)
    findings["practice"] = violations(page)
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("[data-part=feedback]:not([hidden])")
    assert re.search("better picture|spoiled on purpose", page.text_content("[data-part=feedback-text]") or "")
    findings["feedback"] = violations(page)
    page.keyboard.press("Enter")
    _shown(page, 0)
    findings["rating"] = violations(page)
    page.screenshot(path=tmp_path / "rating.png")
    total = int(re.findall(r"\d+", page.text_content("[data-part=count]") or "")[1])
    page.keyboard.press("Control+ArrowLeft")  # a browser's own shortcut is no vote
    keys = ["ArrowLeft", "ArrowRight", " ", "ArrowDown", "b"]
    pressed = [keys[n % len(keys)] for n in range(total)]
    for done, key in enumerate(pressed):
        _shown(page, done)
        page.keyboard.press(key)
    page.wait_for_selector("[data-phase=finished]")
    page.wait_for_function(f"document.querySelector('[data-part=summary]').textContent.includes('{total} pairs')")
    findings["finished"] = violations(page)
    page.reload()
    page.wait_for_selector("[data-phase=finished]")

    names = {"ArrowLeft": "left", "ArrowRight": "right", " ": "tie", "ArrowDown": "tie", "b": "both-bad"}
    votes = _votes(study, before)
    assert [vote.choices["overall"] for vote in votes] == [names[key] for key in pressed]
    assert all(0 < vote.response_ms < 60_000 and vote.input == "key" for vote in votes)
    assert {(vote.viewport, vote.language) for vote in votes} == {("1280x860", "en")}
    assert {phase: found for phase, found in findings.items() if found} == {}
    assert troubles.found == []


def test_both_pictures_have_the_same_box_and_the_page_one_heading(context: BrowserContext, origin: str) -> None:
    page = _start(context, origin)
    page.hover("[data-part=left]")
    boxes = [page.locator(f"[data-part={side}]").bounding_box() for side in ("left", "right")]
    assert boxes[0]
    assert boxes[1]
    assert [boxes[0][edge] for edge in ("y", "width", "height")] == [
        boxes[1][edge] for edge in ("y", "width", "height")
    ]
    assert page.locator("h1:visible").count() == 1


def test_a_refresh_shows_the_same_pair(context: BrowserContext, origin: str) -> None:
    page = _start(context, origin)
    page.keyboard.press("ArrowLeft")
    _shown(page, 1)
    seen = [page.get_attribute(f"[data-part={side}]", "src") for side in ("left", "right")]
    page.reload()
    _shown(page, 1)
    assert [page.get_attribute(f"[data-part={side}]", "src") for side in ("left", "right")] == seen


def test_undo_brings_the_last_pair_back(context: BrowserContext, origin: str, study: Study, before: set[str]) -> None:
    page = _start(context, origin)
    assert page.is_disabled(".tools [data-do=undo]")
    first = page.get_attribute("[data-part=left]", "src")
    page.keyboard.press("ArrowLeft")
    _shown(page, 1)
    page.keyboard.press("u")
    _shown(page, 0)
    assert page.get_attribute("[data-part=left]", "src") == first
    page.keyboard.press("ArrowRight")
    _shown(page, 1)
    page.click(".tools [data-do=undo]")
    _shown(page, 0)
    page.keyboard.press("b")
    _shown(page, 1)
    assert [vote.choices["overall"] for vote in _votes(study, before, 1)] == ["both-bad"]


def test_two_tabs_count_a_pair_once(context: BrowserContext, origin: str, study: Study, before: set[str]) -> None:
    one = _start(context, origin)
    two = context.new_page()
    two.goto(f"{origin}/study/")
    _shown(two, 0)
    one.keyboard.press("ArrowLeft")
    _shown(one, 1)
    two.keyboard.press("ArrowRight")  # the same pair, another choice: the first one counts
    _shown(two, 1)
    two.keyboard.press("b")
    _shown(two, 2)
    votes = _votes(study, before, 2)
    assert [vote.choices["overall"] for vote in votes] == ["left", "both-bad"]


def test_offline_votes_wait_and_arrive(context: BrowserContext, origin: str, study: Study, before: set[str]) -> None:
    page = _start(context, origin)
    page.wait_for_timeout(300)  # the next pair is loaded ahead
    context.set_offline(True)
    page.keyboard.press("ArrowLeft")
    _shown(page, 1)  # the next pair is there without the server
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('[data-part=notice]').textContent.startsWith('No connection')")
    assert _votes(study, before) == []
    context.set_offline(False)
    _shown(page, 2)
    assert page.text_content("[data-part=notice]") == ""
    assert [vote.choices["overall"] for vote in _votes(study, before, 2)] == ["left", "right"]


def test_votes_given_offline_survive_a_closed_tab(
    context: BrowserContext, origin: str, study: Study, before: set[str]
) -> None:
    page = _start(context, origin)
    page.wait_for_timeout(300)
    context.set_offline(True)
    page.keyboard.press("ArrowLeft")
    _shown(page, 1)
    page.close()
    context.set_offline(False)
    again = context.new_page()
    again.goto(origin)
    _shown(again, 1)
    assert [vote.choices["overall"] for vote in _votes(study, before, 1)] == ["left"]


def test_the_clock_starts_when_both_pictures_are_there(
    context: BrowserContext, origin: str, study: Study, before: set[str]
) -> None:
    page = _start(context, origin)
    page.keyboard.press("ArrowLeft")
    _shown(page, 1)
    page.route("**/img/*", _late)
    page.reload()
    page.wait_for_selector("[data-phase=rating][aria-busy=true]")
    page.keyboard.press("ArrowRight")  # too early: no vote
    assert page.is_disabled("button[data-choice=left]")
    _shown(page, 1)
    page.keyboard.press("b")
    _shown(page, 2)
    votes = _votes(study, before, 2)
    assert [vote.choices["overall"] for vote in votes] == ["left", "both-bad"]
    assert votes[1].response_ms < 700  # of the loading nothing
    page.unroute_all(behavior="ignoreErrors")


def _late(route: Route) -> None:
    time.sleep(0.7)
    route.continue_()


def test_chinese_on_a_dark_phone(browser: Browser, origin: str, study: Study, before: set[str], tmp_path: Path) -> None:
    context = browser.new_context(
        viewport={"width": 390, "height": 844},
        locale="zh-CN",
        color_scheme="dark",
        has_touch=True,
        device_scale_factor=2,
    )
    page = _start(context, origin)
    troubles = Troubles(page, origin)
    assert page.evaluate("document.documentElement.lang") == "zh"
    assert page.text_content("[data-part=question]").startswith("您更喜欢哪张图片")  # type: ignore[union-attr]
    assert page.text_content("[data-part=prompt]", timeout=1000).startswith("a fox")  # type: ignore[union-attr]
    assert page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]") == [390, 844]
    page.screenshot(path=tmp_path / "phone.png")
    assert violations(page) == []
    page.tap("button[data-choice=tie]")
    _shown(page, 1)
    page.tap("[data-part=languages] [lang=en]")
    assert page.text_content("[data-part=question]") == "Which picture do you prefer?"
    page.tap("button[data-choice=right]")
    _shown(page, 2)
    votes = _votes(study, before, 2)
    assert [(vote.language, vote.input, vote.pixel_ratio) for vote in votes] == [("zh", "touch", 2), ("en", "touch", 2)]
    assert troubles.found == []
    context.close()


def test_zoom_moves_both_pictures_alike(context: BrowserContext, origin: str) -> None:
    page = _start(context, origin)
    style = "['left', 'right'].map((side) => { const s = document.querySelector(`[data-part=${side}]`).style; return [s.transform, s.transformOrigin]; })"  # noqa: E501
    page.keyboard.press("z")
    box = page.locator(".frame").first.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    left, right = page.evaluate(style)
    assert left == right
    assert left[0] == "scale(3)"
    assert left[1].startswith("25% 25%")
    page.keyboard.press("ArrowLeft")
    _shown(page, 1)
    assert [entry[0] for entry in page.evaluate(style)] == ["", ""]  # the next pair starts whole


def test_the_server_restarts_in_mid_session(browser: Browser, tmp_path: Path) -> None:
    study = make_study(tmp_path, num_prompts=4, practice=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = browser.new_context(locale="en")
    context.set_default_timeout(60_000)
    with served(study.folder, port=port) as address:
        page = _start(context, address)
        page.wait_for_timeout(300)
    page.keyboard.press("ArrowLeft")  # nobody is there
    page.wait_for_function("document.querySelector('[data-part=notice]').textContent.startsWith('No connection')")
    with served(study.folder, port=port):
        page.wait_for_function("document.querySelector('[data-part=notice]').textContent === ''")
        _shown(page, 1)
        page.keyboard.press("ArrowRight")
        _shown(page, 2)
        assert [vote.choices["overall"] for vote in _votes(study, set(), 2)] == ["left", "right"]
    context.close()


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Study:
    criteria = ("overall", "alignment", "appeal")
    return make_study(tmp_path_factory.mktemp("criteria"), num_prompts=3, criteria=criteria, practice=1)


def test_several_questions_about_a_pair_are_one_vote(context: BrowserContext, questions: Study) -> None:
    with served(questions.folder, "--invited-only") as address:
        stranger = context.new_page()
        stranger.goto(address)
        stranger.wait_for_selector("[data-phase=refused]")
        assert "by invitation" in (stranger.text_content("[data-part=refusal]") or "")
        assert violations(stranger) == []

        from datetime import UTC, datetime, timedelta

        from user_study.links import make_link

        _, token = make_link(questions.key, datetime.now(UTC) + timedelta(hours=1))
        page = context.new_page()
        page.goto(f"{address}/r/{token}")
        page.click("[data-do=consent]")
        page.click("[data-do=begin]")

        def asked(number: int) -> None:
            page.wait_for_function(
                f"document.querySelector('[data-part=criterion]').textContent.includes('{number} of')"
            )
            page.wait_for_selector("button[data-choice=left]:enabled")

        def answer(*keys: str) -> None:
            for number, key in enumerate(keys, start=1):
                asked(number)
                page.keyboard.press(key)

        _shown(page)
        answer("ArrowLeft", "ArrowLeft", "ArrowLeft")
        page.click("[data-do=continue]")
        _shown(page, 0)
        answer("ArrowLeft", "ArrowRight")
        asked(3)
        page.keyboard.press("u")  # takes back the second answer only
        asked(2)
        page.keyboard.press("b")
        asked(3)
        page.keyboard.press(" ")
        _shown(page, 1)
        (vote,) = _votes(questions, set())
        assert dict(vote.choices) == {"overall": "left", "alignment": "both-bad", "appeal": "tie"}


def test_a_pause_is_told_and_ends_by_itself(context: BrowserContext, origin: str, study: Study) -> None:
    page = _start(context, origin)
    votes = study.open_votes()
    votes.set_paused(True)
    try:
        page.reload()
        page.wait_for_selector("[data-phase=paused]")
        assert violations(page) == []
    finally:
        votes.set_paused(False)
        votes.close()
    _shown(page, 0)


def test_the_admin_page_shows_the_figures(browser: Browser, origin: str, study: Study) -> None:
    context = browser.new_context(
        viewport={"width": 390, "height": 800}, http_credentials={"username": "admin", "password": PASSWORD}
    )
    page = context.new_page()
    troubles = Troubles(page, origin)
    page.goto(f"{origin}/admin/")
    page.wait_for_selector("#cards dd")
    main = sum(vote.kind == "main" for vote in _all_votes(study))
    assert (page.text_content("#cards dd") or "").startswith(str(main))
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator("#comparisons th").count() == 7
    page.check("#results")
    assert page.locator("#comparisons th").count() == 9
    assert violations(page) == []
    page.click("#pause")
    page.locator("#pause", has_text="Resume").wait_for()
    page.click("#pause")
    page.locator("#pause", has_text="Pause").wait_for()
    assert troubles.found == []
    context.close()


def _all_votes(study: Study) -> list[Any]:
    votes = study.open_votes()
    found = votes.votes()
    votes.close()
    return list(found)
