"""What a CUDA device must give: the pictures of the CPU, from the same noise."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypersd_bench.pipelines import load_base, sample
from hypersd_bench.sampling import SamplerContract, ddim_trailing, lcm
from tests.tiny_base import make_tiny_base

pytestmark = pytest.mark.gpu
PROMPTS = ["a fox on a blue background", "a car left of a tree on a pink background"]


@pytest.mark.parametrize("contract", [ddim_trailing((4,), 3.0), lcm((4,))], ids=["ddim", "lcm"])
def test_cuda_gives_the_pictures_of_the_cpu(tmp_path: Path, contract: SamplerContract) -> None:
    folder = str(make_tiny_base(tmp_path / "base"))
    on_cpu, on_cuda = (sample(load_base(folder, device), contract, 4, PROMPTS, [1, 2]) for device in ("cpu", "cuda"))
    assert (on_cpu.int() - on_cuda.int()).abs().float().mean() < 1
