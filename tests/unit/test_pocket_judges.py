"""The miniature's judges: their targets, losses and intervals against outside numbers, their training and files."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from diffusers import AutoencoderKL
from scipy import ndimage
from torch import Tensor, nn

from hypersd_bench.errors import InputError
from hypersd_bench.pocket import WEIGHTS, training
from hypersd_bench.pocket.aesthetic import (
    AestheticHead,
    load_aesthetic,
    ranking_loss,
    save_aesthetic,
    scale_ratings,
    train_aesthetic,
)
from hypersd_bench.pocket.check import check_aesthetic, check_clip, mean_row, rate_row, run_check
from hypersd_bench.pocket.checker import (
    CLASSES,
    MIN_CELLS,
    CellNet,
    Checker,
    Reading,
    load_checker,
    read_cells,
    save_checker,
    train_checker,
)
from hypersd_bench.pocket.clip import PocketClip, TwinBatches, info_nce, load_clip, save_clip, train_clip
from hypersd_bench.pocket.degradations import DEGRADATIONS, STRENGTHS, blurred, degrade
from hypersd_bench.pocket.pictures import flawed, through_vae
from hypersd_bench.pocket.scenes import Scene, render, scenes
from hypersd_bench.pocket.segmenter import save_segmenter, train_segmenter
from hypersd_bench.pocket.training import Schedule
from tests.tiny_base import make_tiny_base

CPU = torch.device("cpu")
TINY = Schedule(steps=3, batch_size=8, learning_rate=1e-3, warmup=1)
POOL = 24


@pytest.fixture(scope="module")
def renders() -> Tensor:
    """Twenty held-out scenes, (20, 3, 64, 64) uint8."""
    images = [render(scene).image for scene in scenes(7, 20, "held-out")]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder with a tiny random base and judges trained for three steps."""
    weights = tmp_path_factory.mktemp("weights")
    make_tiny_base(weights / "base")
    vae = AutoencoderKL.from_pretrained(weights / "base" / "vae")
    work = weights / "work"
    clip, _ = train_clip(work, weights / "base" / "tokenizer", TINY, POOL, CPU, vae)
    save_clip(clip.model, weights / "clip")
    checker, _ = train_checker(work, TINY, POOL, CPU, vae)
    save_checker(checker, weights)
    aesthetic, _ = train_aesthetic(work, clip, TINY, POOL, CPU, vae)
    save_aesthetic(aesthetic, weights)
    segmenter, _ = train_segmenter(work, TINY, POOL, CPU, vae)
    save_segmenter(segmenter, weights)
    return weights


# what spoils pictures


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_spoiling_costs_more_psnr_at_each_strength(kind: str, renders: Tensor) -> None:
    x = renders.float() / 255
    mse = [float((degrade(kind, x, strength) - x).square().mean()) for strength in (0, *STRENGTHS)]
    assert mse[0] == 0
    assert all(weaker < stronger for weaker, stronger in itertools.pairwise(mse))
    spoiled = degrade(kind, x, 4)
    assert spoiled.shape == x.shape
    assert spoiled.min() >= 0
    assert spoiled.max() <= 1
    assert torch.equal(spoiled, degrade(kind, x, 4)), "not the same for the same seed"


def test_blur_is_scipy_s_gaussian(renders: Tensor) -> None:
    x = renders[:1].double() / 255
    ours = blurred(x, 1.6)[0].numpy()
    theirs = np.stack([ndimage.gaussian_filter(c, 1.6, mode="mirror", truncate=3.0) for c in x[0].numpy()])
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_flaws_are_mild_and_drawn_from_the_generator_alone(renders: Tensor) -> None:
    x = renders.float() / 255
    once, again = (flawed(x, np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(once, again)
    assert once.min() >= 0
    assert once.max() <= 1
    assert 0 < float((once - x).square().mean()) < 10**-1.7  # a PSNR of 17 dB and more


# the checker's eyes


def cells(*objects: tuple[str, int, int, int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A gray map of cells with squares: (concept, top, left, side)."""
    result = np.full((16, 16), CLASSES.index("gray"), np.int64)
    for concept, top, left, side in objects:
        result[top : top + side, left : left + side] = CLASSES.index(concept)
    return result


@pytest.mark.parametrize(
    ("objects", "concepts"),
    [
        ([], ()),
        ([("fox", 4, 4, 8)], ("fox",)),
        ([("pizza", 4, 9, 5), ("fox", 4, 1, 5)], ("fox", "pizza")),
        ([("fox", 4, 1, 5), ("fox", 4, 9, 5)], ("fox", "fox")),  # two of them are not one
        ([("fox", 4, 4, 6), ("car", 13, 13, 2)], ("fox",)),  # 4 cells are a smudge
    ],
)
def test_cells_read_as_separate_emoji_from_left_to_right(
    objects: list[tuple[str, int, int, int]], concepts: tuple[str, ...]
) -> None:
    assert read_cells(cells(*objects)) == Reading(concepts, "gray")


def test_a_patch_counts_from_the_smallest_size_on() -> None:
    grid = cells()
    grid[3, 2 : 2 + MIN_CELLS - 1] = CLASSES.index("tree")
    assert read_cells(grid).concepts == ()
    grid[4, 2 + MIN_CELLS - 1] = CLASSES.index("tree")  # touches at a corner
    assert read_cells(grid).concepts == ("tree",)


def test_a_match_tells_concept_order_and_background_apart() -> None:
    reading = Reading(("fox", "pizza"), "gray")
    assert reading.matches(("fox", "pizza"), "gray").all_ok
    swapped = reading.matches(("pizza", "fox"), "gray")
    assert swapped.concept_ok
    assert not swapped.order_ok
    assert swapped.background_ok
    assert not reading.matches(("fox",), "gray").concept_ok, "one emoji too many is not right"
    assert not reading.matches(("fox", "pizza"), "blue").all_ok


def test_the_checker_reads_what_its_network_says(renders: Tensor) -> None:
    class Oracle(CellNet):
        def forward(self, x: Tensor) -> Tensor:
            truth = torch.from_numpy(cells(("fox", 4, 4, 8)))
            return nn.functional.one_hot(truth, len(CLASSES)).permute(2, 0, 1).expand(len(x), -1, -1, -1).float()

    assert Checker(Oracle()).read(renders) == [Reading(("fox",), "gray")] * len(renders)


# the losses


def test_info_nce_is_open_clip_s_loss() -> None:
    images, texts = (nn.functional.normalize(torch.randn(9, 5), dim=1) for _ in range(2))
    theirs = open_clip.ClipLoss()(images, texts, torch.tensor(14.0))
    torch.testing.assert_close(info_nce(images, texts, torch.tensor(14.0))[0], theirs)


def test_ranking_loss_asks_for_one_rating_per_level() -> None:
    level = torch.tensor([0, 1, 2])
    assert ranking_loss(torch.tensor([2.0, 1.0, 0.0]), level)[0] == 0
    # all equal: the three pairs miss by 1, 1 and 2
    loss, extra = ranking_loss(torch.zeros(3), level)
    assert float(loss) == pytest.approx(4 / 3)
    assert extra["pairs_right"] == 0


def test_ratings_are_scaled_to_eight_and_two() -> None:
    head = AestheticHead()
    features = torch.randn(40, 192)
    before = head(features).detach()
    level = torch.where(before > before.median(), 0, 4)
    scale_ratings(head, before, level)
    after = head(features).detach()
    assert float(after[level == 0].mean()) == pytest.approx(8, abs=1e-3)
    assert float(after[level == 4].mean()) == pytest.approx(2, abs=1e-3)


def test_a_batch_holds_each_caption_once_and_most_beside_a_twin() -> None:
    batches = TwinBatches(tuple(scenes(0, 3000)))
    drawn = [batches.scenes[i] for i in batches.draw(64, np.random.default_rng(0))]
    captions = {scene.caption for scene in drawn}
    assert len(captions) == len(drawn) == 64
    swapped = [Scene(s.concepts[::-1], s.background, 0).caption in captions for s in drawn if len(s.concepts) == 2]
    recoloured = [any(t.concepts == s.concepts and t.background != s.background for t in drawn) for s in drawn]
    assert sum(swapped) > 4
    assert sum(recoloured) > 12


def test_a_pool_with_few_captions_gives_small_batches() -> None:
    assert len(TwinBatches(tuple(scenes(0, 5))).draw(64, np.random.default_rng(0))) == 5


# training and files

Trained = Callable[[Path, Path], dict[str, Tensor]]


def _checker_weights(folder: Path, _: Path) -> dict[str, Tensor]:
    return train_checker(folder, TINY, POOL, CPU)[0].net.state_dict()


def _clip_weights(folder: Path, built: Path) -> dict[str, Tensor]:
    clip, _ = train_clip(folder, built / "base" / "tokenizer", TINY, POOL, CPU)
    weights: dict[str, Tensor] = clip.model.state_dict()
    return weights


def _segmenter_weights(folder: Path, _: Path) -> dict[str, Tensor]:
    return train_segmenter(folder, TINY, POOL, CPU)[0].net.state_dict()


def _aesthetic_weights(folder: Path, built: Path) -> dict[str, Tensor]:
    clip = load_clip(built / "clip", built / "base" / "tokenizer")
    return train_aesthetic(folder, clip, TINY, POOL, CPU)[0].head.state_dict()


@pytest.mark.parametrize("train", [_checker_weights, _segmenter_weights, _clip_weights, _aesthetic_weights])
def test_an_interrupted_training_ends_where_the_whole_one_does(
    train: Trained, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole", built)
    save = training._save

    def save_then_interrupt(*state: Any) -> None:
        save(*state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "CHECKPOINT_EVERY_S", -1.0)
        patch.setattr(training, "_save", save_then_interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts", built)
    resumed = train(tmp_path / "parts", built)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, msg=name)


def test_saved_judges_load_and_judge(built: Path, renders: Tensor) -> None:
    clip = load_clip(built / "clip", built / "base" / "tokenizer")
    images, texts = clip.embed_images(renders), clip.embed_texts(["a fox on a green background", "a car"])
    assert images.shape == (len(renders), 128)
    assert texts.shape == (2, 128)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(len(renders)))
    ratings = load_aesthetic(built, clip).rate_images(renders)
    assert ratings.shape == (len(renders),)
    assert ratings.isfinite().all()
    assert len(load_checker(built).read(renders)) == len(renders)


def test_what_rewards_need_has_a_gradient(built: Path, renders: Tensor) -> None:
    aesthetic = load_aesthetic(built, load_clip(built / "clip", built / "base" / "tokenizer"))
    x = (renders[:2].float() / 255).requires_grad_()
    aesthetic.rating(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_padding_does_not_change_a_text(built: Path) -> None:
    clip: PocketClip = load_clip(built / "clip", built / "base" / "tokenizer")
    alone, beside = clip.embed_texts(["a fox"]), clip.embed_texts(["a fox", "a fox left of a car on a blue background"])
    torch.testing.assert_close(alone[0], beside[0])
    assert not torch.allclose(beside[0], beside[1])


def test_missing_and_broken_judges_are_named_with_the_remedy(built: Path, tmp_path: Path) -> None:
    tokenizer = built / "base" / "tokenizer"
    with pytest.raises(InputError, match="pocket build"):
        load_clip(tmp_path, tokenizer)
    with pytest.raises(InputError, match="pocket build"):
        load_checker(tmp_path)
    (tmp_path / "checker.safetensors").write_bytes((built / "checker.safetensors").read_bytes()[:-9])
    with pytest.raises(InputError, match="truncated"):
        load_checker(tmp_path)
    with pytest.raises(InputError, match="pocket build"):
        load_aesthetic(tmp_path, load_clip(built / "clip", tokenizer))


def test_pictures_of_another_size_are_refused(built: Path) -> None:
    with pytest.raises(InputError, match="not \\*/pocket"):
        load_checker(built).read(torch.zeros(1, 3, 128, 128, dtype=torch.uint8))


def test_pictures_pass_through_the_autoencoder_in_any_batch(built: Path) -> None:
    vae = AutoencoderKL.from_pretrained(built / "base" / "vae").eval()
    images = np.stack([render(scene).image for scene in scenes(0, 66)])
    plain = through_vae(vae, images, latent_noise=0)
    assert plain.shape == images.shape
    assert plain.dtype == np.uint8
    alone = through_vae(vae, images[65:], latent_noise=0)
    assert np.abs(plain[65:].astype(int) - alone).max() <= 1
    assert not np.array_equal(plain, through_vae(vae, images, latent_noise=0.4))


# the check


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_rates_have_wilson_s_interval(successes: int, n: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3."""
    row = rate_row("x", [i < successes for i in range(n)], 0.5)
    assert (row.low, row.high) == pytest.approx((low, high), abs=5e-5)
    assert row.n == n
    assert not row.passed


def test_means_have_student_s_interval() -> None:
    row = mean_row("x", np.arange(1.0, 6.0), 3.0, "dB")
    # sd sqrt(2.5), t(0.975, 4) = 2.776: 2.776 sqrt(2.5 / 5) = 1.963
    assert (row.value, row.high - row.value) == pytest.approx((3.0, 1.963), abs=1e-3)
    assert row.passed
    assert row.to_json()["passed"] is True


def test_the_check_measures_every_part(built: Path) -> None:
    rows = run_check(built, num_scenes=8, num_images=2)
    assert [row.name.split(":")[0] for row in rows] == [
        "checker", "autoencoder", "teacher", "teacher", "teacher", "clip", "clip", "clip", "aesthetic", "aesthetic",
        "segmenter", "segmenter",
    ]  # fmt: skip
    assert all(row.low <= row.value <= row.high for row in rows)
    assert [row.n for row in rows[:5]] == [8, 8, 2, 4, 2]
    assert not all(row.passed for row in rows), "an untrained miniature passed"


@pytest.mark.skipif(not (WEIGHTS / "aesthetic.safetensors").is_file(), reason="the miniature is not built yet")
def test_the_shipped_judges_reach_their_bars() -> None:
    held_out = list(scenes(50_000_000, 256, "held-out"))
    images = torch.from_numpy(np.stack([render(scene).image for scene in held_out])).permute(0, 3, 1, 2)
    clip = load_clip(WEIGHTS / "clip", WEIGHTS / "base" / "tokenizer")
    rows = check_clip(clip, held_out, images) + check_aesthetic(load_aesthetic(WEIGHTS, clip), images)
    assert [row.name for row in rows if not row.passed] == []
    readings = load_checker(WEIGHTS).read(images)
    right = [r.matches(s.concepts, s.background).all_ok for r, s in zip(readings, held_out, strict=True)]
    assert np.mean(right) >= 0.97
