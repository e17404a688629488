"""The list of faults that the tests must notice (``python -m tests.faults``) is about the code as it stands."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.faults.listed import ROOT, Fault, listed, with_fault


@pytest.mark.parametrize("fault", listed(), ids=lambda fault: fault.fault)
def test_the_place_of_a_fault_is_there_once(fault: Fault) -> None:
    code = (ROOT / fault.file).read_text()
    compile(with_fault(fault, code), fault.file, "exec")  # a fault that no import survives proves nothing
    for test in fault.tests:
        assert (ROOT / "tests" / f"{test}.py").exists(), test


def test_there_are_enough_of_them_in_every_part() -> None:
    parts = Counter(fault.file.partition("/")[0] for fault in listed())
    assert parts.total() >= 40
    assert min(parts[part] for part in ("distill", "metrics", "hypersd_bench", "user_study")) >= 9


def test_the_page_is_of_this_list() -> None:
    page = (ROOT / "docs" / "faults.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[1] for row in rows] == [fault.fault for fault in listed()]
    assert "**nobody**" not in page
