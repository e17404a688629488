"""The Inception conventions beside torch-fidelity's and torchmetrics' own networks of the same random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

from hypersd_bench.contracts import MetricContext
from hypersd_bench.download import OwnerFile
from hypersd_bench.errors import InputError
from hypersd_bench.hub import file_sha256
from metrics import set_metrics
from metrics.extractors import inception
from metrics.weights import WebFile

feature_extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
NAME = "inception-v3-compat"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Random weights in the file's layout, where the variable says, pinned by their own hash."""
    folder = tmp_path_factory.mktemp("inception")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        torch.save({}, folder / "none.pth")
        patch.setattr(feature_extractor.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        model = feature_extractor.FeatureExtractorInceptionV3(NAME, ["2048"], str(folder / "none.pth"))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    path = folder / inception.FILE
    torch.save(model.state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYPERSD_INCEPTION", str(path))
        pinned = OwnerFile(inception.FILE, "nowhere", file_sha256(path)[:8])
        patch.setattr(inception, "WEIGHTS", WebFile("Inception-v3 of FID", "HYPERSD_INCEPTION", pinned))
        yield path


@pytest.fixture(scope="module")
def context(weights: Path) -> MetricContext:
    return MetricContext()


def _pictures(height: int, width: int, count: int = 2, seed: int = 3) -> Tensor:
    coarse = torch.rand((count, 3, 40, 40), generator=torch.Generator().manual_seed(seed))
    return (255 * torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")).round().byte()


def _theirs(weights: Path, images: Tensor) -> Any:
    model = feature_extractor.FeatureExtractorInceptionV3(NAME, ["2048"], str(weights))
    with torch.inference_mode():
        return model(images)[0].numpy()


def test_tf1_is_torch_fidelitys_own_forward(weights: Path, context: MetricContext) -> None:
    images = _pictures(480, 640)
    features = inception.TF1.load(context)(images)
    assert features.shape == (2, 2048)
    assert np.abs(features - inception.TORCHMETRICS.load(context)(images)).max() > 1e-2
    np.testing.assert_allclose(features, _theirs(weights, images), rtol=1e-4, atol=1e-4)


def test_all_conventions_are_torch_fidelitys_at_299(weights: Path, context: MetricContext) -> None:
    images = _pictures(299, 299, 1)
    want = _theirs(weights, images)
    for source in (inception.TF1, inception.TORCHMETRICS, inception.CLEAN, inception.PATCH):
        np.testing.assert_allclose(source.load(context)(images), want, rtol=1e-4, atol=1e-4)
    shifted = inception.PYTORCH_FID.load(context)(images)  # by half a level, and no more
    assert 0 < np.abs(shifted - want).max() < 0.02 * np.abs(want).max()


def test_torchmetrics_convention_is_its_own_forward_and_fid(weights: Path, context: MetricContext) -> None:
    """FID of the features' first 24 numbers, as an eigenvalue problem of 2048 takes torchmetrics a minute."""

    class First(nn.Module):
        num_features = 24

        def __init__(self) -> None:
            super().__init__()
            self.network = NoTrainInceptionV3(NAME, ["2048"], str(weights))
            self.seen: list[Tensor] = []

        def forward(self, images: Tensor) -> Tensor:
            with torch.inference_mode():
                self.seen.append(self.network(images))
            return self.seen[-1][:, :24].clone()

    network = First()
    library = FrechetInceptionDistance(feature=network)
    real, fake = _pictures(120, 90, 3), _pictures(120, 90, 3, seed=4)
    library.update(real, real=True)
    library.update(fake, real=False)
    extractor = inception.TORCHMETRICS.load(context)
    mine = [extractor(images) for images in (real, fake)]
    for got, want in zip(mine, network.seen, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    fid = set_metrics.FID_TORCHMETRICS(context)
    assert fid.extractor is extractor
    assert fid.distance(mine[1][:, :24], mine[0][:, :24]) == pytest.approx(float(library.compute()), rel=1e-3)


def test_one_network_and_fingerprint_serve_all(context: MetricContext, weights: Path) -> None:
    sources = (inception.TF1, inception.CLEAN, inception.PATCH, inception.TORCHMETRICS, inception.PYTORCH_FID)
    loaded = [source.load(context) for source in sources]
    assert {extractor.fingerprint for extractor in loaded} == {f"{file_sha256(weights)[:16]}-v1"}
    assert len({extractor.id for extractor in loaded}) == len(sources)
    assert [key for key in context.loaded if "network" in key] == ["inception network"]


@pytest.mark.parametrize("fault", ["key", "pickle"])
def test_a_foreign_file_is_refused(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / inception.FILE
    torch.save({"fc.weight": torch.zeros(1)} if fault == "key" else Ball(), path)
    monkeypatch.setenv("HYPERSD_INCEPTION", str(path))
    pinned = OwnerFile(inception.FILE, "nowhere", file_sha256(path))
    monkeypatch.setattr(inception, "WEIGHTS", WebFile("Inception-v3 of FID", "HYPERSD_INCEPTION", pinned))
    with pytest.raises(InputError, match=r"can't load Inception-v3 of FID from .*; download it again") as told:
        inception.CLEAN.load(MetricContext())
    assert "\n" not in str(told.value)
    assert not Ball.opened


class Ball:
    """Unpickled, it would say so."""

    opened = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Ball, "opened", True)
