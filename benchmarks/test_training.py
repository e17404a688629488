"""Training images per second of every method on the miniature's UNet size, with random weights.

Run with: pytest benchmarks/test_training.py --benchmark-only
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from distill.presets import find_preset
from distill.roles import Roles
from distill.schedule import NoiseSchedule
from distill.stages import Batch, Stage
from hypersd_bench import registry
from hypersd_bench.pocket.teacher import new_scheduler, new_unet
from hypersd_bench.pocket.training import fast_bf16


@pytest.fixture(scope="module")
def roles() -> Roles:
    torch.manual_seed(0)
    schedule = NoiseSchedule.from_config(new_scheduler().config, set_alpha_to_one=True)
    cast = Roles(new_unet(), schedule, find_preset("pocket").rank)
    cast.add("previous")
    return cast


@pytest.mark.parametrize("method", sorted(registry.METHODS))
def test_images_per_second(benchmark: BenchmarkFixture, roles: Roles, method: str) -> None:
    """One optimizer step without its optimizer: losses and gradients of the method's costliest stage."""
    batch_size = find_preset("pocket").batch_size
    stage: Stage = registry.resolve("method", method)().stages(find_preset("pocket"))[0]
    batch = Batch(torch.randn(batch_size, 16, 8, 8), torch.randn(batch_size, 16, 128), torch.randn(1, 16, 128))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16(torch.device("cpu"))):
            losses = stage.losses(batch, roles, torch.Generator().manual_seed(0))
        losses.student.backward()
        for parameter in roles.parameters("student"):
            parameter.grad = None

    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["images_per_s"] = batch_size / benchmark.stats.stats.mean
