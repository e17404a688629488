"""What a CUDA device must give: the pictures of the CPU from the same noise, timings, and batches that fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypersd_bench.pipelines import load_base, sample
from hypersd_bench.runner.benchmark import run_benchmark
from hypersd_bench.runner.maker import Job, Maker
from hypersd_bench.runner.memory import MOST
from hypersd_bench.runner.plan import make_plan
from hypersd_bench.runner.spec import load_spec
from hypersd_bench.sampling import SamplerContract, ddim_trailing, lcm
from tests.tiny_base import make_tiny_base

pytestmark = pytest.mark.gpu
PROMPTS = ["a fox on a blue background", "a car left of a tree on a pink background"]


@pytest.mark.parametrize("contract", [ddim_trailing((4,), 3.0), lcm((4,))], ids=["ddim", "lcm"])
def test_cuda_gives_the_pictures_of_the_cpu(tmp_path: Path, contract: SamplerContract) -> None:
    folder = str(make_tiny_base(tmp_path / "base"))
    on_cpu, on_cuda = (sample(load_base(folder, device), contract, 4, PROMPTS, [1, 2]) for device in ("cpu", "cuda"))
    assert (on_cpu.int() - on_cuda.int()).abs().float().mean() < 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_run_on_cuda_is_whole_timed_and_much_like_the_one_on_a_cpu(tmp_path: Path, dtype: str) -> None:
    base = make_tiny_base(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("\n".join(f"a fox number {i}" for i in range(9)))
    raw = {"base": str(base), "models": ["teacher"], "steps": [1, 4], "prompts": "prompts.txt", "dtype": dtype}
    timing = {"repeats": 4, "warmup": 1}
    plan = make_plan(load_spec(None, {**raw, "timing": timing}), tmp_path, "cuda")
    store, _ = run_benchmark(plan, tmp_path / "cuda", "cuda")
    assert len(store.images()) == plan.num_images
    assert {row.stage for row in store.timings()} == {"text", "unet", "denoise", "decode", "total"}
    assert all(row.seconds > 0 for row in store.timings())
    costs = {row.name for row in store.costs()}
    assert {"load", "seat", "first-image", "peak-memory", "peak-reserved", "images-per-second"} <= costs
    on_cpu = make_plan(load_spec(None, {**raw, "dtype": "float32", "timing": timing}), tmp_path)
    other, _ = run_benchmark(on_cpu, tmp_path / "cpu", "cpu")
    tolerance = {"float32": 2, "bfloat16": 60, "float16": 20}[dtype]
    for row in store.images():
        a, b = (np.asarray(Image.open(run.folder / row.file), int) for run in (store, other))
        assert np.abs(a - b).max() <= tolerance


def test_a_batch_is_as_large_as_the_free_memory_holds(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("\n".join(f"a fox number {i}" for i in range(20)))
    raw = {"base": str(base), "models": ["teacher"], "steps": [1], "prompts": "prompts.txt"}
    plan = make_plan(load_spec(None, raw), tmp_path, "cuda")
    with Maker(plan, "cuda") as making:
        (configuration,) = plan.configurations
        assert making.batch_size(configuration) == 1
        making.pixels(configuration, [Job(prompt, 0) for prompt in plan.prompts.prompts[:1]])
        assert making.batch_size(configuration) == MOST  # so small a model
