"""Segmenters: torchvision's own losses, gradient to the pixels, no statistics moved, no global randomness used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn

from distill.batch import Instances
from distill.rewards import mask_rcnn, pocket_segmenter
from distill.rewards.contract import Segmenter
from distill.rewards.mask_rcnn import MaskRCNN, detector
from hypersd_bench import registry
from hypersd_bench.errors import InputError
from hypersd_bench.pocket import WEIGHTS, segmenter
from hypersd_bench.pocket.scenes import render, scenes

CPU = torch.device("cpu")


def objects(*boxes: tuple[int, int, int, int], labels: tuple[int, ...] = ()) -> Instances:
    """Objects that fill their boxes in a picture of 64 x 64."""
    masks = torch.zeros((len(boxes), 64, 64), dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    ids = torch.tensor(labels or (1,) * len(boxes), dtype=torch.int64)
    return Instances(ids, masks, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))


TWO = objects((8, 8, 40, 40), (30, 20, 60, 64), labels=(1, 90))
NONE = objects()


def small(model: Any) -> Any:
    """Let a detector work at 64 pixels instead of 800, and propose few regions."""
    model.transform.min_size = (64,)
    model.rpn._pre_nms_top_n = model.rpn._post_nms_top_n = {"training": 64, "testing": 64}
    return model


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights under torchvision's names, normalisation statistics and all, as in the published file."""
    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return dict(model.state_dict())


@pytest.fixture(scope="module")
def judge(state: dict[str, Tensor]) -> MaskRCNN:
    model = detector()
    model.load_state_dict(state)
    return MaskRCNN(small(model))


@pytest.fixture
def x() -> Tensor:
    return torch.rand((2, 3, 64, 64), generator=torch.Generator().manual_seed(1)).requires_grad_()


def test_the_loss_is_torchvision_s_with_its_batch_norm_at_rest(
    judge: MaskRCNN, state: dict[str, Tensor], x: Tensor
) -> None:
    theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    theirs.load_state_dict(state)
    small(theirs).train()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.eps = 0.0
    targets = [{"boxes": i.boxes, "labels": i.labels, "masks": i.masks.to(torch.uint8)} for i in (TWO, TWO)]
    torch.manual_seed(5)
    losses = theirs(list(x.detach()), targets)
    assert sorted(losses) == ["loss_box_reg", "loss_classifier", "loss_mask", "loss_objectness", "loss_rpn_box_reg"]
    want = sum(float(loss.detach()) for loss in losses.values())
    assert judge.loss(x.detach(), [TWO, TWO], seed=5).item() == pytest.approx(want, rel=1e-4)


def test_gradient_reaches_every_picture_and_no_weight(judge: MaskRCNN, x: Tensor) -> None:
    before = {name: value.clone() for name, value in judge.model.state_dict().items()}
    loss = judge.loss(x, [TWO, objects((0, 0, 20, 20))])
    assert loss.shape == ()
    loss.backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert (x.grad.abs().sum((1, 2, 3)) > 0).all()
    assert all(weight.grad is None for weight in judge.model.parameters())
    for name, value in judge.model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} moved"


def test_following_the_gradient_lowers_the_loss(judge: MaskRCNN, x: Tensor) -> None:
    with torch.no_grad():
        start = judge.loss(x, [TWO, TWO]).item()
    y = x.detach().clone().requires_grad_()
    for _ in range(3):
        (gradient,) = torch.autograd.grad(judge.loss(y, [TWO, TWO]), y)
        y = (y - 0.05 * gradient.sign()).clamp(0, 1).detach().requires_grad_()
    with torch.no_grad():
        assert judge.loss(y, [TWO, TWO]).item() < 0.95 * start


def test_the_draw_of_regions_is_the_seed_s_alone(judge: MaskRCNN, x: Tensor) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = judge.loss(x, [TWO, TWO], seed=3)
    assert torch.equal(torch.get_rng_state(), before), "the global random state moved"
    torch.manual_seed(2)
    assert judge.loss(x, [TWO, TWO], seed=3).item() == first.item()
    assert judge.loss(x, [TWO, TWO], seed=4).item() != first.item()


@pytest.mark.parametrize("found", [[NONE, TWO], [TWO, NONE], [NONE, NONE]])
def test_pictures_without_objects_only_have_background_to_get_right(
    found: list[Instances], judge: MaskRCNN, x: Tensor
) -> None:
    loss = judge.loss(x, found)
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert (gradient.abs().sum((1, 2, 3)) > 0).all()


def test_a_box_without_area_is_left_out(judge: MaskRCNN, x: Tensor) -> None:
    beside = objects((8, 8, 40, 40), (5, 5, 5, 9), labels=(1, 3))
    alone = objects((8, 8, 40, 40))
    assert judge.loss(x, [beside, TWO]).item() == judge.loss(x, [alone, TWO]).item()


@pytest.mark.parametrize("label", [0, 91])
def test_labels_that_coco_does_not_have_are_refused(label: int, judge: MaskRCNN, x: Tensor) -> None:
    with pytest.raises(InputError, match=f"1 to 90; the data's instances have {label}"):
        judge.loss(x, [TWO, objects((1, 1, 9, 9), labels=(label,))])


def test_the_student_s_precision_does_not_matter(judge: MaskRCNN, x: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        mixed = judge.loss(x, [TWO, TWO])
    assert mixed.item() == judge.loss(x, [TWO, TWO]).item()


def test_the_published_file_s_layout_loads(
    state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / mask_rcnn.FILE
    torch.save(state, path)
    monkeypatch.setenv("HYPERSD_MASK_RCNN", str(path))
    with pytest.raises(InputError, match="sha256"):
        mask_rcnn.load(CPU)
    monkeypatch.setattr(mask_rcnn, "SHA256", "")
    loaded = mask_rcnn.load(CPU).model
    assert loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name])


def test_missing_weights_name_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HYPERSD_MASK_RCNN", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"put it at \S+maskrcnn\S+, or set HYPERSD_MASK_RCNN"):
        registry.resolve("segmenter", "mask-rcnn")(CPU)


def test_the_miniature_s_row_loads_its_segmenter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, x: Tensor) -> None:
    monkeypatch.setattr(pocket_segmenter, "WEIGHTS", tmp_path)
    load = registry.resolve("segmenter", "pocket")
    with pytest.raises(InputError, match="pocket build"):
        load(CPU)
    segmenter.save_segmenter(segmenter.PocketSegmenter(segmenter.Solo()), tmp_path)
    judge: Segmenter = load(CPU)
    assert judge.id == "pocket"
    told = [Instances(*segmenter.scene_instances(scene)) for scene in scenes(7, 2)]
    loss = judge.loss(x, told)
    assert loss.item() == segmenter.load_segmenter(tmp_path).loss(x, told).item()
    (gradient,) = torch.autograd.grad(loss, x)
    assert (gradient.abs().sum((1, 2, 3)) > 0).all()


@pytest.mark.skipif(not (WEIGHTS / segmenter.WEIGHTS_FILE).is_file(), reason="the miniature has no segmenter yet")
def test_the_miniature_s_segmenter_prefers_the_right_picture() -> None:
    shown = list(scenes(7, 4, "held-out"))
    pixels = torch.from_numpy(np.stack([render(scene).image for scene in shown])).permute(0, 3, 1, 2) / 255
    told = [Instances(*segmenter.scene_instances(scene)) for scene in shown]
    judge: Segmenter = registry.resolve("segmenter", "pocket")(CPU)
    assert judge.loss(pixels, told) < judge.loss(pixels, told[1:] + told[:1])
