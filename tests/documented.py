"""The code blocks of README, CONTRIBUTING and docs, and the commands of the program in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import hypersd_bench

ROOT = Path(hypersd_bench.__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> Iterator[tuple[Path, str]]:
    """The code blocks of all pages in a language; empty: commands and what they print."""
    for page in PAGES:
        for found, text in BLOCK.findall(page.read_text()):
            if found == language:
                yield page, text


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command of the program in a block, with its words; what follows a hash is a remark."""
    for page, text in blocks(""):
        for line in re.sub(r"\\\n\s*", "", text).splitlines():
            if line.startswith("hypersd-bench "):
                yield f"{page.name}: {line}", shlex.split(line, comments=True)[1:]
