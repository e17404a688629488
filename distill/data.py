"""Training data: the miniature's scenes as latents, and their captions as embeddings, both encoded once.

Which images a step sees is a pure function of (seed, images seen so far), so a resumed run sees what it would have.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor

from distill.stages import Batch
from hypersd_bench.pipelines import encode_prompts
from hypersd_bench.pocket.scenes import scenes
from hypersd_bench.pocket.teacher import encode_pool

TEXT_BATCH = 256


class SceneLatents:
    """A pool of scenes under a base's autoencoder and text encoder."""

    def __init__(self, pipe: StableDiffusionPipeline, count: int, cache: Path, seed: int) -> None:
        self._device = pipe.device
        self._seed = seed
        self._scale = float(pipe.vae.config.scaling_factor)
        self._latents = encode_pool(cache, count, pipe.vae, torch.device(pipe.device))
        captions = [scene.caption for scene in scenes(0, count)]
        distinct = sorted(set(captions))
        row = {caption: i for i, caption in enumerate(distinct)}
        self._rows = torch.tensor([row[caption] for caption in captions])
        self._text = _encode(pipe, distinct)
        self._empty = _encode(pipe, [""])
        self.captions = distinct

    def batch(self, position: int, size: int) -> Batch:
        """The ``size`` images that follow after ``position`` images seen."""
        picked = batch_indices(self._seed, len(self._latents), position, size)
        z0 = torch.from_numpy(self._latents[picked]).float().mul_(self._scale).to(self._device)
        return Batch(z0, self._text[self._rows[torch.from_numpy(picked)].to(self._device)], self._empty)


def batch_indices(seed: int, count: int, position: int, size: int) -> NDArray[np.int64]:
    """Indices into ``count`` images, (size,) int64: every epoch is a new permutation of all of them."""
    return np.array([_epoch(seed, count, i // count)[i % count] for i in range(position, position + size)])


@lru_cache(maxsize=2)
def _epoch(seed: int, count: int, epoch: int) -> NDArray[Any]:
    return np.random.default_rng([seed, epoch]).permutation(count)


@torch.no_grad()
def _encode(pipe: StableDiffusionPipeline, captions: list[str]) -> Tensor:
    parts = [encode_prompts(pipe, captions[i : i + TEXT_BATCH]) for i in range(0, len(captions), TEXT_BATCH)]
    return torch.cat(parts).float()
