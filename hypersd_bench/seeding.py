"""Seeds belong to images: the noise of an image depends on nothing but (run seed, prompt id, replicate)."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def image_seed(run_seed: int, prompt_id: str, replicate: int) -> int:
    """A 63-bit seed, the same on every machine."""
    key = f"{run_seed}\x1f{prompt_id}\x1f{replicate}".encode()
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big") >> 1


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per image, for the starting noise and for every scheduler that adds noise on the way."""
    import torch

    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def starting_noise(image_generators: Sequence[torch.Generator], shape: Sequence[int]) -> torch.Tensor:
    """Draw the starting latents: (N, *shape) float32 on the CPU, image i from generator i alone."""
    import torch

    return torch.stack([torch.randn(*shape, generator=generator) for generator in image_generators])
