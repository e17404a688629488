"""How different two images look: distances between spatial feature maps, not between embeddings of their content.

A CLIP embedding is trained to ignore what diversity is about: two layouts of one caption are alike to it. Maps keep
place and colour. They are compared as by LPIPS (Zhang et al. 2018, eq. 1): features of unit length at every position,
squared differences summed over channels, averaged over positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hypersd_bench.contracts import MetricContext

if TYPE_CHECKING:
    from torch import Tensor

# The first four stages of EfficientNet-Lite0, at strides 2 to 16. The fifth knows what is there more than where: on
# the miniature's scenes a little noise (3 levels of 255) moves it more than another layout of the same caption does.
NUM_STAGES = 4
BATCH_SIZE = 32
EPS = 1e-10  # of LPIPS: keeps the length of an all-zero feature from dividing by zero


class Distance(Protocol):
    """A distance between images (N, 3, H, W) uint8 RGB: symmetric, 0 for equal ones."""

    def between(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare a[i] with b[i]: (N,) float64."""
        ...

    def among(self, images: Tensor) -> Tensor:
        """Compare all with all: (N, N) float64."""
        ...


@dataclass(slots=True)
class MapDistance:
    """Mean over maps and positions of 1 - cosine, half LPIPS' squared difference, without learned channel weights."""

    maps: Callable[[Tensor], list[Tensor]]

    def between(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare a[i] with b[i]: (N,) in [0, 2]."""
        import torch

        parts = []
        for x, y in zip(a.split(BATCH_SIZE), b.split(BATCH_SIZE), strict=True):
            maps = zip(map(_unit, self.maps(x)), map(_unit, self.maps(y)), strict=True)
            parts.append(torch.stack([(u - v).square().sum(1).mean((1, 2)) / 2 for u, v in maps]).mean(0))
        return torch.cat(parts)

    def among(self, images: Tensor) -> Tensor:
        """Compare all with all: (N, N) in [0, 2]; each image passes the network once."""
        import torch

        maps = [torch.cat(parts) for parts in zip(*map(self.maps, images.split(BATCH_SIZE)), strict=True)]
        return torch.stack([_among(_unit(x)) for x in maps]).mean(0)


@dataclass(slots=True)
class PairDistance:
    """A distance that is only given pair by pair, as LPIPS is."""

    distance: Callable[[Tensor, Tensor], Tensor]

    def between(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare a[i] with b[i]: (N,)."""
        import torch

        batches = zip(a.split(BATCH_SIZE), b.split(BATCH_SIZE), strict=True)
        return torch.cat([self.distance(x, y).double() for x, y in batches])

    def among(self, images: Tensor) -> Tensor:
        """Compare all with all, each pair once: (N, N)."""
        import torch

        i, j = torch.triu_indices(len(images), len(images), offset=1)
        found = self.between(images[i], images[j])
        table = found.new_zeros(len(images), len(images))
        table[i, j] = table[j, i] = found
        return table


def load_lite0_distance(context: MetricContext) -> MapDistance:
    """Distances of EfficientNet-Lite0's maps at 128 px."""
    from metrics.extractors.lite0 import load_maps

    return MapDistance(load_maps(context, NUM_STAGES))


def load_lpips_distance(context: MetricContext) -> PairDistance:
    """LPIPS on AlexNet, at the images' own size."""
    from metrics.lpips import load_lpips

    return PairDistance(load_lpips(context))


def _unit(x: Tensor) -> Tensor:
    """Scale features (N, C, H, W) to unit length at each position, in float64."""
    x = x.double()
    length: Tensor = x.norm(dim=1, keepdim=True)
    return x / (length + EPS)


def _among(u: Tensor) -> Tensor:
    """Half the squared distances of unit features (N, C, H, W), mean over positions: (N, N); exactly 0 to itself."""
    flat = u.flatten(1)
    products = flat @ flat.T / u[0, 0].numel()
    squares = products.diagonal()
    return ((squares[:, None] + squares[None]) / 2 - products).clamp(min=0)  # rounding may leave -1e-17
