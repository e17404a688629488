"""The plan of a distillation: counts against published figures, FLOPs and memory against what really happens."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.utils.flop_counter import FlopCounterMode

from distill.architectures import find_architecture
from distill.batch import Batch, Condition
from distill.methods.hyper_sd import HyperSD
from distill.methods.lcm import LCM
from distill.planning import ERROR_ON_MINIATURE, GIB, Device, _Bench, make_plan, render
from distill.presets import PRESETS, Preset
from distill.roles import Roles
from distill.schedule import NoiseSchedule
from distill.stages import Stage
from hypersd_bench.errors import InputError

TINY = PRESETS["tiny"]


@pytest.mark.parametrize(("base", "unet", "lora", "vae"), [("sdxl", 2567.5, 197, 83.7), ("sd15", 859.5, 67.5, 83.7)])
def test_parameters_are_the_published_ones(base: str, unet: float, lora: float, vae: float) -> None:
    # 2307.01952 table 1 (2.6 B, text 817 M), the model cards, and LCM-LoRA 2311.05556 (197 M and 67.5 M at rank 64)
    bench = _Bench(find_architecture(base), PRESETS["sdxl-24gb"], LCM().stages(PRESETS["sdxl-24gb"]), "cuda")
    millions = {name: count / 1e6 for name, count in bench.parameters().items()}
    assert millions["unet"] == pytest.approx(unet, abs=0.1)
    assert millions["student"] == pytest.approx(lora, rel=0.005)
    assert millions["autoencoder"] == pytest.approx(vae, abs=0.1)
    assert millions["text encoders"] == pytest.approx(817.7 if base == "sdxl" else 123.1, abs=0.1)


def _stage(preset: Preset) -> Stage:
    return next(stage for stage in HyperSD().stages(preset) if stage.opponents and not stage.rewards)  # TSCD, k = 2


def _really(preset: Preset) -> tuple[Stage, Roles, Batch]:
    """The stage's cast and batch with data, gradients already there, as from the second micro-batch on."""
    parts = find_architecture("pocket").parts
    unet = UNet2DConditionModel.from_config(dict(parts["unet"]))
    unet.set_attn_processor(AttnProcessor())
    roles = Roles(unet, NoiseSchedule.from_config(parts["scheduler"], set_alpha_to_one=True), preset.rank)
    if preset.gradient_checkpointing:
        roles.enable_checkpointing()
    stage = _stage(preset)
    make = stage.opponents[0].make
    assert make is not None
    roles.discriminator = make(roles)
    for parameter in (*roles.parameters("student"), *roles.discriminator.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    size = preset.batch_size
    batch = Batch(
        z0=torch.randn(size, 16, 8, 8), cond=Condition(torch.randn(size, 16, 128)),
        uncond=Condition(torch.randn(1, 16, 128)), prompts=[""] * size, ids=[""] * size, latent_shape=(16, 8, 8),
    )  # fmt: skip
    return stage, roles, batch


def _train(stage: Stage, roles: Roles, batch: Any) -> None:
    losses = stage.losses(batch, roles, torch.Generator().manual_seed(0))
    assert losses.student is not None
    for loss in (losses.student, *losses.opponents.values()):
        loss.backward()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_and_peak_are_the_real_ones(checkpointing: bool) -> None:
    preset = replace(TINY, batch_size=8, images=128, gradient_checkpointing=checkpointing)
    stage, roles, batch = _really(preset)
    with FlopCounterMode(display=False) as counter:
        _train(stage, roles, batch)
    with torch.profiler.profile(profile_memory=True) as profile:
        _train(stage, roles, batch)
    peak = _peak(profile)
    bench = _Bench(find_architecture("pocket"), preset, HyperSD().stages(preset), "cpu")
    bench.rules.half = None  # also where this CPU would have autocast
    planned = bench.plan(stage, Device("cpu", "cpu", None, None))
    print(f"checkpointing {checkpointing}: {peak} measured, {planned.memory.activations} planned")
    assert planned.flops * preset.batch_size == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert planned.memory.activations == pytest.approx(peak, rel=ERROR_ON_MINIATURE)


def _peak(profile: Any) -> int:
    """Highest sum of what was allocated and not yet freed, from PyTorch's own allocator events, in bytes."""
    live = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_full_weights_cost_gradients_and_moments_of_the_whole_unet() -> None:
    plan = make_plan("lcm", "pocket", replace(TINY, student="unet"), "rtx-4090")
    unet = 4 * (plan.parameters["unet"] + 256 * 96)  # with the embedding of guidance (2310.04378)
    memory = plan.stages[0].memory
    assert (memory.gradients, memory.optimizer, memory.adapters) == (unet, 2 * unet, 2 * unet)


def test_a_plan_says_what_does_not_fit_and_what_to_do() -> None:
    plan = make_plan("lcm", "pocket", replace(TINY, images=8192, batch_size=8192), "rtx-4090")
    assert plan.stages[0].memory.total > 24 * GIB
    assert "accumulate" in plan.warnings[0]
    assert "gradient_checkpointing" in plan.warnings[0]
    assert not make_plan("lcm", "pocket", TINY, "rtx-4090").warnings


def test_checkpointing_saves_activations_and_costs_a_forward_pass_under_autocast_too() -> None:
    half = replace(TINY, precision="bf16")
    kept = make_plan("lcm", "pocket", half, "rtx-4090").stages[0]
    recomputed = make_plan("lcm", "pocket", replace(half, gradient_checkpointing=True), "rtx-4090").stages[0]
    assert recomputed.memory.activations < 0.5 * kept.memory.activations
    assert 1.1 * kept.flops < recomputed.flops < 1.4 * kept.flops


def test_a_plan_is_json_and_text() -> None:
    plan = make_plan("lcm", "pocket", TINY, "h100", tflops=100.0)
    data = json.loads(json.dumps(plan.to_json()))
    stage = data["stages"][0]
    assert stage["seconds"] == pytest.approx(stage["flops"] * stage["images"] / (0.4 * 100e12))
    assert stage["memory"]["peak"] < stage["memory"]["total"]
    assert "consistency" in render(plan)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'rtx-4090'"):
        make_plan("lcm", "pocket", TINY, "rtx-4080")
