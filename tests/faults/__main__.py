"""Make each fault of ``faults.yaml`` in a copy of the tree, run the tests named, and write what they noticed.

``python -m tests.faults`` writes ``docs/faults.md``; with words, only faults whose file or description holds one of
them are tried, and nothing is written. Exits 1 when a fault survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tqdm import tqdm

from tests.faults.listed import ROOT, Fault, listed, with_fault

COPIES = os.cpu_count() or 1
COPIED = ("hypersd_bench", "metrics", "distill", "user_study", "reports", "tests", "docs", "specs", "benchmarks")
PAGE = """# Faults that the tests notice

Tests are worth what they notice. Each row is a small fault (a sign, a bound, a swapped argument, a dropped `detach`, a
wrong side) that is made on purpose in a copy of the code; then the tests named are run. `python -m tests.faults` does
it again and writes this page; `tests/unit/test_faults.py` sees that each place is still there.

{caught} of {total} are noticed.

| file | fault | noticed by |
|---|---|---|
{rows}
"""


def main(words: Sequence[str]) -> int:
    """Try the faults, all or those that ``words`` choose; returns the exit code."""
    chosen = [fault for fault in listed() if not words or any(word in f"{fault.file} {fault.fault}" for word in words)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(COPIES) as threads:
        copies: SimpleQueue[Path] = SimpleQueue()
        for copy in _copies(Path(folder)):
            copies.put(copy)
        noticed = list(tqdm(threads.map(lambda fault: _noticed_by(fault, copies), chosen), total=len(chosen)))
    for fault, test in zip(chosen, noticed, strict=True):
        print(f"{'noticed ' if test else 'SURVIVED'} {fault.file}: {fault.fault} {test and f'({test})'}")
    if not words:
        (ROOT / "docs" / "faults.md").write_text(_page(chosen, noticed))
    return 0 if all(noticed) else 1


def _copies(folder: Path) -> Iterator[Path]:
    """Copies of the tree to make faults in."""
    for number in range(COPIES):
        copy = folder / str(number)
        for name in COPIED:
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
            shutil.copy(ROOT / name, copy / name)
        yield copy


def _noticed_by(fault: Fault, copies: SimpleQueue[Path]) -> str:
    """The first test that fails with the fault; empty where none does."""
    copy = copies.get()
    file = copy / fault.file
    sound = file.read_text()
    try:
        file.write_text(with_fault(fault, sound))
        return _first_failure(copy, [f"tests/{name}.py" for name in fault.tests])
    finally:
        file.write_text(sound)
        copies.put(copy)


def _first_failure(copy: Path, tests: Sequence[str]) -> str:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    failed = next((line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), None)
    if failed is None or done.returncode != 1:
        raise SystemExit(f"pytest did not run {tests}:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return failed.split()[1].rpartition("/")[2].partition("[")[0]


def _page(faults: Sequence[Fault], noticed: Sequence[str]) -> str:
    rows = [
        f"| `{fault.file}` | {fault.fault} | {f'`{test}`' if test else '**nobody**'} |"
        for fault, test in zip(faults, noticed, strict=True)
    ]
    return PAGE.format(caught=sum(map(bool, noticed)), total=len(faults), rows="\n".join(rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
