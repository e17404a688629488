"""The page of what the benchmarks measured: which figure is divided by which, and what is missing is said."""

from __future__ import annotations

from typing import Any

from benchmarks.page import render


def row(name: str, median: float, params: dict[str, str] | None = None, **found: Any) -> dict[str, Any]:
    stats = {"median": median, "rounds": 3}
    return {
        "name": name,
        "fullname": f"benchmarks/test_x.py::{name}",
        "params": params,
        "stats": stats,
        "extra_info": found,
    }


def page(*rows: dict[str, Any]) -> str:
    machine = {"cpu": {"brand_raw": "A CPU", "count": 2}, "machine": "x86_64", "python_version": "3.12.1"}
    return render({"machine_info": machine, "datetime": "2026-11-27T10:00:00", "benchmarks": list(rows)})


def test_others_are_divided_by_ours() -> None:
    said = page(row("test_ours[pocket-1]", 2.0), row("test_plain_diffusers_loop[pocket-1]", 9.0))
    assert "against diffusers' pipeline called prompt by prompt | 2 s | 9 s | **4.5** |" in said
    assert "A CPU, 2 cores, Python 3.12.1" in said


def test_the_script_is_compared_by_throughput() -> None:
    medians = {"peer": {"images_per_s": 50.0}, "cached": {"images_per_s": 80.0}}
    name = "test_lcm_lora_on_the_miniature[bf16]"
    found = {"medians": medians, "ratios": {"cached": {"throughput": 1.6}}}
    said = page(row(name, 5.0, {"precision": "bf16"}, **found))
    assert "bf16, cached, against diffusers' script | 80 images/s | 50 images/s | **1.60** |" in said
    assert "Left out here: SDXL's architecture (needs CUDA)." in said


def test_what_was_not_measured_is_said() -> None:
    said = page(row("test_read", 1.0, images=3))
    assert "Nothing was measured." in said  # beside others, and of tricks
    assert "training against diffusers' script (needs the script)" in said
    assert "| x: read | 1 | 3 | images 3 |" in said


def test_a_trick_has_a_row() -> None:
    found = {"speed-up": 1.31, "speed-up in CPU time": 1.3, "mib": 213.0, "mib_without": 205.0}
    assert "| plain attention | 1.31 | 1.30 | 213 | 205 |" in page(
        row("test_trick[x]", 1.0, {"trick": "plain attention"}, **found)
    )
