"""LAION's aesthetic heads on the embeddings published with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hypersd_bench.contracts import MetricContext
from hypersd_bench.errors import InputError
from metrics.aesthetic import LAION_V1, LAION_V1_FILE, LAION_V2, LAION_V2_FILE, LaionRating, LinearHead, load_head
from metrics.extractors.network import NetworkExtractor
from metrics.factory import Factory

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "aesthetic"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="the shared test data is not here")

# Reproduced from LAION-AI/aesthetic-predictor (6d122ad) and christophschuhmann/improved-aesthetic-predictor (6934dd8),
# float32 on CPU, rating 0 to 9
V1_L_14 = [-2.457909, -0.137857, 1.895110, 3.584934, 5.099726, 6.470104, 7.786991, 9.048001, 10.226408, 11.304426]
V1_B_32 = [-1.469954, 0.272795, 1.990020, 3.611417, 5.087442, 6.392551, 7.668165, 8.915450, 9.916607, 11.005575]
V2_L_14 = [1.655480, 2.359275, 3.069824, 3.672451, 4.238010, 4.701021, 5.073054, 5.365362, 5.576664, 5.746761]


def _embeddings(clip: str) -> Tensor:
    files = [DATA / "laion_v1" / f"{clip}_embeddings" / f"rating{i}.npy" for i in range(10)]
    return torch.from_numpy(np.concatenate([np.load(file, allow_pickle=False) for file in files]))


@pytest.mark.parametrize(("clip", "want"), [("vit_l_14", V1_L_14), ("vit_b_32", V1_B_32)])
def test_v1_heads(clip: str, want: list[float]) -> None:
    state = torch.load(DATA / "laion_v1" / f"sa_0_4_{clip}_linear.pth", map_location="cpu", weights_only=True)
    assert LinearHead.fold(state)(_embeddings(clip)).tolist() == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize(
    ("factory", "file", "want"),
    [
        (LAION_V1, f"laion_v1/{LAION_V1_FILE}", V1_L_14),
        (LAION_V2, f"improved/{LAION_V2_FILE}", V2_L_14),
    ],
)
def test_metrics_rate_the_embeddings_as_published(
    factory: Factory[LaionRating], file: str, want: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the metric's own factory, with the embeddings as its extractor's features."""
    for variable in ("HYPERSD_AESTHETIC_V1", "HYPERSD_AESTHETIC_V2"):
        monkeypatch.setenv(variable, str(DATA / file))
    context = MetricContext()
    context.loaded[factory.info.features] = NetworkExtractor(factory.info.features, "", lambda images: images)
    metric = factory(context)
    features = metric.extractor(_embeddings("vit_l_14"))
    assert metric.score_features(features, [""] * 10).tolist() == pytest.approx(want, abs=1e-4)


def test_v2_head_and_its_affine_form() -> None:
    head = load_head(DATA / "improved" / LAION_V2_FILE)
    x = _embeddings("vit_l_14")
    assert head(x).tolist() == pytest.approx(V2_L_14, abs=1e-5)
    assert head(30 * x).tolist() == pytest.approx(V2_L_14, abs=1e-5)
    assert float(head.b) == pytest.approx(5.236646, abs=1e-5)
    assert float(head.w.norm()) == pytest.approx(17.995625, abs=1e-4)


def test_another_head_is_refused() -> None:
    with pytest.raises(InputError, match="sha256 2cd4e60f4f24"):
        load_head(DATA / "laion_v1" / "sa_0_4_vit_l_14_linear.pth")
