"""What a configuration costs: latency by stage, images per second, peak memory, cold start. A pass of its own.

Nothing else runs beside it in this process: no file is written, no metric computed. The models take turns in rounds,
every other one backwards, so that a machine that grows warm or busy slows all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from hypersd_bench.bench import Bench
from hypersd_bench.errors import is_out_of_memory
from hypersd_bench.machine import machine_state
from hypersd_bench.pipelines import (
    Pipeline,
    decode_latents,
    encode_empty,
    encode_prompts,
    sample_latents,
    with_unet,
)
from hypersd_bench.provenance import device_name
from hypersd_bench.runner.memory import Batches
from hypersd_bench.runner.plan import Configuration, Plan, by_pipeline
from hypersd_bench.runner.spec import Timing
from hypersd_bench.seeding import image_seed
from hypersd_bench.store import CostRow, RunStore, TimingRow, write_json

if TYPE_CHECKING:
    from hypersd_bench.runner.generate import Engine

LARGER = (4, 16, 64)  # batch sizes tried for throughput
GAIN = 1.03  # less than this much faster per image, and larger ones are not tried
LONGEST = {"cpu": 5.0, "cuda": 60.0}  # seconds; a batch that would take longer is not tried
Todo = Sequence[tuple[Configuration, int]]  # what to measure, and how many of its rounds are done
_CLEAR_PEAK = Path("/proc/self/clear_refs")


@dataclass
class Measured:
    """What was measured of one configuration in a round, and the state of the machine right after it.

    rounds: how many of the configuration's rounds are done with it.
    """

    of: str
    rounds: int
    timings: list[TimingRow] = field(default_factory=list)
    costs: list[CostRow] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)


def time_run(plan: Plan, store: RunStore, engine: Engine, again: bool = False) -> None:
    """Measure every configuration that has not been measured under these settings yet; or all of them ``again``."""
    timing = plan.spec.timing
    if timing is None:
        return
    settings = settings_of(timing, engine.device)
    known = store.manifest.get("timing") or {}
    # of other settings, or of another card, what is there can't stand beside it
    if again or known.get("settings") != settings:
        known = {"settings": settings, "rounds": {}, "machine": {}}
    todo = [(c, done) for c in plan.configurations if (done := known["rounds"].get(str(c), 0)) < timing.rounds]
    for c, done in todo:
        if not done:
            store.forget_timings(c.label, c.steps)
    with tqdm(total=sum(timing.rounds - done for _, done in todo), desc="cost", unit="round", disable=not todo) as bar:
        for measured in engine.timings(plan, todo):
            store.record_timings(measured.timings)
            store.record_costs(measured.costs)
            known["rounds"][measured.of] = measured.rounds
            known["machine"][measured.of] = measured.machine
            store.manifest["timing"] = known
            write_json(store.folder / "run.json", store.manifest)
            bar.set_postfix_str(measured.of)
            bar.update()


def settings_of(timing: Timing, device: str) -> dict[str, Any]:
    """What a measurement depends on: the spec's settings, and the device by its name."""
    return {**timing.model_dump(mode="json"), "device": device_name(device)}


def measure(plan: Plan, todo: Todo, device: str) -> Iterator[Measured]:
    """Measure configurations, in rounds; yields what there is to record as it comes."""
    timing = plan.spec.timing
    assert timing is not None
    bench, batches = Bench(device), Batches(plan.spec.batch_size, device)
    loads: dict[tuple[str, str], float] = {}
    done = {str(c): rounds for c, rounds in todo}
    ordered = by_pipeline([c for c, _ in todo])
    for number in range(timing.rounds):
        for configuration in ordered if number % 2 == 0 else reversed(ordered):
            if done[str(configuration)] <= number:
                yield _measure(plan, timing, bench, batches, loads, configuration, number)
    bench.clear()


def _measure(
    plan: Plan,
    timing: Timing,
    bench: Bench,
    batches: Batches,
    loads: dict[tuple[str, str], float],
    configuration: Configuration,
    number: int,
) -> Measured:
    """One configuration's share of the repeats, and in the first round its cold start, memory and throughput.

    loads: seconds that each pipeline took to load, the first time; its later models find it on the device.
    """
    clock = Clock(plan, configuration, str(bench.device))
    found, first = Measured(str(configuration), number + 1), number == 0
    key, started = (configuration.pipeline, configuration.dtype), time.perf_counter()
    bench.base(*key)
    loaded = time.perf_counter()
    load = loads.setdefault(key, loaded - started)
    pipe = bench.seat(configuration.model, configuration.pipeline, configuration.dtype)
    seated = time.perf_counter()
    if timing.compile:
        pipe = with_unet(pipe, torch.compile(pipe.unet))
    clock.run(pipe, timing.batch_size, 0)
    if first:
        cold = {"load": load, "seat": seated - loaded, "first-image": time.perf_counter() - seated}
        found.costs += [clock.cost(name, value, timing.batch_size, "s") for name, value in cold.items()]
    for i in range(timing.warmup):
        clock.run(pipe, timing.batch_size, i)
    with peak_memory(clock, timing.batch_size, found.costs if first else []):
        for repeat in range(number, timing.repeats, timing.rounds):  # this round's share
            found.timings += clock.run(pipe, timing.batch_size, repeat)
    found.machine = machine_state(clock.device)  # while it is warm
    if first and timing.throughput:
        _measure_throughput(clock, pipe, timing, batches, found)
    return found


def _measure_throughput(clock: Clock, pipe: Pipeline, timing: Timing, batches: Batches, found: Measured) -> None:
    """Try larger batches until they gain nothing, take long or do not fit; each is warmed up once and timed twice."""
    best = median(_seconds(found.timings)) / timing.batch_size
    found.costs.append(clock.cost("images-per-second", 1 / best, timing.batch_size))
    for size in (size for size in LARGER if timing.batch_size < size):
        if clock.on_cpu and size > batches.size(clock.configuration):
            return
        if best * size > LONGEST["cpu" if clock.on_cpu else "cuda"]:
            return
        try:
            with peak_memory(clock, size, found.costs):
                rows = [row for repeat in (-1, 0, 1) for row in clock.run(pipe, size, repeat)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            torch.cuda.empty_cache()
            return
        timed = [row for row in rows if row.repeat >= 0]
        found.timings += timed
        seconds = median(_seconds(timed)) / size
        found.costs.append(clock.cost("images-per-second", 1 / seconds, size))
        if best / seconds < GAIN:
            return
        best = seconds


class Clock:
    """Times one configuration's batches. On CUDA by events, so that the device is never waited for in between."""

    def __init__(self, plan: Plan, configuration: Configuration, device: str) -> None:
        self.plan = plan
        self.configuration = configuration
        self.device = device
        self.on_cpu = not device.startswith("cuda")

    def cost(self, name: str, value: float, batch_size: int, unit: str = "images/s") -> CostRow:
        """A row of the ledger."""
        return CostRow(self.configuration.label, self.configuration.steps, name, batch_size, value, unit, self.device)

    @torch.no_grad()
    def run(self, pipe: Pipeline, batch_size: int, repeat: int) -> list[TimingRow]:
        """Make a batch from its prompts to its pixels on the device; returns a row for each stage."""
        prompts = self.plan.prompts.prompts
        chosen = [prompts[(repeat * batch_size + i) % len(prompts)] for i in range(batch_size)]
        seeds = [image_seed(self.plan.spec.seed, prompt.id, 0) for prompt in chosen]
        contract, steps = self.configuration.model.contract, self.configuration.steps
        calls: list[Any] = []
        hooks = [
            pipe.unet.register_forward_pre_hook(lambda *_: calls.append(self._mark())),
            pipe.unet.register_forward_hook(lambda *_: calls.append(self._mark())),
        ]
        marks = [self._mark()]
        embeds = encode_prompts(pipe, [prompt.text for prompt in chosen])
        empty = encode_empty(pipe) if contract.guidance_scale > 1 else None
        marks.append(self._mark())
        latents = sample_latents(pipe, contract, steps, embeds, seeds, empty)
        marks.append(self._mark())
        decode_latents(pipe, latents)
        marks.append(self._mark())
        for hook in hooks:
            hook.remove()
        if not self.on_cpu:
            torch.cuda.synchronize(self.device)
        unet = [self._between(calls[i], calls[i + 1]) for i in range(0, len(calls), 2)]
        spans = {
            "text": self._between(marks[0], marks[1]),
            "unet": sum(unet) / len(unet),
            "denoise": self._between(marks[1], marks[2]),
            "decode": self._between(marks[2], marks[3]),
            "total": self._between(marks[0], marks[3]),
        }
        return [
            TimingRow(self.configuration.label, steps, stage, repeat, batch_size, seconds, self.device)
            for stage, seconds in spans.items()
        ]

    def _mark(self) -> Any:
        if self.on_cpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return float(end - start) if self.on_cpu else float(start.elapsed_time(end)) / 1000


def _seconds(rows: Sequence[TimingRow]) -> list[float]:
    return [row.seconds for row in rows if row.stage == "total"]


@contextmanager
def peak_memory(clock: Clock, batch_size: int, costs: list[CostRow]) -> Iterator[None]:
    """Record the most memory that the block took: of the device's tensors and its allocator, or of this process."""
    if clock.on_cpu:
        _reset_peak_rss()
        yield
        if (peak := _peak_rss()) is not None:
            costs.append(clock.cost("peak-memory", peak, batch_size, "bytes"))
        return
    torch.cuda.empty_cache()  # what larger batches left reserved is not this one's
    torch.cuda.reset_peak_memory_stats(clock.device)
    yield
    costs.append(clock.cost("peak-memory", torch.cuda.max_memory_allocated(clock.device), batch_size, "bytes"))
    costs.append(clock.cost("peak-reserved", torch.cuda.max_memory_reserved(clock.device), batch_size, "bytes"))


def _reset_peak_rss() -> None:
    """Have the kernel forget the process's peak (Linux: 5 to clear_refs, see proc(5)); elsewhere nothing happens."""
    if _CLEAR_PEAK.exists():
        try:
            _CLEAR_PEAK.write_text("5")
        except OSError:
            return


def _peak_rss() -> float | None:
    """The most memory that the process had resident, in bytes; None where the kernel does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peak = next((line for line in lines if line.startswith("VmHWM:")), None)
    return float(peak.split()[1]) * 1024 if peak else None
