"""The miniature's scenes: endless, drawn when asked for, with exact masks; and as training data, encoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from distill.batch import Batch, Instances
from distill.sources.contract import Catalogue, RawObject, Row
from distill.sources.encoding import Encoder
from distill.sources.loading import Loaded, finished
from distill.sources.objects import instances_of
from distill.sources.order import batch_indices
from hypersd_bench.pocket.scenes import CONCEPT_NAMES, SIZE, render, sample_scene, scenes
from hypersd_bench.pocket.teacher import encode_pool


class Scenes:
    """The first ``count`` scenes of the training split. Labels are places in ``CONCEPT_NAMES``."""

    name = "scenes"
    has_images = True
    has_instances = True

    def __init__(self, count: int) -> None:
        rows = [Row(f"scene {scene.seed}", scene.caption, SIZE, SIZE) for scene in scenes(0, count)]
        self.catalogue = Catalogue.of(rows)
        text = "\n".join(row.caption for row in rows)
        self.fingerprint = hashlib.sha256(f"{count}\n{text}".encode()).hexdigest()

    def image(self, index: int) -> Image.Image:
        """Draw a scene."""
        return Image.fromarray(render(sample_scene(int(index))).image)

    def objects(self, index: int) -> list[RawObject]:
        """Each concept where it covers at least half of a pixel."""
        return _objects(int(index))


def _objects(seed: int) -> list[RawObject]:
    scene = sample_scene(seed)
    masks = render(scene).masks >= np.float32(0.5)
    return [RawObject(CONCEPT_NAMES.index(name), mask) for name, mask in zip(scene.concepts, masks, strict=True)]


class SceneData:
    """A pool of scenes under a base's autoencoder and text encoder, all latents and captions encoded once.

    Latents are kept under ``cache``, which must be the base's own.
    """

    has_images = True
    has_instances = True

    def __init__(self, encoder: Encoder, count: int, cache: Path, seed: int) -> None:
        self._encoder, self._seed = encoder, seed
        self.source = Scenes(count)
        self.latent_shape = encoder.latent_shape
        self._latents = encode_pool(cache, count, encoder.pipe.vae, encoder.device)
        self._scale = float(encoder.pipe.vae.config.scaling_factor)
        captions = list(self.source.catalogue.captions)
        self.captions = sorted(set(captions))
        row = {caption: i for i, caption in enumerate(self.captions)}
        self._rows = torch.tensor([row[caption] for caption in captions])
        self._embeddings = encoder.prompts(self.captions).cpu()

    def load(self, position: int, size: int) -> Loaded:
        """Pick the images of a batch."""
        picked = batch_indices(self._seed, len(self._latents), position, size)
        catalogue = self.source.catalogue
        return Loaded(
            ids=[catalogue.ids[i] for i in picked],
            prompts=[catalogue.captions[i] for i in picked],
            time_ids=torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]] * size),
            latents=torch.from_numpy(self._latents[picked]).float().mul_(self._scale),
            embeddings=self._embeddings.rows(self._rows[torch.from_numpy(picked)]),
            instances=SceneInstances(tuple(int(i) for i in picked)),
        )

    def finish(self, loaded: Loaded) -> Batch:
        """Put a batch onto the device."""
        return finished(loaded, self._encoder, self.latent_shape)

    def batch(self, position: int, size: int) -> Batch:
        """The ``size`` images that follow after ``position`` images seen."""
        return self.finish(self.load(position, size))

    def report(self) -> dict[str, Any]:
        """Scenes are neither filtered nor broken."""
        count = len(self._latents)
        return {
            "source": "scenes", "total": count, "used": count, "filtered": {},
            "broken": {"count": 0, "first": []}, "buckets": {f"{SIZE}x{SIZE}": count},
            "prompts_over_limit": len(self._encoder.too_long),
        }  # fmt: skip


class SceneInstances(Sequence[Instances]):
    """The instances of some scenes, drawn when they are looked at: most stages never do."""

    def __init__(self, seeds: tuple[int, ...]) -> None:
        self._seeds = seeds

    def __len__(self) -> int:
        return len(self._seeds)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return SceneInstances(self._seeds[index])
        return _scene_instances(self._seeds[index])


@lru_cache(maxsize=256)
def _scene_instances(seed: int) -> Instances:
    return instances_of(_objects(seed))
