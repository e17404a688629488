"""DPG-Bench (Hu et al. 2024, arXiv:2403.05135): 1,065 long prompts.

The owner's table has a row for each question about a prompt, and the owner's script leaves out the first row
(TencentQQGYLab/ELLA#61); the list here is every prompt, by its first row. Its categories are those of questions, so
the prompts have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hypersd_bench.download import OwnerFile
from hypersd_bench.prompt_sets.tables import Row, table
from hypersd_bench.prompts import PromptSource

_COMMIT = "3c228f1dc6c4d3cad0a47493816151a419f14db3"


def _parse(paths: Sequence[Path]) -> list[Row]:
    texts: dict[str, str] = {}
    for row in table(paths[0])[1]:
        texts.setdefault(row["item_id"] or "", row["text"] or "")
    return [(text, "") for text in texts.values()]


DPG = PromptSource(
    id="dpg",
    count=1_065,
    license="Apache-2.0",
    url="https://github.com/TencentQQGYLab/ELLA",
    parse=_parse,
    files=(
        OwnerFile(
            "dpg_bench.csv",
            f"https://raw.githubusercontent.com/TencentQQGYLab/ELLA/{_COMMIT}/dpg_bench/dpg_bench.csv",
            git_blob="98457fc9901943f51ff9a30367250fc292533bed",
        ),
    ),
    note="640 of them are longer than the 77 tokens that CLIP reads",
)
