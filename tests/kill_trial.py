"""Kill a benchmark run at random moments, and let it go on: ``kill_trial.py BASE FOLDER MOMENTS`` prints the trials.

Everything is imported once; each start is a fork of this process, which itself never computes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import sys
import time
from pathlib import Path

from hypersd_bench import registry
from hypersd_bench.runner.benchmark import run_benchmark
from hypersd_bench.runner.plan import make_plan
from hypersd_bench.runner.spec import load_spec

LONGEST_S = 0.2  # from an image to the kill: some batches, or the scoring that follows the last


def start(base: Path, folder: Path, out: Path) -> int:
    """Fork a process that runs the benchmark into ``out``; returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        spec = load_spec(None, {
            "base": str(base), "models": ["teacher"], "steps": [1, 2, 3], "prompts": "prompts.txt", "replicates": 2,
            "metrics": ["toy/brightness", "toy/spread", "toy/colour"], "batch_size": 2, "force": True,
        })  # fmt: skip
        run_benchmark(make_plan(spec.model_copy(update={"timing": None}), folder), out, "cpu")
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)


def images(run: Path) -> int:
    """How many images a ledger has; 0 where there is none yet."""
    if not (run / "run.json").exists():
        return 0  # the ledger may be half-made
    with sqlite3.connect(run / "ledger.sqlite") as db:
        count: int = db.execute("SELECT COUNT(*) FROM image").fetchone()[0]
    db.close()
    return count


def trial(base: Path, folder: Path, run: Path, count: int, more_s: float) -> dict[str, object]:
    """Kill a run some time after it has so many images, look at what it left, and let it go on to its end."""
    child = start(base, folder, run)
    while images(run) < count and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.001)
    time.sleep(more_s)
    os.kill(child, signal.SIGKILL)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = images(run)
    if os.waitpid(start(base, folder, run), 0)[1]:
        raise SystemExit(f"{run} could not go on after a kill {more_s} s after {count} images")
    return {"run": str(run), "count": count, "more_s": more_s, "killed": killed, "images": left}


def main(base: Path, folder: Path, moments: int) -> None:
    """One undisturbed run, then the trials, at moments spread over its images: before the first to after the last."""
    for name in ("brightness", "spread", "colour"):
        registry.METRICS[f"toy/{name}"] = f"tests.toy_metric:{name.upper()}"
    (folder / "prompts.txt").write_text("a fox\na car\na pizza left of a tree\na tree\na whale and a fox\n")
    if os.waitpid(start(base, folder, folder / "whole"), 0)[1]:
        raise SystemExit("the undisturbed run failed")
    whole = images(folder / "whole")
    rng = random.Random(0)
    print(json.dumps([trial(base, folder, folder / f"trial-{i}", i * whole // moments, rng.uniform(0, LONGEST_S))
                      for i in range(moments)]))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
