"""A batch in two halves: what the CPU prepares, which another thread may do ahead, and what the device does with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from distill.batch import Batch, Condition, Instances
from distill.sources.contract import TrainingData
from distill.sources.encoding import Embeddings, Encoder


@dataclass(frozen=True)
class Loaded:
    """A batch before the device has seen it.

    time_ids: (B, 6) int64, SDXL's order. pixels: (B, H, W, 3) uint8, or latents: (B, C, h, w) scaled, of any float
    type, or neither. embeddings: where they are known already.
    """

    ids: Sequence[str]
    prompts: Sequence[str]
    time_ids: Tensor
    pixels: Tensor | None = None
    latents: Tensor | None = None
    embeddings: Embeddings | None = None
    instances: Sequence[Instances] | None = None

    def pinned(self) -> Loaded:
        """The same in memory that is copied to a CUDA device without waiting."""
        known = self.embeddings
        if known is not None:
            known = Embeddings(_pinned(known.text), None if known.pooled is None else _pinned(known.pooled))
        return replace(
            self,
            time_ids=_pinned(self.time_ids),
            pixels=None if self.pixels is None else _pinned(self.pixels),
            latents=None if self.latents is None else _pinned(self.latents),
            embeddings=known,
        )


class Loading(TrainingData, Protocol):
    """Training data whose batches come in two halves: ``batch`` is ``finish`` of ``load``.

    ``load`` is a pure function of its arguments and safe in another thread; only ``finish`` uses the device.
    """

    def load(self, position: int, size: int) -> Loaded:
        """Prepare a batch on the CPU."""
        ...

    def finish(self, loaded: Loaded) -> Batch:
        """Encode what is not encoded yet, on the device."""
        ...


def finished(loaded: Loaded, encoder: Encoder, latent_shape: tuple[int, int, int]) -> Batch:
    """Put a loaded batch onto the device and encode what is not encoded yet."""
    device = encoder.device
    known = loaded.embeddings
    if known is None:
        known = encoder.prompts(loaded.prompts)
    else:
        pooled = None if known.pooled is None else _onto(known.pooled, device)
        known = Embeddings(_onto(known.text, device), pooled)
    z0 = None
    if loaded.latents is not None:
        z0 = _onto(loaded.latents, device)
    elif loaded.pixels is not None:
        z0 = encoder.latents(loaded.pixels.to(device, non_blocking=True))
    if z0 is not None:
        latent_shape = (z0.shape[1], z0.shape[2], z0.shape[3])
    return Batch(
        z0=z0,
        cond=encoder.condition(known, loaded.time_ids),
        uncond=_unconditional(encoder, loaded.time_ids),
        prompts=loaded.prompts,
        ids=loaded.ids,
        latent_shape=latent_shape,
        instances=loaded.instances,
    )


def _unconditional(encoder: Encoder, time_ids: Tensor) -> Condition:
    """The unconditional input, as of an uncut picture of the batch's size."""
    height, width = int(time_ids[0, 4]), int(time_ids[0, 5])
    return encoder.condition(encoder.empty, torch.tensor([[height, width, 0, 0, height, width]]))


def _onto(x: Tensor, device: torch.device) -> Tensor:
    return x.to(device, non_blocking=True).float()


def _pinned(x: Tensor) -> Tensor:
    return x.pin_memory() if x.device.type == "cpu" else x
