"""The report in a real browser: it sorts, filters, enlarges, proves its numbers, speaks two languages and prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hypersd_bench.store import RunStore, write_json
from reports.strings import catalogue
from tests.browser import CHROMIUM, Troubles, violations
from tests.report_pages import write_report, write_single_file
from tests.simulated_raters import Tastes, simulate
from tests.synthetic_run import CLIP
from tests.tiny_study import make_study
from user_study.analysis import analyse

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found; install it with: apt-get install chromium"),
]
MODELS = ("one", "two", "three")
TASTES = Tastes({"one@4": 1.5, "two@4": 0.5, "three@4": 0.0})
OPEN_ALL = "document.querySelectorAll('details').forEach((one) => { one.open = true; })"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it: a study, contrasts, published numbers, several noises, training curves."""
    folder = tmp_path_factory.mktemp("report")
    study = make_study(folder, MODELS, (4,), 14)
    found = analyse(study.design, *simulate(study.design, TASTES, 12), study.run())
    write_json(study.folder / "analysis.json", found.to_json())
    _furnish(study.run())
    return write_report(study.run().folder, folder / "report", study.folder)


def _furnish(run: RunStore) -> None:
    manifest = run.manifest
    log = [{"stage": stage, "images_seen": 64 * (i + 1), "loss": 1 / (i + 1)} for stage in "84" for i in range(5)]
    (run.folder / "train").mkdir()
    (run.folder / "train" / "train.jsonl").write_text("\n".join(map(json.dumps, log)))
    manifest["contrasts"] = [{"name": "without feedback", "model": "two", "against": "one", "steps": [4]}]
    manifest["models"][0] |= {
        "training": "train",
        "trained_on": [CLIP.id],
        "published": [{"source": "A paper, Table 2", "protocol": "other prompts", "steps": 4,
                       "values": {"CLIP": 31.8}}],
        "checkpoints": {"4": {"file": "one.safetensors", "sha256": "1" * 64, "kind": "lora",
                              "card": {"method": "hyper-sd", "rank": 8, "seed": 0, "images_seen": 640}}},
    }  # fmt: skip
    write_json(run.folder / "run.json", manifest)


@pytest.fixture
def page(context: BrowserContext, report: Path) -> Page:
    opened = context.new_page()
    opened.goto(report.as_uri())
    return opened


def _models(page: Page) -> list[str]:
    return [text.strip() for text in page.locator("#results .scroll >> nth=0 >> tbody th").all_inner_texts()]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_no_complaint_no_request_no_barrier(browser: Browser, report: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 860}, color_scheme=scheme, locale="en")  # type: ignore[arg-type]
    page = context.new_page()
    troubles = Troubles(page, report.parent.as_uri())
    page.goto(report.as_uri())
    page.evaluate(OPEN_ALL)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "only tables scroll sideways"
    assert violations(page) == []
    page.click("#language")
    page.locator("#images .photo").first.click()
    assert violations(page) == []
    assert troubles.found == []
    context.close()


def test_a_heading_sorts_and_turns_round(page: Page) -> None:
    column = page.locator("#results thead button", has_text=CLIP.label)
    column.click()
    ascending = [float(text) for text in page.locator("#results tbody td:nth-child(4) .value").all_inner_texts()]
    assert ascending == sorted(ascending)
    assert _models(page)[0] == "three", "the worst by construction"
    column.click()
    assert _models(page)[0] == "one"
    assert page.locator("#results thead th[aria-sort=descending]").count() == 1


def test_headings_stay_while_rows_go_by(page: Page) -> None:
    page.set_viewport_size({"width": 1280, "height": 160})
    table = page.locator("#results .scroll").first
    table.evaluate("box => { box.scrollTop = box.scrollHeight; }")
    assert table.evaluate("box => box.scrollTop") > 0
    tops = table.evaluate("box => [box, box.querySelector('th')].map((one) => one.getBoundingClientRect().top)")
    assert abs(tops[1] - tops[0]) < 2


def test_prompts_are_filtered_and_the_address_keeps_it(page: Page) -> None:
    page.fill("#filter", "number 11")
    shown = page.locator("#images .card[data-id]:not([hidden])")
    assert shown.count() == 1
    assert page.inner_text("#shown") == "1 of 14 prompts"
    page.reload()
    assert shown.count() == 1
    page.fill("#filter", "nothing like it")
    assert shown.count() == 0
    page.fill("#filter", "")
    page.select_option("#order", "0")
    apart = [float(card.get_attribute("data-apart0") or 0) for card in page.locator("#cards .card").all()]
    assert apart == sorted(apart, reverse=True), "those where models differ most come first"


def test_every_number_leads_to_its_pictures(page: Page) -> None:
    page.locator("#results tbody tr", has_text="two").locator("a.value").first.click()
    scores = [float(text) for text in page.locator("#evidence .card p:nth-of-type(1)").all_inner_texts()]
    assert len(scores) == 14
    assert scores == sorted(scores)
    page.reload()
    assert page.locator("#evidence .photo").count() == 14, "the address leads there too"
    page.locator("#differences tbody a.value").first.click()
    assert page.locator("#evidence .photo").count() == 28, "a difference has two"
    page.locator("#results tbody tr", has_text="two").locator("a.value").last.click()
    assert page.locator("#evidence .photo").count() == 14, "of a set's number, all of the configuration"


def test_pictures_are_enlarged_and_compared(page: Page) -> None:
    page.locator("#images .photo").first.click()
    dialog = page.locator("#large")
    assert dialog.is_visible()
    assert "one" in dialog.locator("figcaption").first.inner_text()
    page.keyboard.press("ArrowRight")
    assert "two" in dialog.locator("figcaption").first.inner_text()
    page.keyboard.press("2")
    assert dialog.locator(".pane:visible").count() == 2
    page.keyboard.press("+")
    moved = [image.evaluate("image => image.style.transform") for image in dialog.locator(".glass img").all()]
    assert moved == ["translate(0px, 0px) scale(1.25)"] * 2, "zoom is shared"
    page.keyboard.press("3")
    page.wait_for_selector("#large.swapped")
    page.keyboard.press("4")
    assert dialog.locator("#split").is_visible()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


def test_published_numbers_ablations_and_other_noise_have_their_places(page: Page) -> None:
    page.evaluate(OPEN_ALL)
    published = page.locator("#results details tbody tr")
    assert published.count() == 1
    for said in ("A paper, Table 2", "CLIP 31.8", "another protocol: other prompts"):
        assert said in published.inner_text()
    assert "31.8" not in page.locator("#results .scroll").first.inner_text(), "never among ours"
    assert "without feedback" in page.inner_text("#contrasts")
    assert page.locator("#contrasts a.value").first.get_attribute("data-against") == "one@4"
    assert page.locator("#people .matrix tbody tr").count() == 3
    assert "hyper-sd" in page.inner_text("#training tbody tr")


def test_it_speaks_chinese_all_over(page: Page) -> None:
    page.evaluate(OPEN_ALL)
    english = page.inner_text("main")
    page.click("#language")
    chinese = page.inner_text("main")
    sentences = {line for line in english.splitlines() if re.search(r"[a-z]+ [a-z]+ [a-z]+ [a-z]+", line)}
    untranslated = {line for line in sentences if line in chinese.splitlines()}
    ours = [text for text in catalogue("en").values() if len(text) > 12 and "{" not in text]
    assert not [line for line in untranslated if any(text in line for text in ours)]
    assert page.get_attribute("#filter", "placeholder") == catalogue("zh")["page.filter_hint"]
    assert page.locator("#order option").first.inner_text() == catalogue("zh")["page.by_prompt"]
    assert page.locator("#curves svg text", has_text="步数").first.is_visible(), "in the drawings too"
    page.reload()
    assert page.locator("h2").first.inner_text() == catalogue("zh")["page.verdict"], "the address keeps it"
    page.click("#language")
    assert page.inner_text("#verdict h2") == "Verdict"


def test_a_chinese_browser_gets_chinese(browser: Browser, report: Path) -> None:
    context = browser.new_context(locale="zh-CN")
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.inner_text("#verdict h2") == catalogue("zh")["page.verdict"]
    context.close()


def test_tables_are_copied(page: Page, report: Path) -> None:
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.locator("#results .copy", has_text="LaTeX").click()
    page.wait_for_function("window.copied")
    assert page.evaluate("window.copied") == (report.parent / "tables" / "results.tex").read_text()


def test_it_prints(page: Page) -> None:
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    assert not page.locator("#filter").is_visible()
    assert page.locator("#results table").first.is_visible()
    assert page.pdf().startswith(b"%PDF")


def test_one_file_does_the_same(context: BrowserContext, report: Path, tmp_path: Path) -> None:
    run = report.parent.parent / "run"
    page = context.new_page()
    file = write_single_file(run, tmp_path / "report.html")
    troubles = Troubles(page, file.as_uri())
    page.goto(file.as_uri())
    page.fill("#filter", "number 3")
    page.locator("#images .photo:visible").first.click()
    assert page.locator("#large").is_visible()
    assert page.locator("#large img").first.evaluate("image => image.naturalWidth") == 64
    assert troubles.found == []
