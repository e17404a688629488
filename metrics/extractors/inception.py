"""Inception-v3 of the original FID (TensorFlow, 2015-12-05) in the conventions that people cite: features (N, 2048).

One network and one set of weights; what differs is how an image becomes 299 pixels and is scaled, and that alone moves
FID by several points at 1024 pixels (Parmar et al. 2104.11222).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from hypersd_bench.contracts import MetricContext
from hypersd_bench.download import OwnerFile
from metrics.extractors.network import NetworkExtractor, Source, file_fingerprint
from metrics.factory import Package
from metrics.weights import WebFile, loading

if TYPE_CHECKING:
    from torch import Tensor

SIZE = 299
PREPROCESSING = 1
FILE = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS = WebFile(
    "Inception-v3 of FID",
    "HYPERSD_INCEPTION",
    OwnerFile(FILE, f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}", "6726825d"),
)
TORCH_FIDELITY = Package("torch_fidelity", "pip install 'hypersd-bench[inception]'")


def tf1_input(images: Tensor) -> Tensor:
    """The original's and torch-fidelity's: TensorFlow 1's bilinear, which neither centres pixels nor antialiases."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    x: Tensor = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(SIZE, SIZE), align_corners=False)
    return (x - 128) / 128


def pytorch_fid_input(images: Tensor) -> Tensor:
    """pytorch-fid's: torch's bilinear without antialias, then -1 to 1."""
    from torch.nn.functional import interpolate

    return 2 * interpolate(images.float() / 255, size=(SIZE, SIZE), mode="bilinear", align_corners=False) - 1


def torchmetrics_input(images: Tensor) -> Tensor:
    """torchmetrics', from its version 1.8: torch's bilinear with antialias."""
    from torch.nn.functional import interpolate

    x = interpolate(images.float(), size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
    return (x - 128) / 128


def clean_input(images: Tensor) -> Tensor:
    """clean-fid's: PIL's bicubic, which antialiases, each channel in float32, clipped to 0-255 and not rounded."""
    import torch
    from PIL import Image

    height, width = images.shape[-2:]
    channels = images.reshape(-1, height, width).cpu().numpy().astype(np.float32)
    resized = [Image.fromarray(channel).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for channel in channels]
    x = torch.from_numpy(np.stack([np.asarray(channel) for channel in resized]))
    return (x.clamp(0, 255).reshape(-1, 3, SIZE, SIZE) - 128) / 128


def clean_512_input(images: Tensor) -> Tensor:
    """DMD2's: the centre square to 512 pixels by PIL's Lanczos, in 8 bits, then clean-fid's."""
    import torch
    from PIL import Image
    from torchvision.transforms.functional import center_crop

    squares = center_crop(images, [min(images.shape[-2:])] * 2).permute(0, 2, 3, 1).cpu().numpy()
    resized = [Image.fromarray(square).resize((512, 512), Image.Resampling.LANCZOS) for square in squares]
    return clean_input(torch.from_numpy(np.stack([np.asarray(square) for square in resized])).permute(0, 3, 1, 2))


def patch_input(images: Tensor) -> Tensor:
    """DMD2's patch FID: the centre of 299 pixels as it is; a smaller photo of the reference is resized, as there."""
    from torchvision.transforms.functional import center_crop

    if min(images.shape[-2:]) < SIZE:
        return clean_input(images)
    cropped: Tensor = center_crop(images, [SIZE, SIZE])
    return (cropped.float() - 128) / 128


def load_network(device: str) -> Callable[[Tensor], Tensor]:
    """The network without torch-fidelity's own resize: input (N, 3, 299, 299), -1 to 1, to features (N, 2048)."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = WEIGHTS.path()
    with loading(WEIGHTS.what, path):
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity unpickles whatever it is given
        model: Any = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
        ).to(device)

    def pooled(x: Tensor) -> Tensor:
        x = x.to(device)
        for name, layer in model.named_children():  # in the order in which its forward calls them
            x = layer(x)
            if name == "AvgPool":
                break
        return x.flatten(1)

    return pooled


def _convention(id: str, prepare: Callable[[Tensor], Tensor]) -> Source[NetworkExtractor]:
    def build(id: str, context: MetricContext) -> NetworkExtractor:
        network = context.share("inception network", lambda: load_network(context.device))
        return NetworkExtractor(
            id,
            file_fingerprint(WEIGHTS.path(), PREPROCESSING),
            lambda images: network(prepare(images.to(context.device))),
        )

    return Source(id, build, (WEIGHTS,), (TORCH_FIDELITY,))


TF1 = _convention("inception/tf1", tf1_input)
PYTORCH_FID = _convention("inception/pytorch-fid", pytorch_fid_input)
TORCHMETRICS = _convention("inception/torchmetrics", torchmetrics_input)
CLEAN = _convention("inception/clean", clean_input)
CLEAN_512 = _convention("inception/clean-512", clean_512_input)
PATCH = _convention("inception/patch", patch_input)
