"""What the preference models share: pixels as their authors prepare them, and the metric that asks a model.

Metrics run in float32 without autocast, and the size of a batch changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from hypersd_bench.contracts import MetricInfo
from metrics.extractors.network import BATCH_SIZE, full_precision

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's training pictures; BLIP and LAION's CLIPs kept it
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class PreferenceModel(Protocol):
    """A frozen judge of which picture of a prompt people prefer, from pixels that are prepared for it."""

    @property
    def size(self) -> int:
        """Side of the pictures it takes, in pixels."""
        ...

    def rate(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rate normalised pixels (N, 3, size, size) float32 against N prompts: (N,) float32, differentiable.

        Who calls it leaves autocast: a rating must not depend on what a pipeline or a student runs in.
        """
        ...


@dataclass(slots=True)
class Preference:
    """A preference model's rating of images on its authors' preprocessing; an ImageMetric.

    prepare: PIL image and the model's side to normalised pixels (3, side, side) float32.
    """

    info: MetricInfo
    model: PreferenceModel
    prepare: Callable[[Any, int], Tensor]
    device: str

    def score(self, images: Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Rate images (N, 3, H, W) uint8 RGB against their N prompts: (N,)."""
        import torch
        from torchvision.transforms.functional import to_pil_image

        scores = np.empty(len(images))
        for start in range(0, len(images), BATCH_SIZE):
            some = slice(start, start + BATCH_SIZE)
            with full_precision():
                shown = [self.prepare(to_pil_image(image.cpu()), self.model.size) for image in images[some]]
                ratings = self.model.rate(torch.stack(shown).to(self.device), prompts[some])
            scores[some] = ratings.double().cpu().numpy()
        return scores


def crop(image: Any, size: int, middle: Literal["rounded", "floored"] = "rounded") -> Tensor:
    """Resize a PIL image's short side to ``size`` by PIL's bicubic, crop the middle, normalise: (3, size, size).

    middle: where it starts when an odd number of pixels is cut: half of it rounded, as torchvision does, or floored,
    as transformers does.
    """
    from torchvision.transforms.functional import InterpolationMode, normalize, resize, to_tensor

    resized = resize(image.convert("RGB"), size, interpolation=InterpolationMode.BICUBIC)
    start = round if middle == "rounded" else math.floor
    left, top = (start((side - size) / 2) for side in resized.size)
    pixels: Tensor = normalize(to_tensor(resized.crop((left, top, left + size, top + size))), CLIP_MEAN, CLIP_STD)
    return pixels


def letterbox(image: Any, size: int) -> Tensor:
    """Resize a PIL image's long side to ``size``, black around the rest, normalise: (3, size, size).

    HPSv2's code makes a tensor before it resizes, so that bicubic overshoot stays; filtered (antialias), as
    torchvision does with tensors since 0.17.
    """
    from torchvision.transforms.functional import InterpolationMode, normalize, pad, resize, to_tensor

    pixels: Tensor = to_tensor(image.convert("RGB"))
    scale = size / max(pixels.shape[1:])
    height, width = (max(1, round(side * scale)) for side in pixels.shape[1:])
    pixels = resize(pixels, [height, width], interpolation=InterpolationMode.BICUBIC, antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    pixels = pad(pixels, [left, top, size - width - left, size - height - top])
    normalised: Tensor = normalize(pixels, CLIP_MEAN, CLIP_STD)
    return normalised


def fill(model: Any, state: Mapping[str, Tensor]) -> None:
    """Load a state; ValueError names the first weight that is missing or that the model doesn't have."""
    keys = model.load_state_dict(state, strict=False)
    refuse(keys.missing_keys, keys.unexpected_keys)


def refuse(missing: Sequence[str], unexpected: Sequence[str] = ()) -> None:
    """Raise a ValueError of one line unless both lists of weights' names are empty."""
    for names, what in ((missing, "no"), (unexpected, "a foreign")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"it has {what} {sorted(names)[0]}{more}")
