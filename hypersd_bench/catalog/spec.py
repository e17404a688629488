"""ModelSpec: one checkpoint, where its weights are, and how it must be sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from hypersd_bench.sampling import SamplerContract

Kind = Literal["base", "lora", "unet"]


@dataclass(frozen=True, slots=True)
class HubWeights:
    """Weights in a hub repository: one file, or a diffusers folder (``unet``; empty: the repository's root).

    revision: a branch, tag or commit. A run asks once what a branch is at and keeps to that commit from then on.
    """

    repo: str
    file: str = ""
    revision: str = "main"

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of a config and its weights."""
        return not PurePosixPath(self.file).suffix

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" + (f":{self.file}" if self.file else "")


@dataclass(frozen=True, slots=True)
class Published:
    """One row of a published table. Numbers of other protocols than a run's are never set beside it as equals.

    source: paper and table. protocol: prompts, sizes and variants, as far as the paper says. values: by the paper's
    own column names. steps: the row's number of steps.
    """

    source: str
    protocol: str
    steps: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint as the benchmark knows it.

    name: unique among a base's models. family: what a spec and a report call it; a family has the checkpoints of one
    method that replace each other over step counts. base: the base it is compared on (``pocket``, ``sdxl``, a folder,
    a hub id). kind: ``base`` is a whole pipeline without weights of its own, ``lora`` a file, ``unet`` a diffusers UNet
    folder or a file of a UNet's weights. weights: that file or folder, here or on the hub. pipeline: the pipeline it
    runs in where that is not the base's own (a fine-tune, SDXL-Turbo): a folder or a hub id, ``@revision`` after it.

    allowed: what may be chosen besides the contract, lowest and highest: ``{"guidance_scale": (1, 2)}``.
    trained_on: metrics it was optimised for, by id; the report marks them. unconfirmed: what of this entry no primary
    source confirms; empty when all is. published: its rows of published tables. training: folder of its training logs.
    card: what ``distill`` wrote into its weights about its making.
    """

    name: str
    family: str
    base: str
    kind: Kind
    contract: SamplerContract
    weights: Path | HubWeights | None = None
    pipeline: str = ""
    license: str = ""
    allowed: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    trained_on: tuple[str, ...] = ()
    unconfirmed: str = ""
    published: tuple[Published, ...] = ()
    training: Path | None = None
    notes: str = ""
    card: Mapping[str, Any] = field(default_factory=dict)
