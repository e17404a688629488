"""One page of what the benchmarks measured, ratios first: ``python -m benchmarks.page MEASURED.json PAGE.md``.

MEASURED.json is what ``pytest benchmarks --benchmark-only --benchmark-json MEASURED.json`` leaves; ``make bench`` does
both. What both sides of a ratio took comes from one run on one machine; rates alone are this machine's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]  # a benchmark, as pytest-benchmark writes it
PAGE = """# Speed

Written by `make bench` on {date}: {cpu}, {cores} cores, Python {python}. Both sides of a ratio took turns or followed
each other in one run, so ratios mean something elsewhere; seconds and rates are this machine's. What is compared and
why is in [speed](../speed.md), and in the docstring of each file of `benchmarks/`.

## Beside others

{ratios}

Left out here: {left_out}.

## Each trick of the training loop

LCM's step with the trick against the same without it, in turn; above 1, the trick pays.

{tricks}

## On its own

{alone}
"""
# What is divided: a benchmark of ours, and the other's in the same file.
PAIRS = {
    "generation, 1 step, against diffusers' pipeline called prompt by prompt": (
        "test_ours[pocket-1]", "test_plain_diffusers_loop[pocket-1]",
    ),
    "generation, 8 steps, against the same": ("test_ours[pocket-8]", "test_plain_diffusers_loop[pocket-8]"),
    "generation on SDXL's architecture, 1 step, against the same": (
        "test_ours[sdxl-1]", "test_plain_diffusers_loop[sdxl-1]",
    ),
    "generation on SDXL's architecture, 8 steps": ("test_ours[sdxl-8]", "test_plain_diffusers_loop[sdxl-8]"),
    "Fréchet distance, against scipy's sqrtm": ("test_symmetric", "test_scipy_sqrtm"),
}  # fmt: skip
PEER = "training the LoRA of LCM, {precision}, {way}, against diffusers' script"
NEEDED: dict[str, Callable[[Mapping[str, Row]], bool]] = {
    "SDXL's architecture (needs CUDA)": lambda rows: "test_ours[sdxl-1]" not in rows,
    "training against diffusers' script (needs the script)": lambda rows: not any("test_lcm_lora" in n for n in rows),
}  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Write the page."""
    measured, page = map(Path, arguments)
    page.write_text(render(json.loads(measured.read_text())))


def render(measured: Mapping[str, Any]) -> str:
    """The page of a file of measurements."""
    rows: dict[str, Row] = {row["name"]: row for row in measured["benchmarks"]}
    machine = measured["machine_info"]
    return PAGE.format(
        date=measured["datetime"][:10],
        cpu=machine["cpu"].get("brand_raw", machine["machine"]),
        cores=machine["cpu"].get("count", "?"),
        python=machine["python_version"],
        ratios=_table(("", "ours", "the other", "times as fast"), _ratios(rows)),
        left_out=", ".join(name for name, is_missing in NEEDED.items() if is_missing(rows)) or "nothing",
        tricks=_table(("trick", "by the clock", "in CPU time", "MiB with", "MiB without"), _tricks(rows)),
        alone=_table(("", "median, s", "rounds", ""), _alone(rows)),
    )


def _ratios(rows: Mapping[str, Row]) -> Iterator[Sequence[str]]:
    for what, (ours, other) in PAIRS.items():
        if ours in rows and other in rows:
            a, b = (rows[name]["stats"]["median"] for name in (ours, other))
            yield what, f"{a:.3g} s", f"{b:.3g} s", f"**{b / a:.1f}**"
    for name, row in rows.items():
        if name.startswith("test_lcm_lora_on_the_miniature"):
            medians = row["extra_info"]["medians"]
            for way, ratios in row["extra_info"]["ratios"].items():
                what = PEER.format(precision=row["params"]["precision"], way=way)
                rates = [f"{medians[runner]['images_per_s']:.3g} images/s" for runner in (way, "peer")]
                yield what, *rates, f"**{ratios['throughput']:.2f}**"


def _tricks(rows: Mapping[str, Row]) -> Iterator[Sequence[str]]:
    for row in rows.values():
        if "speed-up" in row["extra_info"]:
            found = row["extra_info"]
            yield (
                row["params"]["trick"], f"{found['speed-up']:.2f}", f"{found['speed-up in CPU time']:.2f}",
                f"{found['mib']:.0f}", f"{found['mib_without']:.0f}",
            )  # fmt: skip


def _alone(rows: Mapping[str, Row]) -> Iterator[Sequence[str]]:
    paired = {name for pair in PAIRS.values() for name in pair}
    for name, row in rows.items():
        shown = {key: value for key, value in row["extra_info"].items() if isinstance(value, int | float | str | list)}
        if "speed-up" in shown or name in paired - {"test_ours[pocket-1]", "test_ours[pocket-8]"}:
            continue
        file = row["fullname"].partition("::")[0].rpartition("/")[2].removesuffix(".py").removeprefix("test_")
        said = ", ".join(f"{key} {_number(value)}" for key, value in shown.items())
        words = f"{file}: {name.removeprefix('test_').replace('_', ' ')}"
        yield words, f"{row['stats']['median']:.3g}", str(row["stats"]["rounds"]), said


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(heads: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(lines) if len(lines) > 2 else "Nothing was measured."


if __name__ == "__main__":
    main(sys.argv[1:])
