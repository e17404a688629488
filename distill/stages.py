"""What a method hands to the loop: its stages, and the losses of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from distill.batch import Batch
from distill.presets import Preset
from distill.roles import Adapter, Roles
from hypersd_bench.errors import InputError
from hypersd_bench.sampling import SamplerContract


class Losses(NamedTuple):
    """The student's loss, its opponents' by name, and figures worth logging; all scalars.

    The student has none in a stage's ``practice``, where only opponents learn.
    """

    student: Tensor | None
    opponents: Mapping[str, Tensor] = {}
    logs: Mapping[str, Tensor] = {}


LossFunction = Callable[[Batch, Roles, torch.Generator], Losses]


@dataclass(frozen=True, kw_only=True)
class Opponent:
    """Who is trained beside the student: a module made anew for the stage, a role, or both as one.

    name: ``discriminator`` or ``critic``, what its loss and optimizer are called. make: builds the module, which the
    loop puts into ``roles.discriminator``. role: whose weights it trains.
    """

    name: str
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    make: Callable[[Roles], nn.Module] | None = None
    role: Adapter | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of training that starts from the student of the stage before, with a fresh optimizer and EMA.

    images: training images the stage sees. export: file name without ending, relative to the run's folder, under
    which the stage's student is written with ``contract``. trains: the student, or the feedback LoRA on top of it,
    which is merged into the export at ``feedback_ratio`` and leaves the student as it was. new_previous: whether
    ``previous`` becomes a copy of the student as the stage starts, and ``older`` what it was. older: whether the losses
    ask for that role. prediction_type: what the student's output means, None for the base's. embeds_guidance: whether
    the student, a full UNet, is told w. practice: losses of opponents alone, for
    ``practice_steps`` updates before each of the student's. rewards: what the stage optimises, by id; its pictures
    are also watched under the rewards that it does not. needs_images: whether prompts alone are not enough.
    """

    name: str
    images: int
    learning_rate: float
    contract: SamplerContract
    export: str
    losses: LossFunction
    betas: tuple[float, float] = (0.9, 0.999)
    trains: Literal["student", "feedback"] = "student"
    feedback_ratio: float = 1.0
    new_previous: bool = False
    older: bool = False
    prediction_type: str | None = None
    embeds_guidance: bool = False
    opponents: tuple[Opponent, ...] = ()
    practice: LossFunction | None = None
    practice_steps: int = 0
    rewards: tuple[str, ...] = ()
    perceptual: bool = False
    needs_images: bool = True


class Method(Protocol):
    """A distillation method: its registry name and its stages under a preset."""

    name: str

    def stages(self, preset: Preset) -> tuple[Stage, ...]:
        """The stages in order; their images add up to ``preset.images``."""
        ...


def wanted_roles(stages: Sequence[Stage]) -> list[Adapter]:
    """The roles beside student and ema that the stages need, in the order they must be added in."""
    wanted: list[Adapter] = ["previous"] if any(stage.new_previous for stage in stages) else []
    wanted += ["older"] if any(stage.older for stage in stages) else []
    wanted += ["feedback"] if any(stage.trains == "feedback" for stage in stages) else []
    wanted += [opponent.role for stage in stages for opponent in stage.opponents if opponent.role]
    return list(dict.fromkeys(wanted))


def split_images(total: int, batch_size: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Share out ``total`` images by weight in whole batches, at least one each; any rest goes to the last share."""
    num_batches = total // batch_size
    if num_batches < len(weights):
        raise InputError(
            f"{total} images in batches of {batch_size} are too few for {len(weights)} stages; "
            f"give at least {len(weights) * batch_size}"
        )
    scale = (num_batches - len(weights)) / sum(weights)
    batches = [1 + int(weight * scale) for weight in weights]
    batches[-1] += num_batches - sum(batches)
    return tuple(count * batch_size for count in batches)


def draw_noise(like: Tensor, rng: torch.Generator) -> Tensor:
    """Standard normal noise in the shape and place of ``like``, drawn on the CPU: the same on every device."""
    return torch.randn(like.shape, generator=rng).to(like.device)


def offset_noise(like: Tensor, rng: torch.Generator, strength: float) -> Tensor:
    """Noise whose mean also varies, by sample and channel: eps + strength N(0, 1) (hyper-sd: "noise perturbation")."""
    noise = draw_noise(like, rng)
    return noise + strength * torch.randn((*like.shape[:2], 1, 1), generator=rng).to(like.device)


def draw_guidance(batch: Batch, guidance: tuple[float, float], rng: torch.Generator) -> Tensor:
    """Guidance scales g (B,), uniform in the range."""
    low, high = guidance
    return (low + (high - low) * torch.rand(len(batch), generator=rng)).to(batch.cond.text.device)
