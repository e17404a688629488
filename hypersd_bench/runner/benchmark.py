"""A whole run: plan, bring the weights, generate, time, score. Started again, it goes on where it stopped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hypersd_bench.errors import InputError
from hypersd_bench.host import keep_freed_memory
from hypersd_bench.runner.generate import Engine, LocalEngine, generate
from hypersd_bench.runner.manifest import extended, manifest
from hypersd_bench.runner.plan import Plan, reference_of, require_device
from hypersd_bench.runner.score import score_run
from hypersd_bench.runner.timing import time_run
from hypersd_bench.runner.truncation import count_truncated
from hypersd_bench.runner.weights import bring
from hypersd_bench.store import RunStore, write_json


def run_benchmark(
    plan: Plan, out: Path, device: str, engine: Engine | None = None, time_again: bool = False
) -> tuple[RunStore, dict[str, str]]:
    """Run a plan into a run directory; returns it, and the metrics that could not be computed with the reason.

    device: where metrics are computed, and the images too where no engine says otherwise. time_again: whether what was
    measured of cost before is measured anew.
    """
    engine = engine or LocalEngine(device)
    require_device(plan, engine.device)
    keep_freed_memory()
    begun = RunStore.begun(out)
    if begun is None:
        RunStore.refuse(out)  # before weights are brought
    plan, pins = bring(plan, begun.manifest.get("pins") if begun else None)
    wanted: dict[str, Any] = manifest(plan, device, out) | {"pins": pins}
    wanted["prompts"]["truncated"] = count_truncated(plan)
    store = begun or RunStore.create(out, wanted)
    if begun:
        store.manifest = extended(begun, wanted, plan)
        write_json(out / "run.json", store.manifest)
    generate(plan, store, engine)
    if machines := engine.machines():
        known = store.manifest.get("workers", [])
        store.manifest["workers"] = known + [machine for machine in machines if machine not in known]
        write_json(out / "run.json", store.manifest)
    time_run(plan, store, engine, time_again)
    failed = score_run(store, [info.id for info in plan.metrics], device, reference_of(plan))
    return store, failed


def choose_device(name: str | None) -> str:
    """``cuda`` when there is one and no other was asked for; raises InputError for a device that is not here."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
            raise InputError(f"unknown device {name!r}; say cpu, cuda, or cuda:1") from error
        raise InputError(f"device {name!r} is not available here (see: hypersd-bench doctor); try cpu") from error
    return name
