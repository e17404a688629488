"""What a report says, in every language it speaks: ``say("verdict.take", at=..., who=...)``.

The texts are in ``en.yaml`` and ``zh.yaml``, with the same keys and the same names in braces. A page carries both
languages and shows one; what is not a page (Markdown, LaTeX, JSON) is English.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from importlib.resources import files
from typing import Self

import yaml
from markupsafe import Markup, escape

LANGUAGES = ("en", "zh")


class Said(str):
    """A text that is English as a ``str``, and knows its Chinese; on a page it is both, of which one is hidden."""

    zh: str

    def __new__(cls, en: str, zh: str) -> Self:
        """Make it of both."""
        said = super().__new__(cls, en)
        said.zh = zh
        return said

    def __reduce__(self) -> tuple[type[Said], tuple[str, str]]:
        """What makes it again: the data of a report are copied."""
        return type(self), (str(self), self.zh)

    def __html__(self) -> Markup:
        if self.zh == str(self):
            return escape(str(self))
        return Markup('<span lang="en">{}</span><span lang="zh">{}</span>').format(str(self), self.zh)


def say(key: str, **values: object) -> Said:
    """The text of this key with its values put in, each in the language of the text."""
    return _both(lambda language: catalogue(language)[key].format(**_spoken(values, language)))


def counted(count: int, noun: str) -> Said:
    """A count with its noun: ``1 image``, ``1,024 images``."""
    return _both(lambda language: f"{count:,} {catalogue(language)[_noun(noun, count)]}")


def listed(names: Iterable[str], conjunction: str = "and") -> Said:
    """A list in words: ``a``, ``a and b``, ``a, b and c``."""
    *head, last = names

    def words(language: str) -> str:
        parts = [_in(name, language) for name in head]
        texts = catalogue(language)
        joined = texts["list.comma"].join(parts)
        return f"{joined}{texts[f'list.{conjunction}']}{_in(last, language)}" if parts else _in(last, language)

    return _both(words)


def joined(sentences: Iterable[str]) -> Said:
    """Sentences behind each other."""
    parts = list(sentences)
    return Said(" ".join(parts), "".join(_in(part, "zh") for part in parts))


def semicolons(parts: Iterable[Said]) -> Said:
    """Parts of a sentence behind each other."""
    known = list(parts)
    return Said("; ".join(known), "\uff1b".join(part.zh for part in known))


@cache
def catalogue(language: str) -> dict[str, str]:
    """All texts of a language by key."""
    text = files("reports.strings").joinpath(f"{language}.yaml").read_text(encoding="utf-8")
    nested: dict[str, dict[str, str]] = yaml.safe_load(text)
    return {f"{part}.{key}": value for part, texts in nested.items() for key, value in texts.items()}


def _both(text: Callable[[str], str]) -> Said:
    return Said(text("en"), text("zh"))


def _noun(noun: str, count: int) -> str:
    return f"one.{noun}" if count == 1 else f"many.{noun}"


def _spoken(values: dict[str, object], language: str) -> dict[str, object]:
    return {name: _in(value, language) if isinstance(value, str) else value for name, value in values.items()}


def _in(text: str, language: str) -> str:
    return text.zh if isinstance(text, Said) and language == "zh" else str(text)
