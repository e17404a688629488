"""The metrics on small inputs: which way round they go, what they refuse, and that batches change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor

from hypersd_bench import registry
from hypersd_bench.contracts import FeatureMetric, ImageMetric, MetricContext, SetMetric
from hypersd_bench.errors import InputError
from hypersd_bench.pocket import WEIGHTS, checker
from hypersd_bench.pocket.checker import Reading
from hypersd_bench.pocket.scenes import Scene, render, scenes
from metrics import aesthetic, clip_score, concept, set_metrics, set_statistics
from metrics.aesthetic import LaionRating, LinearHead
from metrics.clip_score import ClipScore
from metrics.concept import Concept
from metrics.extractors import clip, dinov2, inception, lite0
from metrics.extractors.clip import ClipExtractor
from metrics.extractors.network import NetworkExtractor, Source
from metrics.factory import Factory
from metrics.set_metrics import SetStatistic

OTHER_KINDS = {"diversity": "prompt", "agreement": "pair"} | dict.fromkeys(
    ("fid", "patch-fid", "kid", "cmmd", "fd", "precision", "recall", "density", "coverage"), "set"
)
LOWER_IS_BETTER = {"fid", "patch-fid", "kid", "cmmd", "fd", "agreement"}
SOURCES: dict[str, Source[Any]] = {
    source.id: source
    for module in (clip, dinov2, inception, lite0)
    for source in vars(module).values()
    if isinstance(source, Source)
}
CONTEXT = MetricContext()  # what it loads, several tests share
needs_miniature = pytest.mark.skipif(
    not (WEIGHTS / checker.WEIGHTS_FILE).exists(), reason="the miniature's judges are not built"
)


@dataclass
class ColourEncoder:
    """A CLIP of one idea: an image is its mean colour, a text ends with red, green, blue or their opposite."""

    seen: list[str] = field(default_factory=list)

    def embed_images(self, images: Tensor) -> Tensor:
        return torch.nn.functional.normalize(images.float().mean((2, 3)), dim=1)

    def embed_texts(self, texts: list[str]) -> Tensor:
        self.seen += texts
        axes = torch.cat([torch.eye(3), -torch.eye(3)])
        names = ("red", "green", "blue", "not-red", "not-green", "not-blue")
        return axes[[names.index(text.split()[-1]) for text in texts]]


def _plain(*colours: tuple[int, int, int]) -> Tensor:
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, 3, 8, 8).contiguous()


def _colours(name: str, encoder: ColourEncoder) -> ClipScore:
    """A row's metric, built by its own factory, on the colour encoder."""
    factory: Factory[ClipScore] = registry.resolve("metric", name)
    context = MetricContext()
    context.loaded[factory.info.features] = ClipExtractor(factory.info.features, "", encoder)
    return factory(context)


# the rows


@pytest.mark.parametrize("name", registry.METRICS)
def test_rows_declare_themselves_under_their_own_id(name: str) -> None:
    info, family = registry.resolve("metric", name).info, name.split("/")[0]
    assert info.id == name
    assert info.direction == ("lower" if family in LOWER_IS_BETTER else "higher")
    assert info.kind == OTHER_KINDS.get(family, "image")
    assert info.note
    assert "\n" not in info.note
    assert bool(info.statistic) == (info.kind == "set")


def test_labels_are_distinct_and_fit_a_heading() -> None:
    labels = [registry.resolve("metric", name).info.label for name in registry.METRICS]
    assert len(set(labels)) == len(labels)
    assert max(map(len, labels)) <= 27


@pytest.mark.parametrize("name", [name for name in registry.METRICS if registry.resolve("metric", name).info.statistic])
def test_set_rows_name_a_statistic_and_its_smallest_set(name: str) -> None:
    info = registry.resolve("metric", name).info
    assert info.statistic in set_statistics.STATISTICS
    values = np.random.default_rng(0).normal(size=(info.min_images, 3))
    enough = np.random.default_rng(1).normal(size=(9, 3))
    assert np.isfinite(set_statistics.evaluate(info.statistic, values, enough))
    assert np.isnan(set_statistics.evaluate(info.statistic, values[:-1], enough))


@pytest.mark.parametrize("name", registry.METRICS)
def test_features_are_of_a_known_extractor(name: str) -> None:
    factory = registry.resolve("metric", name)
    if factory.info.features and factory.info.features in SOURCES:
        source = SOURCES[factory.info.features]
        assert set(source.weights) <= set(factory.weights)
        assert source.packages == factory.packages
    else:
        assert not factory.info.statistic


# CLIP scores


def test_clip_score_is_a_hundred_cosines_of_its_own_prompt() -> None:
    metric = _colours("clip-score/vit-b-32", encoder := ColourEncoder())
    assert isinstance(metric, FeatureMetric)
    assert not isinstance(metric, ImageMetric | SetMetric)
    features = metric.extractor(_plain((255, 0, 0), (0, 200, 0), (255, 255, 0), (255, 0, 0)))
    prompts = ["red", "green", "red", "not-red"]
    assert metric.score_features(features, prompts) == pytest.approx([100, 100, 100 / np.sqrt(2), -100])
    assert metric.score_features(7 * features, prompts) == pytest.approx([100, 100, 100 / np.sqrt(2), -100])
    assert metric.score_features(features, ["blue"] * 4) == pytest.approx([0, 0, 0, 0])
    assert encoder.seen == ["red", "green", "not-red", "blue"]  # each once


@pytest.mark.parametrize(
    ("name", "scale", "of_opposite"), [("clip-score/vit-g-14-photo-256", 1, -1), ("clip-s/vit-b-32", 2.5, 0)]
)
def test_prefix_scale_and_floor_are_the_protocols(name: str, scale: float, of_opposite: float) -> None:
    metric = _colours(name, encoder := ColourEncoder())
    features = metric.extractor(_plain((255, 0, 0), (255, 255, 0), (255, 0, 0)))
    scores = metric.score_features(features, ["red", "red", "not-red"])
    assert scores == pytest.approx([scale, scale / np.sqrt(2), of_opposite])
    assert encoder.seen == ["A photo depicts red", "A photo depicts not-red"]


def test_clip_score_matches_torch_on_random_embeddings() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 16, generator=rng), torch.randn(5, 16, generator=rng)
    extractor = NetworkExtractor("", "", lambda images: images)
    metric = ClipScore(clip_score.VIT_B_32.info, extractor, lambda texts: y.numpy())
    want = 100 * torch.nn.functional.cosine_similarity(x.double(), y.double())
    assert metric.score_features(x.numpy(), ["a"] * 5) == pytest.approx(want.numpy(), rel=1e-12)


@pytest.mark.parametrize("words", [1, 71, 72, 73, 74, 75, 90])
def test_the_prefix_is_what_dmd2_puts_before_a_prompts_tokens(words: int) -> None:
    """DMD2 cuts the prompt's tokens first, inserts three after the start, cuts again and restores the end token."""
    tokenizer = open_clip.get_tokenizer("ViT-g-14")
    prompt = "very " * words
    (own,), (prefix,) = tokenizer([prompt]), tokenizer(["A photo depicts "])
    spliced = torch.cat([own[:1], prefix[1:4], own[1:]])[:77]
    if spliced[-1] > 0:
        spliced[-1] = 49407
    assert tokenizer([clip_score.PREFIX + prompt])[0].tolist() == spliced.tolist()


@needs_miniature
def test_a_picture_scores_better_with_its_own_caption() -> None:
    metric = clip_score.POCKET(CONTEXT)
    shown = list(scenes(11, 12, "held-out"))
    features = metric.extractor(_renders(shown))
    captions = [scene.caption for scene in shown]
    own = metric.score_features(features, captions)
    others = metric.score_features(features, captions[1:] + captions[:1])
    assert (own > others).mean() > 0.9
    assert own.mean() > others.mean() + 10


def test_a_prompt_is_scored_with_its_own_image_only() -> None:
    metric = ClipScore(
        clip_score.POCKET.info,
        NetworkExtractor("", "", lambda x: x),
        ClipExtractor("", "", ColourEncoder()).embed_texts,
    )
    features = np.eye(3, dtype=np.float32)
    assert metric.score_features(features, ["red", "green", "blue"]).tolist() == [100, 100, 100]
    assert metric.score_features(features[[1, 2, 0]], ["red", "green", "blue"]).tolist() == [0, 0, 0]


# ratings


def test_a_chain_of_linear_layers_folds_into_one() -> None:
    layers = torch.nn.Sequential(*[torch.nn.Linear(a, b) for a, b in ((12, 9), (9, 4), (4, 1))]).double()
    x = torch.nn.functional.normalize(torch.randn(6, 12, dtype=torch.float64), dim=1)
    head = LinearHead.fold({key: value.detach() for key, value in layers.state_dict().items()})
    torch.testing.assert_close(head(x), layers(x)[:, 0].detach())
    torch.testing.assert_close(head(7 * x), head(x))  # any length is normalised


def test_laion_rating_is_linear_in_the_unit_embedding() -> None:
    head = LinearHead(torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64))
    metric = LaionRating(aesthetic.LAION_V2.info, NetworkExtractor("", "", lambda x: x), head)
    assert isinstance(metric, FeatureMetric)
    features = np.array([[3, 0], [0, 0.5], [-3, -4]], np.float32)
    assert metric.score_features(features, [""] * 3) == pytest.approx([6, 7, 5 - 0.6 - 1.6])


@needs_miniature
def test_a_clean_render_rates_better_than_a_noisy_one() -> None:
    images = _renders(list(scenes(11, 8, "held-out")))
    noise = 60 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    metric = aesthetic.POCKET(MetricContext())
    assert isinstance(metric, ImageMetric)
    clean, noisy = (metric.score(x, [""] * 8) for x in (images, (images + noise).clamp(0, 255).byte()))
    assert (clean > noisy).all()


# concepts


def test_concept_needs_everything_right() -> None:
    class Told:
        def read(self, images: Tensor) -> list[Reading]:
            right = Reading(("fox", "pizza"), "green")
            return [
                right,
                Reading(("pizza", "fox"), "green"),
                Reading(("fox",), "green"),
                Reading(("fox", "pizza"), "blue"),
            ]

    metric = Concept(concept.POCKET.info, Told())  # type: ignore[arg-type]
    prompts = ["a fox left of a pizza on a green background"] * 4
    assert metric.score(torch.zeros(4, 3, 64, 64, dtype=torch.uint8), prompts).tolist() == [1, 0, 0, 0]
    with pytest.raises(InputError, match="not a scene caption"):
        metric.score(torch.zeros(4, 3, 64, 64, dtype=torch.uint8), ["a cat"] * 4)


@needs_miniature
def test_render_of_a_caption_scores_as_its_own_concept() -> None:
    scene = Scene(("fox",), "green", 1)
    metric = concept.POCKET(MetricContext())
    images = _renders([scene, scene])
    assert metric.score(images, [scene.caption, "a pizza on a blue background"]).tolist() == [1, 0]


@needs_miniature
@pytest.mark.parametrize("name", ["clip-score/pocket", "cmmd/pocket", "aesthetic/pocket", "concept/pocket"])
def test_the_miniatures_judges_refuse_pictures_of_another_size(name: str) -> None:
    metric = registry.resolve("metric", name)(MetricContext())
    judge: Callable[[Tensor], object] = getattr(metric, "extractor", None) or (
        lambda images: metric.score(images, ["a fox on a green background"])
    )
    with pytest.raises(InputError, match=r"pocket is for the miniature's images of 64x64 pixels, these have 48x64"):
        judge(torch.zeros(1, 3, 64, 48, dtype=torch.uint8))


# sets


def test_a_set_metric_is_its_statistic_of_its_features() -> None:
    extractor = NetworkExtractor("", "", lambda images: images.float().mean((2, 3)))
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20, 3)).astype(np.float32)
    moved = features + np.float32(2)
    for factory in (set_metrics.FID_LITE0, set_metrics.KID_LITE0, set_metrics.CMMD_POCKET):
        metric = SetStatistic(factory.info, extractor)
        assert isinstance(metric, SetMetric)
        assert not isinstance(metric, FeatureMetric | ImageMetric)
        assert metric.distance(moved, features) > metric.distance(features[::-1], features)
    fid = SetStatistic(set_metrics.FID_LITE0.info, extractor)
    assert fid.distance(features[::-1], features) == pytest.approx(0, abs=1e-6)
    assert fid.distance(moved, features) == pytest.approx(12, rel=1e-5)  # three times two squared


@needs_miniature
@pytest.mark.parametrize("name", ["fid/lite0", "kid/lite0", "cmmd/pocket"])
def test_noise_moves_a_set_of_renders_away(name: str) -> None:
    images, others = (_renders(list(scenes(seed, 24, "held-out"))) for seed in (11, 12))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    metric = registry.resolve("metric", name)(CONTEXT)
    reference = metric.extractor(others)
    clean, noisy, noisier = (
        metric.distance(metric.extractor((images + level * noise).clamp(0, 255).byte()), reference)
        for level in (0, 25, 80)
    )
    assert clean < min(noisy, noisier)


@pytest.mark.parametrize(
    ("metric", "of_one", "of_others"),
    [("precision", 1.0, 0.0), ("density", 1.0, 0.0), ("recall", 0.5, 0.0), ("coverage", 0.5, 0.0)],
)
def test_sharp_but_one_sided_has_precision_and_no_recall(metric: str, of_one: float, of_others: float) -> None:
    """A reference of two far clusters: a set that holds one of them, and a set that holds neither."""
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 24, 2)).astype(np.float32)
    reference = np.concatenate([one, other + np.float32(100)])
    statistic = SetStatistic(registry.resolve("metric", f"{metric}/lite0").info, NetworkExtractor("", "", lambda x: x))
    held = statistic.distance(one + np.float32(1e-3), reference)
    assert held == pytest.approx(of_one, abs=0.15)
    assert statistic.distance(one - np.float32(500), reference) == of_others


# what is missing


@pytest.mark.parametrize(
    ("name", "variable", "remedy"),
    [
        ("clip-score/vit-b-32", "HYPERSD_CLIP_VIT_B_32", "hf download timm/vit_base_patch32_clip_224.openai"),
        ("clip-score/vit-l-14", "HYPERSD_CLIP_VIT_L_14", "hf download timm/vit_large_patch14_clip_224.openai"),
        ("cmmd/vit-l-14-336", "HYPERSD_CLIP_VIT_L_14_336", "hf download timm/vit_large_patch14_clip_336.openai"),
        ("clip-score/vit-g-14", "HYPERSD_CLIP_VIT_G_14", "hf download laion/CLIP-ViT-g-14-laion2B-s12B-b42K"),
        ("clip-score/vit-bigg-14", "HYPERSD_CLIP_VIT_BIGG_14", "hf download laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"),
        ("aesthetic/laion-v2", "HYPERSD_AESTHETIC_V2", "improved-aesthetic-predictor"),
        ("aesthetic/laion-v1", "HYPERSD_AESTHETIC_V1", "LAION-AI/aesthetic-predictor"),
        ("fid/clean", "HYPERSD_INCEPTION", "weights-inception-2015-12-05-6726825d.pth"),
    ],
)
def test_missing_weights_name_the_remedy(
    name: str, variable: str, remedy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HYPERSD_BENCH_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    factory = registry.resolve("metric", name)
    assert "to be downloaded" in factory.lacks()
    with pytest.raises(InputError, match=remedy) as missing:
        factory(MetricContext())
    assert variable in str(missing.value)
    assert "\n" not in str(missing.value)
    monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no such file"):
        factory(MetricContext())


def test_missing_dinov2_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"hf download facebook/dinov2-large config\.json, or set HYPERSD_DINOV2_VIT"):
        set_metrics.FD_DINOV2(MetricContext())
    monkeypatch.setenv("HYPERSD_DINOV2_VIT_L_14", str(tmp_path))
    with pytest.raises(InputError, match=r"config\.json, model\.safetensors missing in"):
        set_metrics.FD_DINOV2(MetricContext())


@pytest.mark.parametrize(
    ("name", "variable"), [("fid/tf1", "HYPERSD_INCEPTION"), ("aesthetic/laion-v1", "HYPERSD_AESTHETIC_V1")]
)
def test_another_file_than_the_named_weights_is_refused(
    name: str, variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "weights.pth").write_bytes(b"something else")
    monkeypatch.setenv(variable, str(tmp_path / "weights.pth"))
    with pytest.raises(InputError, match="sha256"):
        registry.resolve("metric", name)(MetricContext())


def test_inception_without_torch_fidelity_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metrics.factory.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"fid/clean needs torch_fidelity: pip install 'hypersd-bench\[inception\]'"):
        set_metrics.FID_CLEAN(MetricContext())


def _renders(shown: list[Scene]) -> Tensor:
    return torch.from_numpy(np.stack([render(scene).image for scene in shown])).permute(0, 3, 1, 2)
