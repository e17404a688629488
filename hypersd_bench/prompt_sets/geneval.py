"""GenEval (Ghosh et al. 2023, arXiv:2310.11513): 553 prompts in six tasks."""

from __future__ import annotations

from hypersd_bench.download import OwnerFile
from hypersd_bench.prompt_sets.tables import read_json_lines
from hypersd_bench.prompts import PromptSource

_COMMIT = "af4902f24d3ca90ebbb446dd9891a59e0f82725f"

GEN_EVAL = PromptSource(
    id="geneval",
    count=553,
    license="MIT",
    url="https://github.com/djghosh13/geneval",
    parse=lambda paths: read_json_lines(paths[0], category="tag"),
    files=(
        OwnerFile(
            "geneval/evaluation_metadata.jsonl",
            f"https://raw.githubusercontent.com/djghosh13/geneval/{_COMMIT}/prompts/evaluation_metadata.jsonl",
            "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
        ),
    ),
    prompts_sha256="7798ffb345a635c7aa9d348c27d2dff97137005a1c3bd560580c5e838393f49b",
    note="6 tasks; the prompts only, not GenEval's detector score",
)
