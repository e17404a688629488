"""FID: the Fréchet distance of image features to those of a reference set (Heusel et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from hypersd_bench.contracts import MetricContext, MetricInfo
from hypersd_bench.errors import InputError
from hypersd_bench.reference import image_paths
from metrics.factory import Factory
from metrics.frechet import feature_distance

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

NUM_RENDERS = 512
FIRST_RENDER_SEED = 10_000_000  # trainings draw from 0, prompt sets from 20 000 000
BATCH_SIZE = 32


@dataclass(slots=True)
class Fid:
    """FID under one feature network; a SetMetric."""

    info: MetricInfo
    network: Callable[[Tensor], Tensor]
    reference_folder: Path | None

    def features(self, images: Tensor) -> NDArray[np.float32]:
        """Extract features from images (N, 3, H, W) uint8 RGB: (N, d) float32."""
        batches = (images[i : i + BATCH_SIZE] for i in range(0, len(images), BATCH_SIZE))
        return np.concatenate([self.network(batch).float().cpu().numpy() for batch in batches])

    def reference(self) -> NDArray[np.float32]:
        """Features of the reference folder's images, or of fresh renders of the miniature's held-out captions."""
        import torch
        from tqdm import tqdm

        paths = image_paths(self.reference_folder) if self.reference_folder else None
        images = held_out_renders() if paths is None else map(read_square, paths)
        total = NUM_RENDERS if paths is None else len(paths)
        bar = tqdm(images, total=total, desc=f"{self.info.id} reference", unit="image")
        batches = (torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2) for batch in same_size_batches(bar))
        return np.concatenate([self.features(batch) for batch in batches])

    def distance(self, features: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
        """Fréchet distance of features (N, d) to reference features (M, d)."""
        return feature_distance(features, reference)


def held_out_renders() -> Iterator[NDArray[np.uint8]]:
    """Render the miniature's held-out captions in turn, each time anew: 512 images (64, 64, 3) uint8.

    The captions are those of the prompts, so that the distance is about pictures and not about which captions occur.
    """
    from hypersd_bench.pocket.prompts import held_out_prompts
    from hypersd_bench.pocket.scenes import Scene, parse_caption, render

    captions = [prompt.text for prompt in held_out_prompts().prompts]
    for i in range(NUM_RENDERS):
        yield render(Scene(*parse_caption(captions[i % len(captions)]), FIRST_RENDER_SEED + i)).image


def read_square(path: Path) -> NDArray[np.uint8]:
    """Read an image's centre square: (S, S, 3) uint8 RGB; InputError for a broken file."""
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, ValueError) as error:
        raise InputError(f"can't read reference image {path}: {error}") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.array(image.crop((left, top, left + side, top + side)))


def same_size_batches(images: Iterable[NDArray[np.uint8]]) -> Iterator[list[NDArray[np.uint8]]]:
    """Batch images in order; a batch ends where the size changes, so nothing is resized but by the network."""
    for _, run in groupby(images, key=lambda image: image.shape):
        while batch := list(islice(run, BATCH_SIZE)):
            yield batch


def _require_reference(context: MetricContext) -> None:
    """Raise InputError where the own reference, pictures of scenes, says nothing of the images."""
    if context.reference is None and not context.scenes:
        raise InputError("needs a reference: give --reference FOLDER of real images")


def _lite0(info: MetricInfo, context: MetricContext) -> Fid:
    from metrics.backbones import load_lite0

    _require_reference(context)
    return Fid(info, load_lite0(context.device), context.reference)


def _inception(info: MetricInfo, context: MetricContext) -> Fid:
    from metrics.backbones import load_inception

    _require_reference(context)
    return Fid(info, load_inception(context.device), context.reference)


LITE0 = Factory(
    MetricInfo(
        "fid/lite0", "FID (lite0)", "lower", "distance", "set",
        note="EfficientNet-Lite0 ImageNet features at 128 px; depends on the number of images; not published FID",
    ),
    _lite0,
)  # fmt: skip
INCEPTION = Factory(
    MetricInfo(
        "fid/inception", "FID (Inception)", "lower", "distance", "set",
        note="torch-fidelity's Inception-v3: TF1 bilinear resize to 299 px; depends on the number of images",
    ),
    _inception,
)  # fmt: skip
