"""How large caches get, told before anything is encoded; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

VALUE_BYTES = {"bf16": 2, "fp16": 2}
INDEX_BYTES = 8 + 6 * 4  # of each image: its index, and its six time ids
SHARD_BYTES = 64 * 2**20  # of content, about
HEADER_BYTES = 300  # of each shard


class CacheBytes(NamedTuple):
    """Predicted size on disk."""

    latents: int
    prompts: int


@dataclass(frozen=True, slots=True)
class EncodedShape:
    """What a base turns an image and a prompt into.

    latent: (C, h, w) of a square image. tokens, text_width: of the embedding. pooled_width: 0 where there is none.
    """

    latent: tuple[int, int, int]
    tokens: int
    text_width: int
    pooled_width: int = 0

    def image_bytes(self, precision: str = "bf16") -> int:
        """Of a cached latent, bytes."""
        return math.prod(self.latent) * VALUE_BYTES[precision]

    def prompt_bytes(self, precision: str = "bf16") -> int:
        """Of a cached prompt, bytes."""
        return (self.tokens * self.text_width + self.pooled_width) * VALUE_BYTES[precision]


def rows_per_shard(row_bytes: int) -> int:
    """How many rows make a shard."""
    return min(max(SHARD_BYTES // row_bytes, 1), 4096)


def predicted_bytes(num_images: int, num_prompts: int, shape: EncodedShape, precision: str = "bf16") -> CacheBytes:
    """Size of the caches of so many images and distinct prompts.

    Exact for square images; aspect-ratio buckets take up to a tenth less per image, and one shard each at least.
    """
    return CacheBytes(
        latents=_stored(num_images, shape.image_bytes(precision) + INDEX_BYTES),
        prompts=_stored(num_prompts, shape.prompt_bytes(precision)),
    )


def _stored(rows: int, row_bytes: int) -> int:
    return rows * row_bytes + math.ceil(rows / rows_per_shard(row_bytes)) * HEADER_BYTES
