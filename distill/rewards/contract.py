"""What a reward and a segmenter must offer; a registry row points to a factory of one.

A reward judges a whole picture against its prompt (Hyper-SD 2404.13686, eq. 13). A segmenter judges whether the objects
that the data say are there can be found in it (eq. 14). Both are frozen and pass gradient to the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distill.batch import Instances


@dataclass(frozen=True, slots=True)
class RewardInfo:
    """A reward's declaration of itself, readable before any weights are.

    id: ``family/variant``, the registry row's name. label: what a curve is headed. hinge: alpha_d of eq. 13, in the
    reward's own unit: past it gradient stops. weight: default factor of its loss. trains: ids of the metrics that a
    model optimised on this reward counts as trained on; reports mark them.
    """

    id: str
    label: str
    hinge: float
    weight: float
    trains: tuple[str, ...]


class Reward(Protocol):
    """A frozen judge of pictures that passes gradient to the pixels."""

    @property
    def info(self) -> RewardInfo:
        """Its declaration."""
        ...

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rate pixels (B, 3, H, W) float in [0, 1] against B prompts: (B,) float32, differentiable in the pixels."""
        ...


@dataclass(frozen=True, slots=True)
class RewardFactory:
    """What a reward's registry row points to; called with a device, it loads the reward.

    ``build`` raises InputError naming the remedy when weights are missing.
    """

    info: RewardInfo
    build: Callable[[RewardInfo, torch.device], Reward]

    def __call__(self, device: torch.device) -> Reward:
        """Load the reward onto a device."""
        return self.build(self.info, device)


class Segmenter(Protocol):
    """A frozen instance segmenter that passes gradient to the pixels; its row points to a ``load(device)``."""

    @property
    def id(self) -> str:
        """The registry row's name."""
        ...

    def loss(self, pixels: Tensor, instances: Sequence[Instances], seed: int = 0) -> Tensor:
        """How badly B instance lists are found in pixels (B, 3, H, W) in [0, 1]: a scalar, differentiable (eq. 14).

        seed: of what the segmenter draws, if anything; the global random state is neither read nor moved.
        """
        ...
