"""The miniature's segmenter: its losses against outside numbers, what its loss tells apart, its training and files."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional
from torchmetrics.detection import PanopticQuality
from torchvision.ops import sigmoid_focal_loss

from hypersd_bench.errors import InputError
from hypersd_bench.pocket import WEIGHTS
from hypersd_bench.pocket.check import check_segmenter, wrongly_named
from hypersd_bench.pocket.scenes import CONCEPT_NAMES, Scene, render, scenes
from hypersd_bench.pocket.segmenter import (
    FEATURES,
    GRID,
    WEIGHTS_FILE,
    Found,
    Maps,
    PocketSegmenter,
    SceneInstances,
    Solo,
    dice_losses,
    grid_targets,
    load_segmenter,
    mask_iou,
    mask_logits,
    panoptic_quality,
    save_segmenter,
    scene_instances,
    solo_losses,
    train_segmenter,
)
from hypersd_bench.pocket.training import Schedule

CPU = torch.device("cpu")
TINY = Schedule(steps=3, batch_size=8, learning_rate=1e-3, warmup=1)
POOL = 24
NONE = SceneInstances(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 64, 64, dtype=torch.bool), torch.zeros(0, 4))
shipped = pytest.mark.skipif(not (WEIGHTS / WEIGHTS_FILE).is_file(), reason="the miniature is not built yet")


def squares(*objects: tuple[str, int, int, int]) -> SceneInstances:
    """Square objects: (concept, top, left, side)."""
    masks, boxes = torch.zeros(len(objects), 64, 64, dtype=torch.bool), torch.zeros(len(objects), 4)
    for k, (_, top, left, side) in enumerate(objects):
        masks[k, top : top + side, left : left + side] = True
        boxes[k] = torch.tensor([left, top, left + side, top + side])
    return SceneInstances(torch.tensor([CONCEPT_NAMES.index(name) for name, *_ in objects]), masks, boxes)


def moved(truth: SceneInstances, pixels: int) -> SceneInstances:
    """The same objects further down."""
    return truth._replace(masks=truth.masks.roll(pixels, 1), boxes=truth.boxes + torch.tensor([0, pixels, 0, pixels]))


def pictures(held_out: list[Scene]) -> Tensor:
    """(N, 3, 64, 64) uint8."""
    return torch.from_numpy(np.stack([render(scene).image for scene in held_out])).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def held_out() -> list[Scene]:
    """Sixty scenes of combinations no training has seen."""
    return list(scenes(60_000_000, 60, "held-out"))


@pytest.fixture
def untrained() -> PocketSegmenter:
    """Random weights, in float64."""
    torch.manual_seed(0)
    return PocketSegmenter(Solo().double().requires_grad_(False))


@pytest.fixture(scope="module")
def segmenter() -> PocketSegmenter:
    """The shipped one."""
    return load_segmenter(WEIGHTS)


# the truth


def test_a_scene_s_objects_are_its_masks(held_out: list[Scene]) -> None:
    scene = next(scene for scene in held_out if len(scene.concepts) == 2)
    truth = scene_instances(scene)
    assert [CONCEPT_NAMES[label] for label in truth.labels] == list(scene.concepts)
    assert truth.masks.dtype == torch.bool
    assert truth.labels.dtype == torch.int64
    assert truth.boxes.dtype == torch.float32
    np.testing.assert_array_equal(truth.masks.numpy(), render(scene).masks > 0.5)
    for mask, box in zip(truth.masks.numpy(), truth.boxes.tolist(), strict=True):
        rows, columns = ndimage.find_objects(mask.astype(int))[0]
        assert box == [columns.start, rows.start, columns.stop, rows.stop]


def test_an_object_owns_the_cells_around_its_centre_of_mass() -> None:
    # centre 32, a fifth of 40 pixels around it: 28 to 36, in cells of 8 pixels the two in the middle
    targets = grid_targets(squares(("fox", 12, 12, 40)))
    assert targets.cells.tolist() == [3 * GRID + 3, 3 * GRID + 4, 4 * GRID + 3, 4 * GRID + 4]
    assert targets.owners.tolist() == [0] * 4
    assert targets.concepts.sum() == 4
    assert targets.concepts[CONCEPT_NAMES.index("fox"), 3:5, 3:5].sum() == 4
    # centre (20, 44) is in the middle of a cell, 4 pixels around it stay within
    assert grid_targets(squares(("fox", 10, 34, 20))).cells.tolist() == [2 * GRID + 5]


def test_at_most_nine_cells_and_none_beyond_the_edge() -> None:
    huge = squares(("car", 0, 0, 64))
    wide = huge._replace(boxes=torch.tensor([[-300.0, -300.0, 300.0, 300.0]]))
    assert len(grid_targets(wide).cells) == 9
    corner = squares(("car", 60, 60, 4))
    assert grid_targets(corner).cells.tolist() == [GRID * GRID - 1]


def test_the_smaller_object_gets_a_cell_that_two_claim() -> None:
    big, small = ("house", 12, 12, 40), ("tree", 22, 22, 20)
    for objects in ((big, small), (small, big)):
        targets = grid_targets(squares(*objects))
        assert targets.concepts[CONCEPT_NAMES.index("tree")].sum() == len(targets.cells) == 4
        assert set(targets.owners.tolist()) == {objects.index(small)}


def test_labels_of_another_world_are_refused() -> None:
    with pytest.raises(InputError, match="labels 0 to 15, not \\[77\\]"):
        grid_targets(squares(("fox", 12, 12, 40))._replace(labels=torch.tensor([77])))


# the losses


def test_dice_against_its_closed_form() -> None:
    q = torch.zeros(1, 64, 64)
    q[:, :16] = 1
    for value in (0.0, 0.25, 1.0):
        # p constant: 2 p n / (p^2 N + n) with n of N pixels true
        n, everything = 16 * 64, 64 * 64
        closed = 1 - 2 * value * n / (value**2 * everything + n)
        assert float(dice_losses(torch.full((1, 64, 64), value), q)) == pytest.approx(closed, abs=1e-6)
    assert float(dice_losses(q, q)) == pytest.approx(0, abs=1e-6)
    p = torch.rand(3, 8, 8)
    hard = (p > 0.5).float()
    # on masks of zeros and ones SOLO's Dice is scipy's
    from scipy.spatial.distance import dice

    for one, other in ((0, 1), (1, 2)):
        theirs = dice(hard[one].flatten().bool().numpy(), hard[other].flatten().bool().numpy())
        assert float(dice_losses(hard[one : one + 1], hard[other : other + 1])) == pytest.approx(float(theirs))


def test_a_picture_s_loss_is_three_dice_and_one_focal() -> None:
    torch.manual_seed(1)
    maps = Maps(torch.randn(2, 16, GRID, GRID), torch.randn(2, FEATURES, GRID, GRID), torch.randn(2, FEATURES, 32, 32))
    truth = [squares(("fox", 12, 12, 40)), squares(("fox", 10, 2, 20), ("car", 10, 34, 20))]
    losses = solo_losses(maps, truth)
    for i, objects in enumerate(truth):
        targets = grid_targets(objects)
        p, y = maps.concepts[i].sigmoid(), targets.concepts
        focal = torch.where(y == 1, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log()).sum()
        torch.testing.assert_close(focal, sigmoid_focal_loss(maps.concepts[i], y, alpha=0.25, gamma=2, reduction="sum"))
        dice = []
        for cell, owner in zip(targets.cells.tolist(), targets.owners.tolist(), strict=True):
            kernel = maps.kernels[i, :, cell // GRID, cell % GRID]
            logits = functional.conv2d(maps.features[i : i + 1], kernel[None, :, None, None])
            q = functional.interpolate(logits, size=64, mode="bilinear").sigmoid()[0, 0]
            mask = objects.masks[owner]
            dice.append(1 - 2 * q[mask].sum() / (q.square().sum() + mask.sum()))
        expected = 3 * torch.stack(dice).mean() + focal / (len(targets.cells) + 1)
        torch.testing.assert_close(losses[i], expected)


def test_a_perfect_answer_costs_nothing() -> None:
    truth = squares(("fox", 12, 12, 40))
    targets = grid_targets(truth)
    features = torch.zeros(1, FEATURES, 32, 32)
    features[0, 0] = torch.where(truth.masks[0, ::2, ::2], 60.0, -60.0)
    kernels = torch.zeros(1, FEATURES, GRID, GRID)
    kernels[:, 0] = 1
    maps = Maps(torch.where(targets.concepts == 1, 20.0, -20.0)[None], kernels, features)
    assert float(solo_losses(maps, [truth])) == pytest.approx(0, abs=1e-2)
    inverted = maps._replace(features=-features)
    assert float(solo_losses(inverted, [truth])) == pytest.approx(3, abs=1e-2)


def test_a_picture_that_shows_nothing_costs_what_is_seen_in_it(untrained: PocketSegmenter) -> None:
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    hidden = squares(("fox", 12, 12, 40))
    hidden = hidden._replace(masks=torch.zeros_like(hidden.masks))
    # the prior, 0.01 everywhere, with the focal loss of the wrong class: 1024 times 0.75 p^2 (-log(1 - p)), nearly
    prior = GRID * GRID * len(CONCEPT_NAMES) * 0.75 * 0.01**2 * -math.log(0.99)
    for nothing in (NONE, hidden):
        assert float(untrained.loss(x, [nothing])) == pytest.approx(prior, rel=0.5)
    assert len(grid_targets(hidden).cells) == 0


def test_a_batch_is_the_mean_of_its_pictures(untrained: PocketSegmenter, held_out: list[Scene]) -> None:
    x = pictures(held_out[:5]).double() / 255
    truth = [NONE, *(scene_instances(scene) for scene in held_out[1:5])]
    alone = torch.stack([untrained.loss(x[i : i + 1], truth[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(untrained.losses(x, truth), alone)
    torch.testing.assert_close(untrained.loss(x, truth), alone.mean())
    assert torch.equal(untrained.losses(x, truth), untrained.losses(x, truth)), "not deterministic"


def test_the_gradient_at_the_pixels_is_the_loss_s_slope(untrained: PocketSegmenter, held_out: list[Scene]) -> None:
    pair = next(scene for scene in held_out if len(scene.concepts) == 2)
    truth = [scene_instances(pair)]
    x = (pictures([pair]).double() / 255).requires_grad_()
    untrained.loss(x, truth).backward()
    assert x.grad is not None
    assert all(p.grad is None for p in untrained.net.parameters())
    step = 1e-4
    for place in ((0, 0, 32, 16), (0, 1, 30, 48), (0, 2, 5, 60)):
        up, down = x.detach().clone(), x.detach().clone()
        up[place] += step
        down[place] -= step
        slope = float(untrained.loss(up, truth) - untrained.loss(down, truth)) / (2 * step)
        assert float(x.grad[place]) == pytest.approx(slope, rel=1e-4, abs=1e-9)
        assert slope != 0


def test_half_precision_pixels_and_other_kinds_of_instances_are_welcome(held_out: list[Scene]) -> None:
    segmenter = PocketSegmenter(Solo())
    labels, masks, boxes = scene_instances(held_out[0])
    x = (pictures(held_out[:1]).float() / 255).bfloat16().requires_grad_()
    loss = segmenter.loss(x, [SimpleNamespace(labels=labels, masks=masks, boxes=boxes)])
    assert loss.dtype == torch.float32
    loss.backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


# what is found


def test_objects_are_read_once_each() -> None:
    """Two cells see the same fox, one a car, one a tree too faintly; the neighbour of a surer cell is silent."""
    features = torch.full((1, FEATURES, 32, 32), -1.0)
    features[0, 0, :, :16] = 1  # the left half
    features[0, 1, :, 16:] = 1  # the right half
    kernels, concepts = torch.zeros(1, FEATURES, GRID, GRID), torch.full((1, 16, GRID, GRID), -9.0)
    for name, row, column, feature, logit in [
        ("fox", 3, 1, 0, 3.0), ("fox", 3, 2, 0, 2.0), ("fox", 6, 1, 0, 1.0),
        ("car", 3, 6, 1, 2.5), ("tree", 0, 0, 1, -2.0),
    ]:  # fmt: skip
        concepts[0, CONCEPT_NAMES.index(name), row, column] = logit
        kernels[0, feature, row, column] = 1

    class Oracle(Solo):
        def forward(self, x: Tensor) -> Maps:
            return Maps(*(part.expand(len(x), -1, -1, -1) for part in (concepts, kernels, features)))

    for found in PocketSegmenter(Oracle()).segment(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)):
        assert [CONCEPT_NAMES[label] for label, *_ in found] == ["fox", "car"]
        assert [score for _, score, _ in found] == pytest.approx([1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-2.5))])
        assert found[0].mask[:, :31].all()
        assert not (found[0].mask & found[1].mask).any()


def test_a_mask_is_its_kernel_s_convolution() -> None:
    kernels, features = torch.randn(3, FEATURES), torch.randn(3, FEATURES, 32, 32)
    low = torch.cat(
        [functional.conv2d(f[None], k[None, :, None, None]) for k, f in zip(kernels, features, strict=True)]
    )
    expected = functional.interpolate(low, scale_factor=2, mode="bilinear")[:, 0]
    torch.testing.assert_close(mask_logits(kernels, features), expected, atol=1e-4, rtol=1e-4)


def test_panoptic_quality_is_torchmetrics() -> None:
    truth = squares(("fox", 10, 2, 24), ("fox", 10, 34, 24))
    near = squares(("fox", 12, 3, 24), ("fox", 40, 40, 20))  # one is near enough, the other is elsewhere
    found = [Found(int(label), 0.9, mask) for label, mask in zip(near.labels, near.masks, strict=True)]

    def panoptic(masks: Tensor) -> Tensor:
        ids = sum((k + 1) * mask for k, mask in enumerate(masks))
        assert isinstance(ids, Tensor)
        return torch.stack([torch.where(ids > 0, 0, 1), ids], -1)[None]

    metric = PanopticQuality(things={0}, stuffs={1}, return_per_class=True)
    theirs = metric(panoptic(near.masks), panoptic(truth.masks))
    assert panoptic_quality(found, truth) == pytest.approx(float(theirs.flatten()[0]))
    assert 0.3 < panoptic_quality(found, truth) < 0.5
    named_otherwise = [found[0]._replace(label=CONCEPT_NAMES.index("car")), found[1]]
    assert panoptic_quality(named_otherwise, truth) == 0
    assert panoptic_quality([], NONE) == 1
    assert mask_iou(truth.masks[0], truth.masks[1]) == 0


# the shipped one


@shipped
def test_the_shipped_loss_prefers_the_right_objects(segmenter: PocketSegmenter, held_out: list[Scene]) -> None:
    x = pictures(held_out).float() / 255
    truth = [scene_instances(scene) for scene in held_out]
    wrong = {
        "named wrongly": [wrongly_named(objects) for objects in truth],
        "moved": [moved(objects, 8) for objects in truth],
        "absent": [NONE] * len(truth),
        "one too few": [SceneInstances(*(part[:1] for part in objects)) if len(objects.labels) == 2 else NONE
                        for objects in truth],
    }  # fmt: skip
    with torch.no_grad():
        right = segmenter.losses(x, truth)
        for kind, objects in wrong.items():
            assert (right < segmenter.losses(x, objects)).float().mean() >= 0.95, kind
        gray = torch.full_like(x, 0.6)
        assert (right < segmenter.losses(gray, truth)).all(), "an empty picture is as good"


@shipped
def test_a_step_down_the_shipped_gradient_shows_more_of_what_is_asked_for(
    segmenter: PocketSegmenter, held_out: list[Scene]
) -> None:
    truth = [scene_instances(scene) for scene in held_out[:16]]
    faint = torch.lerp(torch.full((16, 3, 64, 64), 0.6), pictures(held_out[:16]).float() / 255, 0.4).requires_grad_()
    before = segmenter.losses(faint, truth)
    before.sum().backward()
    assert faint.grad is not None
    norm = faint.grad.flatten(1).norm(dim=1)[:, None, None, None]
    with torch.no_grad():
        after = segmenter.losses(faint - 0.1 * faint.grad / norm, truth)
    assert (after < before).all()
    assert all(p.grad is None for p in segmenter.net.parameters())


@shipped
def test_the_shipped_segmenter_reaches_its_bars() -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(WEIGHTS / "base" / "vae", dtype=torch.float32).eval()
    others = list(scenes(70_000_000, 128, "held-out"))
    images = pictures(others).permute(0, 2, 3, 1).numpy()
    rows = check_segmenter(load_segmenter(WEIGHTS), vae, others, images)
    assert [row.n for row in rows] == [128, 128]
    assert [(row.name, row.value) for row in rows if not row.passed] == []


# training and files


def test_the_same_training_gives_the_same_weights(tmp_path: Path) -> None:
    once, facts = train_segmenter(tmp_path / "a", TINY, POOL, CPU)
    again, _ = train_segmenter(tmp_path / "b", TINY, POOL, CPU)
    for name, value in once.net.state_dict().items():
        torch.testing.assert_close(again.net.state_dict()[name], value, msg=name)
    assert facts["steps"] == 3


def test_it_learns_the_scenes_it_sees(tmp_path: Path) -> None:
    schedule = Schedule(steps=40, batch_size=4, learning_rate=3e-3, warmup=4, ema=0.8)
    segmenter, _ = train_segmenter(tmp_path, schedule, 4, CPU)
    seen = list(scenes(0, 4))
    x, truth = pictures(seen).float() / 255, [scene_instances(scene) for scene in seen]
    with torch.no_grad():
        before = PocketSegmenter(Solo()).loss(x, truth)
        assert segmenter.loss(x, truth) < 0.5 * before


def test_a_saved_segmenter_loads_frozen_and_says_the_same(tmp_path: Path, held_out: list[Scene]) -> None:
    segmenter, _ = train_segmenter(tmp_path / "work", TINY, POOL, CPU)
    save_segmenter(segmenter, tmp_path)
    assert (tmp_path / WEIGHTS_FILE).stat().st_size < 600_000
    loaded = load_segmenter(tmp_path)
    assert not any(p.requires_grad for p in loaded.net.parameters())
    x, truth = pictures(held_out[:2]).float() / 255, [scene_instances(scene) for scene in held_out[:2]]
    torch.testing.assert_close(loaded.loss(x, truth), segmenter.loss(x, truth).detach(), rtol=1e-2, atol=1e-2)


def test_missing_broken_and_foreign_files_are_named_with_the_remedy(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(InputError, match=r"no segmenter in .*pocket build"):
        load_segmenter(tmp_path)
    path = tmp_path / WEIGHTS_FILE
    save_segmenter(PocketSegmenter(Solo()), tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="truncated"):
        load_segmenter(tmp_path)
    save_file({"weight": torch.zeros(2)}, path, {"concepts": "cat dog"})
    with pytest.raises(InputError, match="other emoji"):
        load_segmenter(tmp_path)
    save_file({"weight": torch.zeros(2)}, path, {"concepts": " ".join(CONCEPT_NAMES)})
    with pytest.raises(InputError, match="another network"):
        load_segmenter(tmp_path)


def test_pictures_of_another_size_are_refused(untrained: PocketSegmenter) -> None:
    with pytest.raises(InputError, match="64, 64"):
        untrained.loss(torch.rand(1, 3, 128, 128), [NONE])
    with pytest.raises(InputError, match="not \\*/pocket"):
        untrained.segment(torch.zeros(1, 3, 128, 128, dtype=torch.uint8))
