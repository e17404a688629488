"""Stage ``segmenter``: a small SOLO for scenes, Hyper-SD's perceptual reward on the miniature (its Eq. 14).

As SOLO (Wang et al. 1912.04488), a grid of cells says which concept has its centre there, and each cell has a mask of
the whole picture; as in SOLOv2 (2003.10152), a cell's mask is its kernel's product with features that all cells share.
The loss is SOLO's, 3 Dice + 1 focal, here averaged over pictures, so that a batch's is the mean of its parts'.

It shares no weights with the checker, which must stay able to judge what was trained to please this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torchvision.ops import masks_to_boxes, sigmoid_focal_loss

from hypersd_bench.errors import InputError
from hypersd_bench.pocket.pictures import Pictures, as_float, flawed, weights_file
from hypersd_bench.pocket.scenes import CONCEPT_NAMES, SIZE, Scene, render, sample_scene
from hypersd_bench.pocket.training import Schedule, fit, scene_pool
from hypersd_bench.sampling import read_safetensors_metadata
from hypersd_bench.store import write_bytes

GRID = 8  # cells on a side, 8x8 pixels each: two emoji side by side never share one
CENTRE = 0.2  # of an instance's height and width around its centre of mass: cells there are its own (SOLO's epsilon)
DICE_WEIGHT, FOCAL_WEIGHT = 3.0, 1.0
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
PRIOR = 0.01  # what every cell says of every concept at the start, so that the many empty ones don't drown the rest
FEATURES = 16  # channels of a kernel and of the shared mask features
MIN_SCORE = 0.3
MAX_OVERLAP = 0.5  # IoU from which the lower-scored of two found masks is the same object again
WEIGHTS_FILE = "segmenter.safetensors"


class Instances(Protocol):
    """The objects of one picture.

    labels: (K,) int64, indices into CONCEPT_NAMES. masks: (K, 64, 64) bool. boxes: (K, 4) float32, x1 y1 x2 y2 in
    pixels, the far edges exclusive.
    """

    @property
    def labels(self) -> Tensor:
        """What each is."""

    @property
    def masks(self) -> Tensor:
        """Which pixels are each one's."""

    @property
    def boxes(self) -> Tensor:
        """How far each one reaches."""


class SceneInstances(NamedTuple):
    """Instances as a scene has them."""

    labels: Tensor
    masks: Tensor
    boxes: Tensor


class Found(NamedTuple):
    """An object that the segmenter sees: an index into CONCEPT_NAMES, a score in [0, 1], a mask (64, 64) bool."""

    label: int
    score: float
    mask: Tensor


class Maps(NamedTuple):
    """What the network says of N pictures.

    concepts: (N, 16, 8, 8) logits. kernels: (N, 16, 8, 8). features: (N, 16, 32, 32).
    """

    concepts: Tensor
    kernels: Tensor
    features: Tensor


class GridTargets(NamedTuple):
    """One picture's truth on the grid.

    concepts: (16, 8, 8) float, 1 where a cell is a concept's own. cells: (P,) int64, the cells that have an owner.
    owners: (P,) int64, which instance.
    """

    concepts: Tensor
    cells: Tensor
    owners: Tensor


class Solo(nn.Module):
    """(N, 3, 64, 64) in [0, 1] to Maps; about 280,000 parameters."""

    def __init__(self) -> None:
        """Build it untrained."""
        super().__init__()
        self.stem = _conv(3 + 2, 24, 5, stride=2)
        self.fine = _Residual(24)
        self.middle = nn.Sequential(_conv(24, 48, stride=2), _Residual(48))
        self.coarse = nn.Sequential(_conv(48, 80, stride=2), _Residual(80))
        self.concepts = nn.Sequential(_conv(80, 64), nn.Conv2d(64, len(CONCEPT_NAMES), 1))
        self.kernels = nn.Conv2d(80 + 2, FEATURES, 1)
        self.laterals = nn.ModuleList(nn.Conv2d(width, 32, 1) for width in (24, 48, 80))
        self.masks = nn.Sequential(_conv(32 + 2, 32), nn.Conv2d(32, FEATURES, 1))
        last = self.concepts[-1]
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        nn.init.normal_(last.weight, std=0.01)
        nn.init.constant_(last.bias, float(np.log(PRIOR / (1 - PRIOR))))

    def forward(self, x: Tensor) -> Maps:
        """Read pictures."""
        fine = self.fine(self.stem(_with_place(2 * x - 1)))
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        pyramid = [_resized(lateral(level), fine.shape[-1])
                   for lateral, level in zip(self.laterals, (fine, middle, coarse), strict=True)]  # fmt: skip
        features = self.masks(_with_place(torch.stack(pyramid).sum(0)))
        return Maps(self.concepts(coarse), self.kernels(_with_place(coarse)), features)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(_conv(width, width), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layers(x)
        return y


def _conv(inputs: int, outputs: int, side: int = 3, stride: int = 1) -> nn.Sequential:
    # GELU: a reward's gradient should not have the kinks of a ReLU
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False), nn.GroupNorm(4, outputs), nn.GELU()
    )


def _with_place(x: Tensor) -> Tensor:
    """Add two channels that say where each pixel is, in [-1, 1]: convolutions alone can't tell two twins apart."""
    line = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype, device=x.device)
    place = torch.stack(torch.meshgrid(line, line, indexing="ij"))
    return torch.cat([x, place.expand(len(x), -1, -1, -1)], 1)


def _resized(x: Tensor, side: int) -> Tensor:
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class PocketSegmenter:
    """The segmenter, ready to find objects and to say how far pictures are from showing what they should."""

    net: Solo

    def loss(self, pixels: Tensor, instances: Sequence[Instances]) -> Tensor:
        """L_instance(m_I(x0'), GT(x0)) of Hyper-SD, Eq. 14: a scalar with gradient, mean of ``losses``."""
        return self.losses(pixels, instances).mean()

    def losses(self, pixels: Tensor, instances: Sequence[Instances]) -> Tensor:
        """Each picture's loss, (N,), from pixels (N, 3, 64, 64) in [0, 1] and the N pictures' true objects."""
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, SIZE, SIZE):
            raise InputError(
                f"the miniature's segmenter reads pictures (N, 3, {SIZE}, {SIZE}), not {tuple(pixels.shape)}; "
                "for other bases choose another perceptual reward"
            )
        return solo_losses(self.net(pixels.to(next(self.net.parameters()).dtype)), instances)

    @torch.no_grad()
    def segment(self, images: Tensor) -> list[list[Found]]:
        """Find the objects of images (N, 3, 64, 64) uint8, the surest first."""
        device = next(self.net.parameters()).device
        found: list[list[Found]] = []
        for part in images.split(256):
            maps = self.net(as_float(part, device))
            scores = maps.concepts.sigmoid()
            # a cell speaks for its neighbours if it is surer than they are
            peaks = scores * (scores == F.max_pool2d(scores, 3, stride=1, padding=1))
            found += [_objects(peaks[i], maps.kernels[i], maps.features[i]) for i in range(len(part))]
        return found


def _objects(peaks: Tensor, kernels: Tensor, features: Tensor) -> list[Found]:
    """Read one picture's scores (16, 8, 8), kernels (16, 8, 8) and features (16, 32, 32)."""
    labels, rows, columns = (peaks > MIN_SCORE).nonzero(as_tuple=True)
    order = peaks[labels, rows, columns].argsort(descending=True)
    labels, rows, columns = labels[order], rows[order], columns[order]
    masks = mask_logits(kernels[:, rows, columns].T, features.expand(len(rows), -1, -1, -1)) > 0
    kept: list[Found] = []
    for label, score, mask in zip(labels.tolist(), peaks[labels, rows, columns].tolist(), masks, strict=True):
        if mask.any() and all(mask_iou(mask, other.mask) < MAX_OVERLAP for other in kept):
            kept.append(Found(label, score, mask))
    return kept


def mask_iou(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two masks (H, W) bool; 0 where both are empty."""
    return float((a & b).sum() / (a | b).sum().clamp(min=1))


def panoptic_quality(found: Sequence[Found], truth: Instances) -> float:
    """Panoptic quality of one picture in [0, 1] (Kirillov et al. 1801.00868, Eq. 1), all concepts pooled.

    The IoU of all pairs of one concept with IoU above a half, over their number plus half of what is left unmatched.
    """
    pairs = [mask_iou(mask, true)
             for label, _, mask in found
             for label_true, true in zip(truth.labels.tolist(), truth.masks.to(mask.device), strict=True)
             if label == label_true]  # fmt: skip
    matched = [iou for iou in pairs if iou > 0.5]  # found masks overlap by less, so no object is matched twice
    everything = len(found) + len(truth.labels)
    return 2 * sum(matched) / everything if everything else 1.0


def mask_logits(kernels: Tensor, features: Tensor) -> Tensor:
    """Masks of P cells at the picture's size, (P, 64, 64), from kernels (P, C) and features (P, C, 32, 32)."""
    return _resized(torch.einsum("pc,pchw->phw", kernels, features)[:, None], SIZE)[:, 0]


def solo_losses(maps: Maps, instances: Sequence[Instances]) -> Tensor:
    """Each picture's 3 mean Dice over its cells + 1 focal sum over (its cells + 1), (N,); SOLO Eq. 1 and 3."""
    device, dtype = maps.concepts.device, torch.promote_types(maps.concepts.dtype, torch.float32)
    targets = [grid_targets(truth) for truth in instances]
    wanted = torch.stack([target.concepts for target in targets]).to(device, dtype)
    focal = sigmoid_focal_loss(maps.concepts.to(dtype), wanted, FOCAL_ALPHA, FOCAL_GAMMA)
    count = torch.tensor([len(target.cells) for target in targets])
    picture = torch.arange(len(targets)).repeat_interleave(count).to(device)
    cell = torch.cat([target.cells for target in targets]).to(device)
    masks = torch.cat([truth.masks.cpu()[target.owners] for truth, target in zip(instances, targets, strict=True)])
    kernels = maps.kernels.flatten(2)[picture, :, cell]
    probabilities = mask_logits(kernels, maps.features[picture]).to(dtype).sigmoid()
    dice = dice_losses(probabilities, masks.to(device, dtype))
    count = count.to(device)
    share = (1 / count.clamp(min=1))[picture].to(dtype)
    mean_dice = torch.zeros(len(targets), dtype=dtype, device=device).index_add(0, picture, dice * share)
    losses: Tensor = DICE_WEIGHT * mean_dice + FOCAL_WEIGHT * focal.sum((1, 2, 3)) / (count + 1)
    return losses


def dice_losses(probabilities: Tensor, masks: Tensor) -> Tensor:
    """1 - 2 sum pq / (sum p^2 + sum q^2) of P masks (P, H, W) in [0, 1], (P,); SOLO Eq. 5."""
    p, q = probabilities.flatten(1), masks.flatten(1)
    return 1 - 2 * (p * q).sum(1) / (p.square().sum(1) + q.square().sum(1)).clamp(min=1e-6)


def grid_targets(truth: Instances) -> GridTargets:
    """Give each visible instance the cells around its centre of mass, at most 3x3; the smaller one wins a cell."""
    labels, masks, boxes = truth.labels.cpu(), truth.masks.cpu(), truth.boxes.cpu().double()
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(CONCEPT_NAMES):
        raise InputError(
            f"the miniature's segmenter knows labels 0 to {len(CONCEPT_NAMES) - 1}, not {labels.tolist()}; "
            "it can only be a reward for pictures of the miniature"
        )
    area = masks.double().sum((1, 2))
    owner = torch.full((GRID, GRID), -1)
    for k in area.argsort(descending=True, stable=True).tolist():
        if area[k] > 0:
            # pixel centres lie at a half
            centre = masks[k].nonzero().double().mean(0).add(0.5)
            half = CENTRE / 2 * (boxes[k, 2:] - boxes[k, :2]).flip(0)  # of y, x
            home, low, high = (((centre + shift) * GRID / SIZE).long().clamp(0, GRID - 1) for shift in (0, -half, half))
            top, left = torch.maximum(low, home - 1).tolist()
            bottom, right = torch.minimum(high, home + 1).tolist()
            owner[top : bottom + 1, left : right + 1] = k
    cells = owner.flatten().ge(0).nonzero()[:, 0]
    owners = owner.flatten()[cells]
    concepts = torch.zeros(len(CONCEPT_NAMES), GRID * GRID)
    concepts[labels[owners], cells] = 1
    return GridTargets(concepts.view(-1, GRID, GRID), cells, owners)


def scene_instances(scene: Scene) -> SceneInstances:
    """A scene's objects: labels (K,) int64, masks (K, 64, 64) bool where alpha is above a half, boxes (K, 4)."""
    masks = torch.from_numpy(render(scene).masks) > 0.5
    boxes = masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0])  # torchvision's far edge is the last pixel
    return SceneInstances(torch.tensor([CONCEPT_NAMES.index(name) for name in scene.concepts]), masks, boxes)


def train_segmenter(
    folder: Path, schedule: Schedule, pool_size: int, device: torch.device, vae: AutoencoderKL | None = None
) -> tuple[PocketSegmenter, dict[str, Any]]:
    """Train on rendered scenes, part of them through ``vae``; returns the segmenter and the facts of the training."""
    pictures = Pictures(scene_pool(folder, pool_size), vae, folder)
    torch.manual_seed(0)
    segmenter = PocketSegmenter(Solo().to(device))

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([step, 7])
        index = rng.integers(pool_size, size=schedule.batch_size)
        truth = [scene_instances(sample_scene(int(seed))) for seed in index]
        return segmenter.loss(flawed(pictures.draw(index, rng, device), rng), truth), {}

    facts = fit("segmenter", segmenter.net, loss_at, schedule, folder, device)
    return segmenter, facts


def save_segmenter(segmenter: PocketSegmenter, folder: Path) -> None:
    """Write the segmenter's weights in half precision."""
    tensors = {name: value.detach().cpu().half().contiguous() for name, value in segmenter.net.state_dict().items()}
    write_bytes(folder / WEIGHTS_FILE, safetensors.torch.save(tensors, {"concepts": " ".join(CONCEPT_NAMES)}))


def load_segmenter(folder: Path, device: torch.device | str = "cpu") -> PocketSegmenter:
    """Load the segmenter, frozen; raises InputError when its file is missing, broken or of another world."""
    path = weights_file(folder, WEIGHTS_FILE, "segmenter")
    if read_safetensors_metadata(path).get("concepts") != " ".join(CONCEPT_NAMES):
        raise InputError(f"{path} was trained for other emoji; build it again with: hypersd-bench pocket build")
    net = Solo()
    try:
        net.load_state_dict(safetensors.torch.load_file(path))
    except RuntimeError as error:
        raise InputError(
            f"{path} holds another network than this version's; build it again with: hypersd-bench pocket build"
        ) from error
    return PocketSegmenter(net.eval().requires_grad_(False).to(device))
