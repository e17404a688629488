"""What a UNet is told beside x and t: the same value for sampling and for training, Stable Diffusion 1.5 and XL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Condition:
    """Rows are images.

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

    def cast(self, dtype: torch.dtype) -> Condition:
        """The same in a UNet's precision; time ids stay as they are, they are embedded first."""
        return Condition(self.text.to(dtype), None if self.pooled is None else self.pooled.to(dtype), self.time_ids)

    def rows(self, index: Tensor | slice) -> Condition:
        """Some of the images."""
        return self.map(lambda x: x[index])

    def expand(self, batch_size: int) -> Condition:
        """One row for every image of a batch."""
        return self.map(lambda x: x.expand(batch_size, *x.shape[1:]))

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of ``UNet2DConditionModel.forward`` that carry it."""
        if self.pooled is None:
            return {"encoder_hidden_states": self.text}
        added = {"text_embeds": self.pooled, "time_ids": self.time_ids}
        return {"encoder_hidden_states": self.text, "added_cond_kwargs": added}


def join(*conditions: Condition) -> Condition:
    """Conditions of one kind, one after the other."""
    columns = zip(*((c.text, c.pooled, c.time_ids) for c in conditions), strict=True)
    text, pooled, time_ids = (None if parts[0] is None else torch.cat(parts) for parts in columns)
    assert text is not None
    return Condition(text, pooled, time_ids)
