"""Training data: the miniature's scenes as latents, and their captions as embeddings, both encoded once.

Which images a step sees is a pure function of (seed, images seen so far), so a resumed run sees what it would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import masks_to_boxes

from distill.batch import Batch, Condition, Instances
from hypersd_bench.pipelines import Pipeline, encode_empty, encode_prompts
from hypersd_bench.pocket.scenes import CONCEPT_NAMES, render, sample_scene, scenes
from hypersd_bench.pocket.teacher import encode_pool

TEXT_BATCH = 256


class SceneLatents:
    """A pool of scenes under a base's autoencoder and text encoder."""

    def __init__(self, pipe: Pipeline, count: int, cache: Path, seed: int) -> None:
        self._device = pipe.device
        self._seed = seed
        self._scale = float(pipe.vae.config.scaling_factor)
        self._latents = encode_pool(cache, count, pipe.vae, torch.device(pipe.device))
        captions = [scene.caption for scene in scenes(0, count)]
        distinct = sorted(set(captions))
        row = {caption: i for i, caption in enumerate(distinct)}
        self._rows = torch.tensor([row[caption] for caption in captions])
        self._text = _encode(pipe, distinct)
        self._empty = encode_empty(pipe)
        self.captions = distinct
        self.latent_shape: tuple[int, int, int] = self._latents.shape[1:]

    def batch(self, position: int, size: int) -> Batch:
        """The ``size`` images that follow after ``position`` images seen."""
        picked = batch_indices(self._seed, len(self._latents), position, size)
        z0 = torch.from_numpy(self._latents[picked]).float().mul_(self._scale).to(self._device)
        rows = self._rows[torch.from_numpy(picked)]
        return Batch(
            z0=z0,
            cond=Condition(self._text[rows.to(self._device)]),
            uncond=self._empty,
            prompts=[self.captions[row] for row in rows.tolist()],
            ids=[f"scene-{i}" for i in picked],
            latent_shape=self.latent_shape,
            instances=LazyInstances(picked.tolist(), self._device),
        )


class LazyInstances(Sequence[Instances]):
    """The instances of scenes, rendered when a stage asks for them: most stages do not."""

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        self._seeds, self._device = seeds, device

    def __len__(self) -> int:
        return len(self._seeds)

    def __getitem__(self, index: Any) -> Any:
        return scene_instances(self._seeds[index], self._device)


def scene_instances(seed: int, device: torch.device | str) -> Instances:
    """The emoji of a scene: labels are places in CONCEPT_NAMES, masks where their alpha is over a half."""
    scene = sample_scene(seed)
    masks = torch.from_numpy(render(scene).masks > 0.5)
    boxes = masks_to_boxes(masks)
    labels = torch.tensor([CONCEPT_NAMES.index(name) for name in scene.concepts])
    return Instances(labels.to(device), masks.to(device), boxes.float().to(device))


def batch_indices(seed: int, count: int, position: int, size: int) -> NDArray[np.int64]:
    """Indices into ``count`` images, (size,) int64: every epoch is a new permutation of all of them."""
    return np.array([_epoch(seed, count, i // count)[i % count] for i in range(position, position + size)])


@lru_cache(maxsize=2)
def _epoch(seed: int, count: int, epoch: int) -> NDArray[Any]:
    return np.random.default_rng([seed, epoch]).permutation(count)


@torch.no_grad()
def _encode(pipe: Pipeline, captions: list[str]) -> Tensor:
    parts = [encode_prompts(pipe, captions[i : i + TEXT_BATCH]).text for i in range(0, len(captions), TEXT_BATCH)]
    return torch.cat(parts).float()
