"""The metrics on small inputs: which way round they go, what they refuse, and that batches change nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from hypersd_bench import registry
from hypersd_bench.contracts import ImageMetric, MetricContext, MetricInfo, SetMetric
from hypersd_bench.errors import InputError
from hypersd_bench.pocket import WEIGHTS, checker
from hypersd_bench.pocket.checker import Reading
from hypersd_bench.pocket.scenes import Scene, render
from metrics import aesthetic, backbones, clip_score, concept, fid
from metrics.aesthetic import LinearHead
from metrics.clip_score import ClipScore
from metrics.concept import Concept
from metrics.factory import Factory
from metrics.fid import Fid

KINDS = {"aesthetic": "image", "clip-score": "image", "concept": "image", "fid": "set", "diversity": "prompt",
         "agreement": "pair"}  # fmt: skip
LOWER_IS_BETTER = {"fid", "agreement"}


@dataclass
class ColourEncoder:
    """A CLIP of one idea: an image is its mean colour, a text names red, green or blue."""

    def embed_images(self, images: Tensor) -> Tensor:
        return torch.nn.functional.normalize(images.float().mean((2, 3)), dim=1)

    def embed_texts(self, texts: list[str]) -> Tensor:
        return torch.eye(3)[[("red", "green", "blue").index(text) for text in texts]]


def _plain(*colours: tuple[int, int, int]) -> Tensor:
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, 3, 8, 8).contiguous()


@pytest.mark.parametrize("name", registry.METRICS)
def test_rows_declare_themselves_under_their_own_id(name: str) -> None:
    info, family = registry.resolve("metric", name).info, name.split("/")[0]
    assert info.id == name
    assert info.direction == ("lower" if family in LOWER_IS_BETTER else "higher")
    assert info.kind == KINDS[family]
    assert info.per_image == (family != "fid")


def test_clip_score_is_a_hundred_cosines_of_its_own_prompt() -> None:
    metric = ClipScore(clip_score.POCKET.info, ColourEncoder())
    assert isinstance(metric, ImageMetric)
    images = _plain((255, 0, 0), (0, 200, 0), (255, 255, 0))
    assert metric.score(images, ["red", "green", "red"]) == pytest.approx([100, 100, 100 / np.sqrt(2)])
    assert metric.score(images, ["blue", "blue", "blue"]) == pytest.approx([0, 0, 0])


def test_clip_score_matches_torchmetrics_clip_arithmetic() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 16, generator=rng), torch.randn(5, 16, generator=rng)

    class Fixed(ColourEncoder):
        def embed_images(self, images: Tensor) -> Tensor:
            return x

        def embed_texts(self, texts: list[str]) -> Tensor:
            return y

    want = 100 * (x / x.norm(dim=1, keepdim=True) * (y / y.norm(dim=1, keepdim=True))).sum(1)
    assert ClipScore(clip_score.POCKET.info, Fixed()).score(x, ["a"] * 5) == pytest.approx(want.numpy(), rel=1e-5)


def test_open_clip_takes_uint8_and_batches_change_nothing() -> None:
    clip = _tiny_open_clip()
    images = torch.randint(0, 256, (4, 3, 40, 56), dtype=torch.uint8)
    whole = clip.embed_images(images)
    parts = torch.cat([clip.embed_images(image[None]) for image in images])
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(4))
    white, black = clip.embed_images(_plain((255, 255, 255), (0, 0, 0)))
    assert (white - black).abs().max() > 1e-3  # uint8 was not taken for floats in [0, 1]


def test_prompts_that_fill_the_context_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    clip = _tiny_open_clip()
    clip.embed_texts(["a fox"])
    assert not caplog.records
    clip.embed_texts(["a fox", "very " * 90])
    assert "1 of 2 prompts fill CLIP's 77 tokens" in caplog.text


def test_plain_gelu_is_refused_for_openai_weights() -> None:
    backbones.require_quick_gelu(_tiny_open_clip().model, "tiny")
    with pytest.raises(AssertionError, match="QuickGELU"):
        backbones.require_quick_gelu(_tiny_open_clip(quick_gelu=False).model, "tiny")


def _tiny_open_clip(quick_gelu: bool = True) -> backbones.OpenClip:
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(16, vision, text, quick_gelu=quick_gelu).eval()
    preprocess = open_clip.image_transform(32, is_train=False)
    return backbones.OpenClip(model, preprocess, open_clip.get_tokenizer("ViT-B-32-quickgelu"), "cpu")


def test_a_chain_of_linear_layers_folds_into_one() -> None:
    layers = torch.nn.Sequential(*[torch.nn.Linear(a, b) for a, b in ((12, 9), (9, 4), (4, 1))]).double()
    x = torch.nn.functional.normalize(torch.randn(6, 12, dtype=torch.float64), dim=1)
    head = LinearHead.fold({key: value.detach() for key, value in layers.state_dict().items()})
    torch.testing.assert_close(head(x), layers(x)[:, 0].detach())
    torch.testing.assert_close(head(7 * x), head(x))  # any length is normalised


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


def _colour_fid(reference: Path | None) -> Fid:
    return Fid(MetricInfo("fid/colour", "", "lower", "distance", "set"), lambda x: x.float().mean((2, 3)), reference)


def test_fid_is_of_the_features_of_all_batches_in_order() -> None:
    metric = _colour_fid(None)
    assert isinstance(metric, SetMetric)
    images = torch.randint(0, 256, (fid.BATCH_SIZE + 5, 3, 8, 8), dtype=torch.uint8)
    features = metric.features(images)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, images.float().mean((2, 3)).numpy(), rtol=1e-6)
    assert metric.distance(features, features) == pytest.approx(0, abs=1e-6)
    assert metric.distance(features + 10, features) == pytest.approx(300, rel=1e-5)


def test_reference_folder_is_read_in_order_of_name_whatever_size_and_mode(tmp_path: Path) -> None:
    Image.new("L", (30, 20), 90).save(tmp_path / "b.png")
    Image.new("RGBA", (8, 8), (10, 20, 30, 255)).save(tmp_path / "a.png")
    Image.new("RGB", (20, 20), (1, 2, 3)).save(tmp_path / "c.PNG")
    (tmp_path / "notes.txt").write_text("not an image")
    got = _colour_fid(tmp_path).reference()
    assert got.tolist() == [[10, 20, 30], [90, 90, 90], [1, 2, 3]]


def test_reference_folder_without_images_or_with_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least two images"):
        _colour_fid(tmp_path).reference()
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"not a png")
    with pytest.raises(InputError, match=r"can't read reference image .*a\.png"):
        _colour_fid(tmp_path).reference()


def test_own_reference_is_fresh_renders_of_the_prompts_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fid, "NUM_RENDERS", 3)
    first, second, _ = fid.held_out_renders()
    assert first.shape == (64, 64, 3)
    assert (first != second).any()
    np.testing.assert_array_equal(first, next(fid.held_out_renders()))


@pytest.mark.parametrize(
    ("factory", "variable", "remedy"),
    [
        (clip_score.VIT_B_32, "HYPERSD_CLIP_VIT_B_32", "hf download timm/vit_base_patch32_clip_224.openai"),
        (aesthetic.LAION_V2, "HYPERSD_AESTHETIC_V2", "improved-aesthetic-predictor"),
        (fid.INCEPTION, "HYPERSD_INCEPTION", "weights-inception-2015-12-05-6726825d.pth"),
    ],
)
def test_missing_weights_name_the_remedy(
    factory: Factory[ImageMetric],
    variable: str,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(InputError, match=remedy) as missing:
        factory(MetricContext())
    assert variable in str(missing.value)
    monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no such file"):
        factory(MetricContext())


def test_another_file_than_the_named_weights_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"something else")
    monkeypatch.setenv("HYPERSD_INCEPTION", str(tmp_path / "weights.pth"))
    with pytest.raises(InputError, match="sha256"):
        fid.INCEPTION(MetricContext())


def test_render_of_a_caption_scores_as_its_own_concept() -> None:
    scene = Scene(("fox",), "green", 1)
    if not (WEIGHTS / checker.WEIGHTS_FILE).exists():
        pytest.skip("the miniature's checker is not built")
    metric = concept.POCKET(MetricContext())
    images = torch.from_numpy(render(scene).image.transpose(2, 0, 1).copy())[None].expand(2, -1, -1, -1)
    assert metric.score(images, [scene.caption, "a pizza on a blue background"]).tolist() == [1, 0]
