"""PartiPrompts (Yu et al. 2022, arXiv:2206.10789): 1,632 prompts in 12 categories."""

from __future__ import annotations

from hypersd_bench.download import OwnerFile
from hypersd_bench.prompt_sets.tables import read_table
from hypersd_bench.prompts import PromptSource

_COMMIT = "5a657978134374ce28973948331b319adef164bd"

PARTI_PROMPTS = PromptSource(
    id="partiprompts",
    count=1_632,
    license="Apache-2.0",
    url="https://github.com/google-research/parti",
    parse=lambda paths: read_table(paths[0]),
    files=(
        OwnerFile(
            "PartiPrompts.tsv",
            f"https://raw.githubusercontent.com/google-research/parti/{_COMMIT}/PartiPrompts.tsv",
            "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb",
        ),
    ),
    prompts_sha256="46275a8595ca17ec01c128a658193e3980b16980cc4690259e848f0fa66748f6",
    note="12 categories",
)
