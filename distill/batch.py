"""What one training step is fed: latents, what the UNet is told of them, and what is known about the pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Condition:
    """What a UNet is told beside x and t; rows are images.

    text: (B, L, d) token embeddings. pooled: (B, p) and time_ids: (B, 6), for SDXL alone; time_ids are original
    height and width, top and left of the crop, target height and width, in pixels.
    """

    text: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    def map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """Apply ``change`` to every tensor that is there."""
        pooled = None if self.pooled is None else change(self.pooled)
        return Condition(change(self.text), pooled, None if self.time_ids is None else change(self.time_ids))

    def to(self, device: torch.device | str) -> Condition:
        """The same on a device."""
        return self.map(lambda x: x.to(device))

    def rows(self, index: Tensor | slice) -> Condition:
        """Some of the images."""
        return self.map(lambda x: x[index])

    def expand(self, batch_size: int) -> Condition:
        """One row for every image of a batch."""
        return self.map(lambda x: x.expand(batch_size, *x.shape[1:]))


def join(first: Condition, second: Condition) -> Condition:
    """Two conditions, one after the other."""
    pooled = None if first.pooled is None or second.pooled is None else torch.cat([first.pooled, second.pooled])
    ids = None if first.time_ids is None or second.time_ids is None else torch.cat([first.time_ids, second.time_ids])
    return Condition(torch.cat([first.text, second.text]), pooled, ids)


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
