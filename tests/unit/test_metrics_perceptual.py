"""Diversity and agreement: closed forms, which way round they go, and what neither order nor batches may change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import lpips as torchmetrics_lpips
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from hypersd_bench.contracts import ImageMetric, MetricContext, PairMetric, PromptMetric, SetMetric
from hypersd_bench.errors import InputError
from hypersd_bench.hub import file_sha256
from hypersd_bench.pocket.scenes import Scene, parse_caption, render
from metrics import agreement, diversity, lpips, perceptual
from metrics.agreement import Agreement
from metrics.diversity import Diversity
from metrics.perceptual import MapDistance, PairDistance, load_lite0_distance

CAPTIONS = ("a fox left of a pizza on a green background", "a car on a blue background")


def _pixels(images: Tensor) -> list[Tensor]:
    """Maps of one idea: the picture itself, and its quarter."""
    return [images.double(), torch.nn.functional.avg_pool2d(images.double(), 2)]


def _halves(left: tuple[int, int, int], right: tuple[int, int, int]) -> Tensor:
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[:, :, :4], image[:, :, 4:] = (torch.tensor(c, dtype=torch.uint8)[:, None, None] for c in (left, right))
    return image


def _scenes(caption: str, seeds: range) -> Tensor:
    scenes = [render(Scene(*parse_caption(caption), seed)).image for seed in seeds]
    return torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2)


RED, GREEN, BLACK = (200, 0, 0), (0, 90, 0), (0, 0, 0)
TOY = MapDistance(_pixels)


@pytest.fixture(scope="module")
def lite0() -> MapDistance:
    return load_lite0_distance(MetricContext())


def test_the_same_picture_whatever_the_noise_has_no_diversity() -> None:
    metric = Diversity(diversity.LITE0.info, TOY)
    assert isinstance(metric, PromptMetric)
    assert not isinstance(metric, ImageMetric | PairMetric | SetMetric)
    same = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8).expand(4, -1, -1, -1)
    assert metric.score_group(same, "a fox").tolist() == [0, 0, 0, 0]
    assert metric.score_group(_halves(RED, BLACK).expand(3, -1, -1, -1), "a fox").tolist() == [0, 0, 0]


def test_distance_is_the_share_of_the_picture_that_differs() -> None:
    """Orthogonal colours are 1 apart wherever they meet, so half a picture of another colour is 0.5 away."""
    images = torch.stack([_halves(RED, RED), _halves(RED, GREEN), _halves(GREEN, GREEN), _halves((90, 0, 0), RED)])
    want = [[0, 0.5, 1, 0], [0.5, 0, 0.5, 0.5], [1, 0.5, 0, 1], [0, 0.5, 1, 0]]
    assert TOY.among(images).numpy() == pytest.approx(np.array(want), abs=1e-9)
    pairs = TOY.between(images, images.roll(-1, 0))
    assert pairs.numpy() == pytest.approx([0.5, 0.5, 1, 0], abs=1e-9)


def test_two_clusters_and_an_odd_one() -> None:
    metric = Diversity(diversity.LITE0.info, TOY)
    red, green = _halves(RED, RED), _halves(GREEN, GREEN)
    assert metric.score_group(torch.stack([red, red, green, green]), "").tolist() == pytest.approx([2 / 3] * 4)
    assert metric.score_group(torch.stack([red, green, red]), "").tolist() == pytest.approx([0.5, 1, 0.5])
    assert metric.score_group(torch.stack([red, green]), "").tolist() == pytest.approx([1, 1])


def test_agreement_is_with_the_partner_and_nobody_else() -> None:
    metric = Agreement(agreement.LITE0.info, TOY)
    assert isinstance(metric, PairMetric)
    assert not isinstance(metric, ImageMetric | PromptMetric | SetMetric)
    images = torch.stack([_halves(RED, GREEN), _halves(GREEN, GREEN), _halves(RED, RED)])
    assert metric.score_pairs(images, images).tolist() == [0, 0, 0]
    assert metric.score_pairs(images, images[[1, 0, 1]]).tolist() == pytest.approx([0.5, 0.5, 1])


def test_map_distance_is_lpips_formula_with_equal_channels(lite0: MapDistance) -> None:
    """Zhang et al. 2018, eq. 1, through torchmetrics' own parts: half the summed squared difference is 1 - cosine."""
    a, b = _scenes(CAPTIONS[0], range(3)), _scenes(CAPTIONS[1], range(3))
    layers = []
    for u, v in zip(lite0.maps(a), lite0.maps(b), strict=True):
        squared = (torchmetrics_lpips._normalize_tensor(u) - torchmetrics_lpips._normalize_tensor(v)) ** 2
        layers.append(torchmetrics_lpips._spatial_average(squared.sum(1, keepdim=True))[:, 0, 0, 0] / 2)
    np.testing.assert_allclose(lite0.between(a, b), torch.stack(layers).mean(0), rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_neither_order_nor_batches_change_a_score(
    batch_size: int, lite0: MapDistance, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = _scenes(CAPTIONS[0], range(5))
    whole, pairs = lite0.among(images), lite0.between(images[:-1], images[1:])
    np.testing.assert_allclose(pairs, whole.diagonal(1), rtol=1e-5)
    np.testing.assert_allclose(whole, whole.T, atol=1e-12)
    monkeypatch.setattr(perceptual, "BATCH_SIZE", batch_size)
    np.testing.assert_allclose(lite0.among(images), whole, atol=1e-5)
    np.testing.assert_allclose(lite0.between(images[:-1], images[1:]), pairs, atol=1e-5)
    order = torch.tensor([3, 0, 4, 2, 1])
    metric = Diversity(diversity.LITE0.info, lite0)
    np.testing.assert_allclose(
        metric.score_group(images[order], ""), metric.score_group(images, "")[order.numpy()], atol=1e-5
    )


@pytest.mark.parametrize("caption", CAPTIONS)
def test_mode_collapse_is_less_diverse_than_fresh_scenes(caption: str, lite0: MapDistance) -> None:
    """A collapsed student's pictures differ by a trace of noise, or by a pixel's shift, and by nothing else."""
    metric = Diversity(diversity.LITE0.info, lite0)
    fresh = metric.score_group(_scenes(caption, range(4)), caption)
    one = _scenes(caption, range(1)).int().expand(4, -1, -1, -1)
    noise = torch.randint(-2, 3, one.shape, generator=torch.Generator().manual_seed(0))
    collapsed = metric.score_group((one + noise).clamp(0, 255).byte(), caption)
    shifted = metric.score_group(torch.cat([one, one.roll(1, 3)])[::2].byte(), caption)
    assert collapsed.max() < 0.6 * fresh.min()
    assert shifted.max() < 0.6 * fresh.min()


def test_a_look_of_the_same_caption_is_nearer_than_another_caption(lite0: MapDistance) -> None:
    fox, car = (_scenes(caption, range(4)) for caption in CAPTIONS)
    assert lite0.between(fox, fox.roll(1, 0)).mean() < lite0.between(fox, car).mean()


def test_pair_distances_fill_a_symmetric_table() -> None:
    distance = PairDistance(lambda a, b: (a.double() - b.double()).abs().mean((1, 2, 3)))
    images = torch.tensor([0, 10, 30], dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    assert distance.among(images).tolist() == [[0, 10, 30], [10, 0, 20], [30, 20, 0]]
    assert Diversity(diversity.LPIPS.info, distance).score_group(images, "").tolist() == [20, 15, 25]


def test_lpips_without_alexnet_names_the_file_and_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HYPERSD_BENCH_CACHE", str(tmp_path))
    for factory in (diversity.LPIPS, agreement.LPIPS):
        assert factory.lacks() == "to be downloaded"
        with pytest.raises(InputError, match=rf"{lpips.FILE}.* put it at {tmp_path}.*, or set HYPERSD_ALEXNET"):
            factory(MetricContext())
    cached = tmp_path / "hub" / "checkpoints" / lpips.FILE
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"something else")
    with pytest.raises(InputError, match="sha256"):
        diversity.LPIPS(MetricContext())


def _pin_alexnet(state: dict[str, Tensor], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save weights where the variable says, and take them for the published ones."""
    torch.save(state, path)
    monkeypatch.setenv("HYPERSD_ALEXNET", str(path))
    pinned = replace(lpips.WEIGHTS, file=replace(lpips.WEIGHTS.file, sha256=file_sha256(path)))
    monkeypatch.setattr(lpips, "WEIGHTS", pinned)


def test_lpips_is_torchmetrics_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a random AlexNet, since its weights are not here: each pair's distance is the library's for that pair."""
    features = torchmetrics_lpips._get_tv_model_features("alexnet", pretrained=False)
    _pin_alexnet({f"features.{key}": x for key, x in features.state_dict().items()}, tmp_path / "a.pth", monkeypatch)
    context = MetricContext()
    distance = perceptual.load_lpips_distance(context)
    table = distance.among(images := _scenes(CAPTIONS[0], range(3)))
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda *_: features)
    library = LearnedPerceptualImagePatchSimilarity("alex", normalize=True)
    for i, j in ((0, 1), (0, 2), (2, 1)):
        want = library(images[[i]] / 255, images[[j]] / 255).item()
        assert table[i, j].item() == pytest.approx(want, rel=1e-4)
        assert want > 0
    assert table.diagonal().tolist() == [0, 0, 0]
    perceptual.load_lpips_distance(context)
    assert list(context.loaded) == ["lpips network"]


def test_an_alexnet_with_other_keys_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _pin_alexnet({"features.0.kernel": torch.zeros(1)}, tmp_path / "a.pth", monkeypatch)
    with pytest.raises(InputError, match=r"can't load AlexNet for LPIPS from .*features\.0\.weight"):
        agreement.LPIPS(MetricContext())
