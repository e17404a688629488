"""Images per second: a benchmark's engine against the plain diffusers loop that a user would write, in one run.

The plain loop calls the pipeline prompt by prompt, its LoRA fused, and saves each picture. Ours encodes every prompt,
samples in batches, decodes, codes and writes the same pictures with their rows' hashes. Both are warm; both are given
the same prompts, noise and steps. On the miniature always; on SDXL's architecture with random weights where there is
CUDA. Read the ratio of one run, not the seconds; ``unet_vae_share`` is the part of our time that is spent inside UNet
and VAE.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.random_sdxl import make_random_sdxl
from hypersd_bench.bench import Bench
from hypersd_bench.pipelines import Pipeline
from hypersd_bench.pocket import WEIGHTS
from hypersd_bench.runner.maker import Embeddings, Job, Maker
from hypersd_bench.runner.plan import Plan, make_plan
from hypersd_bench.runner.spec import load_spec
from hypersd_bench.seeding import generators, image_seed
from hypersd_bench.store import write_bytes

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
STEPS = (1, 8)
BASES = ["pocket", pytest.param("sdxl", marks=pytest.mark.skipif(not CUDA, reason="SDXL's size needs CUDA"))]
pytestmark = pytest.mark.skipif(not (WEIGHTS / "base").is_dir(), reason="the miniature is not built")


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return "pocket" if request.param == "pocket" else str(make_random_sdxl(tmp_path_factory.mktemp("sdxl") / "base"))


def plan_for(base: str, steps: int) -> Plan:
    """One LoRA, or without one SDXL's own UNet unguided, at one step count."""
    prompts = {"prompts": "pocket/held-out", "num_prompts": 64 if base == "pocket" else 16}
    if base == "pocket":
        lora = WEIGHTS / "lora" / "hyper-sd" / "hyper-sd-unified.safetensors"
        return make_plan(load_spec(None, {**prompts, "base": base, "models": [str(lora)], "steps": [steps]}))
    raw = {**prompts, "base": base, "models": ["teacher"], "steps": [steps], "dtype": "float16"}
    plan = make_plan(load_spec(None, raw), device=DEVICE)
    (teacher,) = plan.configurations
    unguided = replace(teacher.model, contract=replace(teacher.model.contract, guidance_scale=0.0))
    return replace(plan, configurations=(replace(teacher, model=unguided),))


def jobs_of(plan: Plan) -> list[Job]:
    """Three images of each prompt."""
    return [Job(prompt, replicate) for prompt in plan.prompts.prompts for replicate in range(3)]


@pytest.fixture(scope="module")
def maker_of(base: str) -> Iterator[Callable[[int], Maker]]:
    """A warm device for each step count, kept for the module."""
    made: dict[int, Maker] = {}
    yield lambda steps: made.setdefault(steps, Maker(plan_for(base, steps), DEVICE))
    for maker in made.values():
        maker.close()


@pytest.mark.parametrize("steps", STEPS)
def test_ours(benchmark: BenchmarkFixture, maker_of: Callable[[int], Maker], steps: int, tmp_path: Path) -> None:
    maker = maker_of(steps)
    (configuration,) = maker.plan.configurations
    jobs = jobs_of(maker.plan)
    pipe = maker.bench.seat(configuration.model, configuration.pipeline, configuration.dtype)
    inside = Inside(pipe)

    def generate() -> int:
        prompts = maker.plan.prompts.prompts
        Embeddings(prompts).of(pipe, prompts)  # once in a run, for all models and step counts; here each time
        todo, futures = list(jobs), list[Future[None]]()
        while todo:
            size = maker.batch_size(configuration)
            futures += maker.make(configuration, todo[:size], lambda f: write_bytes(tmp_path / f.row.file, f.png))
            todo = todo[size:]
        return len([future.result() for future in futures])

    assert benchmark.pedantic(generate, rounds=3, warmup_rounds=1) == len(jobs)
    with inside:
        started = time.perf_counter()
        generate()
        benchmark.extra_info["unet_vae_share"] = inside.seconds / (time.perf_counter() - started)
    benchmark.extra_info["images"] = len(jobs)


@pytest.mark.parametrize("steps", STEPS)
def test_plain_diffusers_loop(benchmark: BenchmarkFixture, base: str, steps: int, tmp_path: Path) -> None:
    plan = plan_for(base, steps)
    (configuration,) = plan.configurations
    contract = configuration.model.contract
    plain: Any = Bench(DEVICE).seat(configuration.model, configuration.pipeline, configuration.dtype)
    plain.scheduler = contract.make_scheduler(plain.scheduler.config)
    told: dict[str, Any] = {"guidance_scale": 0.0, "eta": contract.eta or 0.0, "num_inference_steps": steps}
    if contract.takes_timesteps:
        told |= {"num_inference_steps": None, "timesteps": list(contract.timesteps[steps])}

    def generate() -> int:
        for job in jobs_of(plan):
            generator = generators([image_seed(0, job.prompt.id, job.replicate)])
            picture = plain(job.prompt.text, generator=generator, **told).images[0]
            picture.save(tmp_path / f"{job.prompt.id}_{job.replicate}.png")
        return len(jobs_of(plan))

    assert benchmark.pedantic(generate, rounds=3, warmup_rounds=1) == len(jobs_of(plan))
    benchmark.extra_info["images"] = len(jobs_of(plan))


class Inside:
    """Adds up the seconds spent inside UNet and VAE while it is entered, waiting for the device at each border."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe
        self.seconds = 0.0

    def __enter__(self) -> None:
        pipe = self._pipe
        self._hooks = [
            pipe.unet.register_forward_pre_hook(self._start), pipe.unet.register_forward_hook(self._stop),
            pipe.vae.post_quant_conv.register_forward_pre_hook(self._start),
            pipe.vae.decoder.register_forward_hook(self._stop),
        ]  # fmt: skip

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _start(self, *_: object) -> None:
        self._at = self._now()

    def _stop(self, *_: object) -> None:
        self.seconds += self._now() - self._at

    def _now(self) -> float:
        if CUDA:
            torch.cuda.synchronize()
        return time.perf_counter()
