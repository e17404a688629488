"""Every word of the study, by language: what the page says, and the wording that a study starts from."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import yaml

LANGUAGES = ("en", "zh")


@cache
def catalogue() -> dict[str, dict[str, Any]]:
    """By language: ``page`` (key -> text) and ``wording`` (title, consent, instructions, questions by criterion)."""
    texts = {name: files("user_study.strings").joinpath(f"{name}.yaml") for name in LANGUAGES}
    return {name: yaml.safe_load(text.read_text(encoding="utf-8")) for name, text in texts.items()}
