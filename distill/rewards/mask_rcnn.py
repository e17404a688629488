"""The perceptual reward by instance segmentation (Hyper-SD 2404.13686, eq. 14), with torchvision's Mask R-CNN.

The paper uses SOLO, whose code has no maintained home. Mask R-CNN's own training losses are as differentiable: region
proposals (objectness, box), then class, box and mask of each region.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill.batch import Instances
from distill.rewards.preprocess import full_precision
from hypersd_bench.download import OwnerFile
from hypersd_bench.errors import InputError
from metrics.weights import WebFile, loading

FILE = "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"
URL = f"https://download.pytorch.org/models/{FILE}"
SHA256 = "bf2d0c1e"  # first digits, as its name says
COCO_LABELS = 90  # COCO's category ids are 1 to 90, with gaps; 0 is background


@dataclass(frozen=True, slots=True)
class MaskRCNN:
    """A frozen Mask R-CNN of COCO's categories; a Segmenter."""

    model: Any  # torchvision's MaskRCNN, from ``detector``
    id: str = "mask-rcnn"

    def loss(self, pixels: Tensor, instances: Sequence[Instances], seed: int = 0) -> Tensor:
        """Sum of its five losses for pixels (B, 3, H, W) in [0, 1], unweighted as torchvision trains it: a scalar.

        instances: labels are COCO category ids; a picture without any must then have nothing in it. seed: of the
        draw of regions; the same arguments always give the same loss.
        """
        targets = [_target(found, pixels) for found in instances]
        with _seeded(pixels.device, seed), full_precision(pixels.device):
            losses: dict[str, Tensor] = self.model(list(pixels.float()), targets)
        return torch.stack(list(losses.values())).sum()


def load(device: torch.device) -> MaskRCNN:
    """Load torchvision's COCO weights; InputError with the remedy when they can't be had."""
    weights = WebFile("Mask R-CNN", "HYPERSD_MASK_RCNN", OwnerFile(FILE, URL, SHA256))
    path = weights.path()
    model = detector()
    with loading(weights.what, path):
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return MaskRCNN(model.to(device))


def detector() -> Any:
    """Torchvision's ``maskrcnn_resnet50_fpn`` without weights, frozen, in the mode in which it gives losses.

    Batch norm is frozen by kind, not by mode, so that no statistics can move; eps is 0 as for the published weights.
    """
    from torchvision.models.detection import MaskRCNN as Detector
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops import FrozenBatchNorm2d

    norm = partial(FrozenBatchNorm2d, eps=0.0)
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=norm)
    return Detector(backbone, num_classes=COCO_LABELS + 1).train().requires_grad_(False)


def _target(found: Instances, pixels: Tensor) -> dict[str, Tensor]:
    """What torchvision wants to be told of a picture; a box without area can't be found and is left out."""
    if len(found.labels) and not (found.labels.min() >= 1 and found.labels.max() <= COCO_LABELS):
        wrong = [label for label in found.labels.tolist() if not 1 <= label <= COCO_LABELS]
        raise InputError(
            f"mask-rcnn knows COCO's category ids, 1 to {COCO_LABELS}; the data's instances have {wrong[0]}"
        )
    whole = (found.boxes[:, 2:] > found.boxes[:, :2]).all(1)
    parts = {"boxes": found.boxes.float(), "labels": found.labels, "masks": found.masks.to(torch.uint8)}
    return {name: value[whole].to(pixels.device) for name, value in parts.items()}


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Draw from a seed, and leave the global random state as it was: a resumed run must not notice."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
