"""LPIPS 0.1 on AlexNet (Zhang et al. 1801.03924): torchmetrics' network, its linear heads, torchvision's AlexNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hypersd_bench.contracts import MetricContext
from hypersd_bench.download import OwnerFile
from metrics.extractors.network import full_precision
from metrics.weights import WebFile, loading

if TYPE_CHECKING:
    from torch import Tensor, nn

FILE = "alexnet-owt-7be5be79.pth"
WEIGHTS = WebFile(
    "AlexNet for LPIPS",
    "HYPERSD_ALEXNET",
    OwnerFile(FILE, f"https://download.pytorch.org/models/{FILE}", "7be5be79"),
)


def load_lpips(context: MetricContext) -> Callable[[Tensor, Tensor], Tensor]:
    """Two batches (N, 3, H, W) uint8 RGB, at least 31 pixels each way, to N distances; one network for all metrics."""
    network = context.share("lpips network", lambda: _network(context.device))

    def distance(a: Tensor, b: Tensor) -> Tensor:
        with full_precision():
            found: Tensor = network(*(images.to(context.device).float() / 255 for images in (a, b)), normalize=True)
        return found.flatten()

    return distance


def _network(device: str) -> nn.Module:
    import torch
    from torchmetrics.functional.image.lpips import _LPIPS  # the public class downloads AlexNet by itself

    path = WEIGHTS.path()
    network = _LPIPS(net="alex", pnet_rand=True)
    with loading(WEIGHTS.what, path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        for part in network.net.children():
            for name, layer in part.named_children():  # named as in torchvision's AlexNet
                if layer.state_dict():
                    layer.load_state_dict({key: state[f"features.{name}.{key}"] for key in layer.state_dict()})
    return network.eval().to(device)
