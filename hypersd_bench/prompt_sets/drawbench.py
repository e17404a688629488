"""DrawBench (Saharia et al. 2022, arXiv:2205.11487): 200 prompts in 11 categories, in the authors' sheet."""

from __future__ import annotations

from hypersd_bench.download import OwnerFile
from hypersd_bench.prompt_sets.tables import read_table
from hypersd_bench.prompts import PromptSource

_SHEET = "https://docs.google.com/spreadsheets/d/1y7nAbmR4FREi6npB1u-Bo3GFdwdOPYJc617rBOxIRHY"

DRAW_BENCH = PromptSource(
    id="drawbench",
    count=200,
    license="none stated",
    url="https://imagen.research.google",
    parse=lambda paths: read_table(paths[0], text=("prompts", "prompt")),
    files=(OwnerFile("drawbench.csv", f"{_SHEET}/gviz/tq?tqx=out:csv"),),
    note="11 categories; the owner's sheet is live, so no hash is pinned: a run records the one it got",
)
