"""Both languages say the same things, with the same figures in them."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
from markupsafe import escape

import reports
from reports.strings import LANGUAGES, Said, catalogue, counted, joined, listed, say

BRACES = re.compile(r"{(\w+)}")


def test_the_languages_have_the_same_texts_with_the_same_figures() -> None:
    english, chinese = (catalogue(language) for language in LANGUAGES)
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        assert set(BRACES.findall(text)) == set(BRACES.findall(chinese[key])), key


def test_no_text_is_left_over() -> None:
    """Every text is asked for somewhere, by its name or by the part that a name is put together from."""
    folder = Path(reports.__file__).parent
    code = "".join(file.read_text() for kind in ("*.py", "*.j2", "*.js") for file in sorted(folder.rglob(kind)))
    for key in catalogue("en"):
        part, name = key.split(".", 1)
        whole = key in code or part in ("one", "many", "list", "script")
        assert whole or (f"{part}." in code and re.search(rf"\b{re.escape(name.rsplit('_', 1)[-1])}\b", code)), key


def test_a_text_is_english_and_knows_its_chinese() -> None:
    said = say("verdict.take", at=counted(1, "step"), who=listed(["a", "b"]), scope=say("verdict.one_metric"))
    assert said == "At 1 step, take a and b: it is the best on the one metric."
    assert said.zh == "1 步时选 a 和 b\uff1a它在唯一的指标上最好。"
    assert copy.deepcopy(said).zh == said.zh
    assert joined([said, said]).zh == said.zh * 2


@pytest.mark.parametrize("hostile", ["<b>x</b>", '"quoted"', "{at}", "%s"])
def test_what_is_put_in_stays_text(hostile: str) -> None:
    said = say("verdict.favours", metrics=hostile, winner="w")
    assert hostile in said
    assert hostile in said.zh
    assert str(escape(said)).count(str(escape(hostile))) == 2, "escaped, in both languages"


def test_a_text_without_another_language_is_not_doubled() -> None:
    assert str(escape(Said("n", "n"))) == "n"
