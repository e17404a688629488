"""Generated images per second: ours against the plain diffusers pipeline called prompt by prompt, in one run.

Ours encodes every prompt once for all models and step counts and samples in batches; the plain loop is what a script
around ``StableDiffusionPipeline`` does. Each round makes 32 images of 4 steps. Read the ratio, not the seconds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from hypersd_bench.conditioning import join
from hypersd_bench.pipelines import decode_latents, load_base, sample_latents
from hypersd_bench.pocket import WEIGHTS
from hypersd_bench.prompts import load_prompts
from hypersd_bench.runner.generate import encode_all
from hypersd_bench.sampling import ddim_trailing
from hypersd_bench.seeding import generators

NUM_IMAGES = 32
CONTRACT = ddim_trailing((4,))
pytestmark = pytest.mark.skipif(not (WEIGHTS / "base").is_dir(), reason="the miniature is not built")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_base("pocket")


def test_ours(benchmark: BenchmarkFixture, pipe: Any) -> None:
    prompts = load_prompts("pocket/held-out").first(NUM_IMAGES).prompts

    def generate() -> torch.Tensor:
        embeddings = encode_all(pipe, prompts)
        cond = join(*(embeddings.by_prompt[prompt.id] for prompt in prompts))
        return decode_latents(pipe, sample_latents(pipe, CONTRACT, 4, cond, range(NUM_IMAGES)))

    images = benchmark.pedantic(generate, rounds=3, warmup_rounds=1)
    assert images.shape == (NUM_IMAGES, 3, 64, 64)


def test_plain_diffusers_loop(benchmark: BenchmarkFixture) -> None:
    from diffusers import StableDiffusionPipeline

    plain = StableDiffusionPipeline.from_pretrained(WEIGHTS / "base", safety_checker=None, dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    plain.scheduler = CONTRACT.make_scheduler(plain.scheduler.config)
    prompts = load_prompts("pocket/held-out").first(NUM_IMAGES).prompts

    def generate() -> list[Any]:
        return [
            plain(prompt.text, num_inference_steps=4, guidance_scale=0.0, generator=generators([i]), output_type="np",
                  height=64, width=64).images
            for i, prompt in enumerate(prompts)
        ]  # fmt: skip

    images = benchmark.pedantic(generate, rounds=3, warmup_rounds=1)
    assert len(images) == NUM_IMAGES
