"""Latency: text encoding, denoising and decoding timed apart, after warm-up, with the device synchronised."""

from __future__ import annotations

import time

import torch
from tqdm import tqdm

from hypersd_bench.pipelines import (
    Pipeline,
    decode_latents,
    encode_empty,
    encode_prompts,
    load_base,
    sample_latents,
    with_model,
)
from hypersd_bench.runner.plan import Configuration, Plan
from hypersd_bench.seeding import image_seed
from hypersd_bench.store import RunStore, TimingRow


def time_run(plan: Plan, store: RunStore, device: str) -> None:
    """Time every configuration that has no timings of this batch size yet."""
    timing = plan.spec.timing
    if timing is None:
        return
    have = {(row.model, row.steps) for row in store.timings() if row.batch_size == timing.batch_size}
    todo = [c for c in plan.configurations if (c.label, c.steps) not in have]
    if not todo:
        return
    base = load_base(plan.spec.base, device)
    for configuration in tqdm(todo, desc="latency", unit="configuration"):
        pipe = with_model(base, configuration.model)
        rows: list[TimingRow] = []
        for repeat in range(-timing.warmup, timing.repeats):
            timed = _time_once(pipe, plan, configuration, repeat, device)
            rows += timed if repeat >= 0 else []
        store.record_timings(rows)


def _time_once(pipe: Pipeline, plan: Plan, configuration: Configuration, repeat: int, device: str) -> list[TimingRow]:
    assert plan.spec.timing is not None
    batch_size = plan.spec.timing.batch_size
    prompts = [plan.prompts.prompts[(repeat + i) % len(plan.prompts.prompts)] for i in range(batch_size)]
    seeds = [image_seed(plan.spec.seed, prompt.id, 0) for prompt in prompts]
    contract = configuration.model.contract
    marks = [_now(device)]
    with torch.no_grad():
        embeds = encode_prompts(pipe, [prompt.text for prompt in prompts])
        empty = encode_empty(pipe) if contract.guidance_scale > 1 else None
        marks.append(_now(device))
        latents = sample_latents(pipe, contract, configuration.steps, embeds, seeds, empty)
        marks.append(_now(device))
        decode_latents(pipe, latents)
        marks.append(_now(device))
    spans = {
        "text": marks[1] - marks[0],
        "denoise": marks[2] - marks[1],
        "decode": marks[3] - marks[2],
        "total": marks[3] - marks[0],
    }
    return [TimingRow(configuration.label, configuration.steps, stage, repeat, batch_size, seconds, device)
            for stage, seconds in spans.items()]  # fmt: skip


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()
