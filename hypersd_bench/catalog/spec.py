"""ModelSpec: one checkpoint, and how it must be sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hypersd_bench.sampling import SamplerContract


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint as the benchmark knows it.

    name: unique, ``family`` or ``family-<steps>steps``. family: what a report calls it. base: the pipeline it runs on
    (``pocket``, a folder, a hub id). kind: ``base`` has no weights of its own, ``lora`` is a safetensors file, ``unet``
    a diffusers UNet folder that stands in for the base's. weights: that file or folder.
    trained_on: metrics it was optimised for, by id; the report marks them. training: folder of its training logs.
    card: what ``distill`` wrote into its weights about its making.
    """

    name: str
    family: str
    base: str
    kind: Literal["base", "lora", "unet"]
    contract: SamplerContract
    weights: Path | None = None
    revision: str = ""
    license: str = ""
    trained_on: tuple[str, ...] = ()
    training: Path | None = None
    notes: str = ""
    published: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
