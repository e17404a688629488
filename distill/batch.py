"""What one training step is fed: latents, what the UNet is told of them, and what is known about the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from hypersd_bench.conditioning import Condition, join

__all__ = ["Batch", "Condition", "Instances", "join"]


class Instances(NamedTuple):
    """The objects of one picture.

    labels: (K,) int64. masks: (K, H, W) bool at the picture's size in pixels. boxes: (K, 4) float32, x1 y1 x2 y2 in
    pixels.
    """

    labels: Tensor
    masks: Tensor
    boxes: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """The images of one step, or of a part of it.

    z0: (B, C, h, w) float32 scaled latents; None where the data are prompts alone. cond: B rows. uncond: one row, the
    unconditional input of this base. prompts: the B texts. ids: the B images' names in their data set, for messages.
    latent_shape: (C, h, w), also without z0. instances: B of them, where the data have masks.
    """

    z0: Tensor | None
    cond: Condition
    uncond: Condition
    prompts: Sequence[str]
    ids: Sequence[str]
    latent_shape: tuple[int, int, int]
    instances: Sequence[Instances] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def latents(self) -> Tensor:
        """z0 of a stage that needs images; the loop refuses prompts alone before such a stage starts."""
        assert self.z0 is not None, "this stage needs images, the data are prompts alone"
        return self.z0
