"""The fixed images: a metric that scores them otherwise than before stops the run, and is told why."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from hypersd_bench import registry
from hypersd_bench.cache import own_cache
from hypersd_bench.cli.main import main
from hypersd_bench.contracts import MetricContext
from hypersd_bench.provenance import collect
from hypersd_bench.runner import canaries
from hypersd_bench.runner.canaries import KNOWN, PROMPTS, Canary, alike, canary_values, enlarged, likely_cause
from tests.integration.test_scoring import make_run
from tests.toy_metric import BRIGHTNESS, COLOUR, Brightness

PACKAGES = collect().packages


@pytest.fixture
def own_cache_folder(toy_metrics: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HYPERSD_BENCH_CACHE", str(tmp_path / "cache"))


def test_values_are_the_metrics_of_the_three_images() -> None:
    pictures = [enlarged(name, 1) for name in PROMPTS]
    assert canary_values(BRIGHTNESS, {}) == pytest.approx([picture.mean() for picture in pictures])
    means = [picture.astype(np.float64).mean((0, 1)) for picture in pictures]
    want = [value for mean in means for value in (mean.mean(), mean.std())]
    assert canary_values(COLOUR, {}) == pytest.approx(want, abs=1e-3)


def test_a_protocol_for_large_images_gets_large_canaries() -> None:
    small, large = enlarged("gradient", 1), enlarged("gradient", 299)
    assert small.shape == (64, 96, 3)
    assert large.shape == (320, 480, 3)
    np.testing.assert_array_equal(large[::5, ::5], small)


def test_a_metric_that_drifts_stops_the_scoring_and_names_the_cause(
    tmp_path: Path, own_cache_folder: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    store = make_run(folder, {"teacher": 100}, metrics=("toy/brightness", "toy/redness"))
    assert main(["score", str(folder), "--metrics", "toy/brightness"]) == 0
    recorded = canary_values(BRIGHTNESS, {})
    assert recorded is not None
    kept = store.open(folder).manifest["canaries"]["toy/brightness"]
    assert kept == {"fingerprint": "", "values": list(recorded)}
    monkeypatch.setattr(Brightness, "score", _scaled(0.01))
    store.forget_scores("toy/brightness")
    assert main(["score", str(folder)]) == 1
    told = capsys.readouterr().err
    assert "toy/brightness does not score the fixed images as it did" in told
    assert "the scale changed: all values are 0.01 times what they were" in told
    assert store.scores("toy/brightness") == store.scores("toy/redness") == {}
    (own_cache() / "canaries.json").unlink()  # a change that was wanted
    assert main(["score", str(folder)]) == 0
    assert len(store.scores("toy/redness")) == 3


def _scaled(factor: float) -> Callable[..., NDArray[np.float64]]:
    def score(self: Brightness, images: Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
        values: NDArray[np.float64] = factor * images.double().mean((1, 2, 3)).numpy()
        return values

    return score


@pytest.mark.parametrize(
    ("found", "cause"),
    [
        ((50.0, 75.0, 45.0), "scale changed: all values are 2.5 times"),
        ((20.1, 20.2, 20.1), "no longer reach the network whole"),
        ((30.0, 20.0, 18.0), "paired in another order"),
        ((np.nan, 20.0, 18.0), "weights are broken"),
        ((20.9, 29.1, 17.5), "pillow 11.0 -> 12.0"),
    ],
)
def test_causes_are_told_by_what_the_values_look_like(found: tuple[float, ...], cause: str) -> None:
    known = Canary((20.0, 30.0, 18.0), {"pillow": "11.0"})
    assert not alike(found, known.values)
    assert cause in likely_cause(found, known, {"pillow": "12.0"})


def test_with_the_same_packages_the_weights_are_suspected() -> None:
    known = Canary((20.0, 30.0, 18.0), PACKAGES)
    assert "other weights, preprocessing or activation" in likely_cause((20.9, 29.1, 17.5), known, PACKAGES)
    assert alike((20.0, 30.05, 18.0), known.values)


def test_shipped_values_are_of_every_metric_that_needs_no_download() -> None:
    shipped = {key.split("|")[0] for key in json.loads(KNOWN.read_text())}
    factories = {name: registry.resolve("metric", name) for name in registry.METRICS}
    assert shipped == {name for name, factory in factories.items() if not factory.needs}


@pytest.mark.parametrize("name", sorted({key.split("|")[0] for key in canaries._entries(KNOWN)}))
def test_shipped_metrics_score_as_shipped(name: str) -> None:
    metric: Any = registry.resolve("metric", name)(MetricContext())
    known = canaries._known(metric)
    values = canary_values(metric, {})
    assert known is not None
    assert values is not None
    assert alike(values, known.values)
