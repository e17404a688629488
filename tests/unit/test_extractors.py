"""Extractors: batches, precision, sharing, the CLIP activation, and DINOv2 beside timm's of the same weights."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm
import torch
import transformers
from PIL import Image
from torch import Tensor

from hypersd_bench.contracts import MetricContext
from hypersd_bench.errors import InputError
from hypersd_bench.reference import read_picture
from metrics.extractors import clip, dinov2, lite0, network
from metrics.extractors.clip import ClipExtractor, OpenClip, PublishedClip, require_activation
from metrics.extractors.network import NetworkExtractor, extract

SMALL = {"vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
         "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}  # fmt: skip


def _tiny_open_clip(quick_gelu: bool = True) -> OpenClip:
    model = open_clip.CLIP(16, **SMALL, quick_gelu=quick_gelu).eval()
    preprocess = open_clip.image_transform(32, is_train=False)
    return OpenClip(model, preprocess, open_clip.get_tokenizer("ViT-B-32-quickgelu"), "cpu")


def _pictures(height: int, width: int, count: int = 3) -> Tensor:
    coarse = torch.rand((count, 3, 6, 6), generator=torch.Generator().manual_seed(3))
    return (255 * torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")).round().byte()


# batches and precision


def test_features_are_of_all_batches_in_order() -> None:
    sizes = []

    def mean(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return images.float().mean((2, 3))

    images = _pictures(8, 8, network.BATCH_SIZE + 5)
    features = NetworkExtractor("", "", mean)(images)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, images.float().mean((2, 3)).numpy(), rtol=1e-6)
    assert sizes == [network.BATCH_SIZE, 5]


def test_features_ignore_autocast_and_keep_no_gradient() -> None:
    layer = torch.nn.Linear(64, 8)
    images = _pictures(8, 8).float()[:, 0].flatten(1)
    plain = extract(layer, images)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(images).dtype == torch.bfloat16
        np.testing.assert_array_equal(extract(layer, images), plain)


def test_open_clip_takes_uint8_and_batches_change_nothing() -> None:
    extractor = ClipExtractor("", "", _tiny_open_clip())
    images = torch.randint(0, 256, (4, 3, 40, 56), dtype=torch.uint8)
    whole = extractor(images)
    np.testing.assert_allclose(whole, np.concatenate([extractor(image[None]) for image in images]), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, rtol=1e-5)
    black = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert np.abs(extractor(black) - extractor(black + 255)).max() > 1e-3  # uint8 was not taken for floats in [0, 1]


# texts


def test_prompts_that_fill_the_context_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    extractor = ClipExtractor("", "", _tiny_open_clip())
    extractor.embed_texts(["a fox"])
    assert not caplog.records
    for _ in range(2):
        extractor.embed_texts(["a fox", "very " * 90])
    assert [record.getMessage() for record in caplog.records] == ["1 of 1 prompts fill CLIP's 77 tokens and may be cut"]


def test_texts_come_back_in_their_order_whatever_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "TEXT_BATCH", 2)
    texts = ["a fox", "a car", "two dogs", "a fox", "a house"]
    one_by_one = np.concatenate([ClipExtractor("", "", encoder := _tiny_open_clip()).embed_texts(["a fox"])])
    extractor = ClipExtractor("", "", encoder)
    np.testing.assert_allclose(extractor.embed_texts(["a fox"]), one_by_one, atol=1e-6)
    whole = extractor.embed_texts(texts)
    want = np.concatenate([ClipExtractor("", "", encoder).embed_texts([text]) for text in texts])
    np.testing.assert_allclose(whole, want, atol=1e-6)


# the activation


@pytest.mark.parametrize("published", [clip.OPENAI_B_32, clip.LAION_G_14])
def test_weights_trained_with_the_other_activation_are_refused(published: PublishedClip) -> None:
    require_activation(_tiny_open_clip(published.quick_gelu).model, published)
    built, wanted = ("GELU", "QuickGELU") if published.quick_gelu else ("QuickGELU", "GELU")
    with pytest.raises(InputError, match=f"with {built}, its weights were trained with {wanted}; install"):
        require_activation(_tiny_open_clip(not published.quick_gelu).model, published)


@pytest.mark.parametrize(
    "published", [clip.OPENAI_B_32, clip.OPENAI_L_14, clip.OPENAI_L_14_336, clip.LAION_G_14, clip.LAION_BIGG_14]
)
def test_configs_repositories_and_activations_are_open_clips_own(published: PublishedClip) -> None:
    tag = {"ViT-g-14": "laion2b_s12b_b42k", "ViT-bigG-14": "laion2b_s39b_b160k"}.get(published.config, "openai")
    listed = open_clip.get_pretrained_cfg(published.config, tag)
    assert listed["hf_hub"] == f"{published.weights.repo}/"
    assert listed.get("quick_gelu", False) == published.quick_gelu
    assert open_clip.get_model_config(published.config).get("quick_gelu", False) == published.quick_gelu
    assert (listed["interpolation"], listed["resize_mode"]) == ("bicubic", "shortest")


# any size and mode


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "CMYK", "1"])
@pytest.mark.parametrize("size", [(31, 64), (640, 480), (1024, 1024)])
def test_images_of_any_size_and_mode_have_features(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new("RGB", size, (200, 120, 40)).convert(mode).save(tmp_path / f"a.{suffix}")
    picture = read_picture(tmp_path / f"a.{suffix}")
    images = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]
    for extractor in (ClipExtractor("", "", _tiny_open_clip()), lite0.LITE0.load(CONTEXT)):
        features = extractor(images)
        assert np.isfinite(features).all()
        assert len(features) == 1


CONTEXT = MetricContext()


def test_lite0_reads_jpeg_as_nearly_the_picture_it_is_of() -> None:
    image = Image.fromarray(_pictures(96, 96, 1)[0].permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    jpeg = torch.from_numpy(np.array(Image.open(buffer).convert("RGB"))).permute(2, 0, 1)[None]
    extractor = lite0.LITE0.load(CONTEXT)
    own, coded, other = extractor(_pictures(96, 96, 1)), extractor(jpeg), extractor(_pictures(96, 96, 2)[1:])
    assert np.linalg.norm(coded - own) < 0.5 * np.linalg.norm(other - own)


def test_one_network_serves_features_and_maps() -> None:
    context = MetricContext()
    extractor = lite0.LITE0.load(context)
    assert lite0.LITE0.load(context) is extractor
    network = context.loaded["lite0 network"]
    lite0.load_maps(context, 2)
    assert context.loaded["lite0 network"] is network
    digest, _, version = extractor.fingerprint.partition("-")
    assert len(digest) == 16
    assert version == "v1"


# DINOv2


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_dinov2(tmp_path_factory.mktemp("dinov2"))


def make_tiny_dinov2(folder: Path) -> Path:
    """A small DINOv2 in the layout of facebook/dinov2-large: positions for 518 pixels, the checkpoint's own keys."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14
    )
    model = transformers.Dinov2Model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def dinov2_by_timm(folder: Path, pixels: Tensor) -> Tensor:
    """The class token after the last norm by timm's network, with positions as facebookresearch/dinov2 makes them."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    model: Any = timm.models.vision_transformer.VisionTransformer(
        img_size=224, patch_size=14, embed_dim=32, depth=2, num_heads=2, init_values=1.0, num_classes=0,
    )  # fmt: skip
    positions = state["embeddings.position_embeddings"]
    grid = positions[:, 1:].reshape(1, 37, 37, 32).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, scale_factor=(16 + 0.1) / 37, mode="bicubic")
    own = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": torch.cat([positions[:, :1], grid.flatten(2).mT], dim=1),
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": state["layernorm.weight"],
        "norm.bias": state["layernorm.bias"],
    }
    names = {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
             "attn.proj": "attention.output.dense"}  # fmt: skip
    for i in range(2):
        layer = f"encoder.layer.{i}."
        for part in ("weight", "bias"):
            for name, theirs in names.items():
                own[f"blocks.{i}.{name}.{part}"] = state[f"{layer}{theirs}.{part}"]
            qkv = [state[f"{layer}attention.attention.{name}.{part}"] for name in ("query", "key", "value")]
            own[f"blocks.{i}.attn.qkv.{part}"] = torch.cat(qkv)
        for k in (1, 2):
            own[f"blocks.{i}.ls{k}.gamma"] = state[f"{layer}layer_scale{k}.lambda1"]
    model.load_state_dict(own, strict=True)
    with torch.inference_mode():
        token: Tensor = model.eval().forward_features(pixels)[:, 0]
    return token


def test_dinov2_is_its_owners_network(dinov2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERSD_DINOV2_VIT_L_14", str(dinov2_folder))
    extractor = dinov2.VIT_L_14.load(MetricContext())
    images = _pictures(60, 90)
    want = dinov2_by_timm(dinov2_folder, dinov2.dinov2_input(images))
    np.testing.assert_allclose(extractor(images), want, atol=2e-5)
    alone: Any = transformers.Dinov2Model.from_pretrained(dinov2_folder).eval()
    with torch.inference_mode():
        other_positions = alone(dinov2.dinov2_input(images)).pooler_output
    assert np.abs(extractor(images) - other_positions.numpy()).max() > 2e-4  # what the owners' tenth of a patch moves


@pytest.mark.parametrize(
    ("change", "says"),
    [("rename", "1 missing keys, layernorm.weight the first"), ("cut", "can't load DINOv2 ViT-L/14 from")],
)
def test_dinov2_with_other_weights_is_refused(
    change: str, says: str, dinov2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_bytes((dinov2_folder / "config.json").read_bytes())
    state = safetensors.torch.load_file(dinov2_folder / "model.safetensors")
    state["layernorm.scale"] = state.pop("layernorm.weight")
    content = safetensors.torch.save(state, {"format": "pt"})
    (tmp_path / "model.safetensors").write_bytes(content if change == "rename" else content[:-100])
    monkeypatch.setenv("HYPERSD_DINOV2_VIT_L_14", str(tmp_path))
    with pytest.raises(InputError, match=says) as told:
        dinov2.VIT_L_14.load(MetricContext())
    assert "\n" not in str(told.value)
