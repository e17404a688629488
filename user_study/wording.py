"""The words of a study: those that come along, or the researcher's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hypersd_bench.errors import InputError, first_line, unknown_name
from user_study.design import CRITERIA
from user_study.strings import catalogue

PARTS = ("title", "consent", "instructions", "questions")


def load_wording(path: Path | None, criteria: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By language: title, consent and instructions (paragraphs), and the question of each criterion.

    path: a YAML file ``{en: {title: ..., consent: [...], instructions: [...], questions: {overall: ...}}, zh: ...}``;
    what it leaves out comes from the catalogue, languages it leaves out are not offered. Raises InputError for a file
    of another shape.
    """
    known = {language: words["wording"] for language, words in catalogue().items()}
    own = {language: {} for language in known} if path is None else _read(path)
    wording = {}
    for language, words in own.items():
        if language not in known:
            raise unknown_name("language", str(language), known, str(path))
        merged = {**known[language], **words}
        questions = {**known[language]["questions"], **merged["questions"]}
        wording[language] = {**merged, "questions": {criterion: questions[criterion] for criterion in criteria}}
    return wording


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no YAML: {first_line(error)}") from error
    if not isinstance(raw, dict) or not raw or not all(isinstance(words, dict) for words in raw.values()):
        raise InputError(f"{path}: write a language and its words, as en: {{title: My study}}")
    for language, words in raw.items():
        for part, value in words.items():
            _check(path, language, part, value)
    return raw


def _check(path: Path, language: Any, part: Any, value: Any) -> None:
    if part not in PARTS:
        raise unknown_name("part", str(part), PARTS, f"{path}, {language}")
    texts = [value] if part == "title" else list(value.values()) if isinstance(value, dict) else value
    if isinstance(value, dict):
        for criterion in value:
            if criterion not in CRITERIA:
                raise unknown_name("criterion", str(criterion), CRITERIA, f"{path}, {language}.questions")
    if isinstance(value, dict) != (part == "questions") or isinstance(texts, str):
        kind = "criteria with their questions" if part == "questions" else "a list of paragraphs"
        raise InputError(f"{path}: {language}.{part} must be {kind}")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"{path}: {language}.{part} holds something that is no text, or nothing")
