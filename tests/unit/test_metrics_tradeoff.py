"""Step curves, Pareto fronts and the cheapest good enough: placed qualities and costs, and simulated wrong choices."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from hypersd_bench.contracts import MetricInfo
from hypersd_bench.errors import InputError
from hypersd_bench.features import write_features
from hypersd_bench.store import CostRow, RunStore, ScoreRow, TimingRow, write_json
from metrics import tradeoff as module
from metrics.cli import compare
from metrics.comparison import View
from metrics.stats import holm
from metrics.tradeoff import Cheapest, CostName, cheapest_within, step_curves, tradeoff
from tests.synthetic_run import AESTHETIC, CLIP, FID, make_run

PROMPTS = 24
QUALITY = {("a", 1): 20.0, ("a", 4): 24.0, ("b", 1): 21.0, ("b", 4): 24.05}
MILLISECONDS = {("a", 1): 10.0, ("a", 4): 30.0, ("b", 1): 12.0, ("b", 4): 40.0}
GIB = {("a", 1): 2.0, ("a", 4): 2.0, ("b", 1): 3.0, ("b", 4): 3.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = make_run(tmp_path_factory.mktemp("made") / "run", models=("a", "b"), steps=(1, 4), num_prompts=PROMPTS)
    _score(store, QUALITY)
    for model, steps in QUALITY:
        store.forget_timings(model, steps)
        base = MILLISECONDS[model, steps] / 1000
        store.record_timings([TimingRow(model, steps, "total", i, 2, 2 * base * f, "cpu")
                              for i, f in enumerate((1.0, 0.9, 5.0, 1.1, 0.5))])  # fmt: skip
        store.record_timings([TimingRow(model, steps, "total", 0, 8, 99.0, "cpu"),
                              TimingRow(model, steps, "denoise", 0, 1, 88.0, "cpu")])  # fmt: skip
        size = GIB[model, steps] * 2**30
        store.record_costs(
            [CostRow(model, steps, "peak-memory", batch, size * batch, "bytes", "cpu") for batch in (1, 4)]
        )
    return store.folder


@pytest.fixture
def store(made: Path, tmp_path: Path) -> RunStore:
    return RunStore.open(shutil.copytree(made, tmp_path / "run"))


def _score(store: RunStore, quality: Mapping[tuple[str, int], float], noise: float = 0.2) -> None:
    """Prompts differ by much more than models do, seeds and configurations by ``noise``."""
    rng, rows = np.random.default_rng(1), store.images()
    prompts = sorted({row.prompt_id for row in rows})
    easy = dict(zip(prompts, np.random.default_rng(0).normal(0, 3, len(prompts)).tolist(), strict=True))
    values = [quality[row.model, row.steps] + easy[row.prompt_id] + rng.normal(0, noise) for row in rows]
    store.record_scores([ScoreRow(CLIP.id, r.id or 0, float(v)) for r, v in zip(rows, values, strict=True)])


def _front(store: RunStore, cost: CostName, info: MetricInfo = CLIP) -> dict[tuple[str, int], tuple[str, int] | None]:
    rows = tradeoff(View([store]), info).fronts[cost]
    return {(row.model, row.steps): row.beaten_by for row in rows}


def test_latency_is_the_median_per_image_and_memory_the_peak_at_the_smallest_batch(store: RunStore) -> None:
    for point in step_curves(View([store]), CLIP):
        assert point.latency is not None
        assert point.memory is not None
        assert point.latency.value == pytest.approx(MILLISECONDS[point.cell])
        assert (point.latency.device, point.latency.batch_size) == ("cpu", 2)
        assert point.memory.value == GIB[point.cell] * 2**30
        assert point.cost("steps") == point.steps


def test_the_front_is_left_only_where_a_cheaper_one_is_shown_to_be_better(store: RunStore) -> None:
    assert _front(store, "latency") == {("a", 1): None, ("a", 4): None, ("b", 1): None, ("b", 4): None}
    assert _front(store, "steps") == {("a", 1): ("b", 1), ("a", 4): None, ("b", 1): None, ("b", 4): None}
    _score(store, QUALITY | {("b", 1): 25.0})  # better than all, at 12 ms
    assert _front(store, "latency") == {("a", 1): None, ("a", 4): ("b", 1), ("b", 1): None, ("b", 4): ("b", 1)}
    assert _front(store, "memory") == {("a", 1): ("a", 4), ("a", 4): None, ("b", 1): None, ("b", 4): ("b", 1)}


def test_what_is_not_shown_stays_on_the_front_in_doubt(store: RunStore) -> None:
    _score(store, QUALITY | {("b", 4): 23.98})  # a hair behind a at 4, which is faster
    row = next(r for r in tradeoff(View([store]), CLIP).fronts["latency"] if (r.model, r.steps) == ("b", 4))
    assert (row.on_front, row.nominal) == (True, False)
    _score(store, QUALITY)
    row = next(r for r in tradeoff(View([store]), CLIP).fronts["latency"] if (r.model, r.steps) == ("b", 4))
    assert (row.on_front, row.nominal) == (True, True)


def test_lower_is_better_is_minded(store: RunStore) -> None:
    lower = [entry | ({"direction": "lower"} if entry["id"] == CLIP.id else {}) for entry in store.manifest["metrics"]]
    store.manifest["metrics"] = lower
    view = View([store])
    info = view.infos[0]
    assert _front(store, "latency", info) == {
        ("a", 1): None, ("a", 4): ("a", 1), ("b", 1): ("a", 1), ("b", 4): ("a", 1)
    }  # fmt: skip
    assert cheapest_within(view, info, 0.5).choice == ("a", 1)
    assert all(gain.per_step.value < 0 for gain in tradeoff(view, info).gains), "more steps are worse now"


def test_gain_for_each_extra_step(store: RunStore) -> None:
    gains = {gain.model: gain for gain in tradeoff(View([store]), CLIP).gains}
    scores = store.scores(CLIP.id)
    for model, gain in gains.items():
        of = {n: [scores[r.id or 0].value for r in store.images() if (r.model, r.steps) == (model, n)] for n in (1, 4)}
        assert gain.per_step.value == pytest.approx((np.mean(of[4]) - np.mean(of[1])) / 3)  # type: ignore[arg-type]
        assert gain.per_step.low < gain.per_step.value < gain.per_step.high
        assert (gain.from_steps, gain.to_steps) == (1, 4)
    assert [g.p_holm for g in gains.values()] == holm([g.per_step.p_value for g in gains.values()])


@pytest.mark.parametrize(
    ("delta", "cost", "want"),
    [(0.5, "latency", ("a", 4)), (4, "latency", ("b", 1)), (5, "latency", ("a", 1)), (0.5, "memory", ("a", 4)),
     (4, "steps", ("b", 1)), (4, "memory", ("a", 4))],
)  # fmt: skip
def test_the_cheapest_within(store: RunStore, delta: float, cost: CostName, want: tuple[str, int]) -> None:
    got = cheapest_within(View([store]), CLIP, delta, cost)
    assert got.choice == want
    assert (got.n, got.num_prompts) == (2 * PROMPTS, PROMPTS)
    best = max(QUALITY.values())
    for loss in got.losses:
        assert loss.value == pytest.approx(best - QUALITY[loss.model, loss.steps], abs=0.2)
        assert loss.value <= loss.upper <= loss.value + 0.3


def test_less_than_the_noise_can_not_be_shown(store: RunStore) -> None:
    got = cheapest_within(View([store]), CLIP, 0.01)
    assert got.choice is None
    assert not any(loss.within for loss in got.losses), "not even the best by the figures"


def test_what_was_not_timed_is_not_chosen(store: RunStore) -> None:
    store.forget_timings("a", 4)
    assert cheapest_within(View([store]), CLIP, 0.5).choice == ("b", 4)
    assert ("a", 4) not in _front(store, "latency")
    assert ("a", 4) in _front(store, "steps")


def test_times_of_two_devices_are_not_compared(store: RunStore) -> None:
    store.forget_timings("a", 4)
    store.record_timings([TimingRow("a", 4, "total", 0, 2, 0.01, "H100")])
    found = tradeoff(View([store]), CLIP)
    assert "H100 (batch 2), cpu (batch 2)" in found.lacking["latency"]
    assert set(found.fronts) == {"memory", "steps"}
    with pytest.raises(InputError, match=r"several devices or batch sizes.*choose another --cost"):
        cheapest_within(View([store]), CLIP, 0.5, "latency")


def test_images_that_one_lacks_count_for_none(store: RunStore) -> None:
    lost = next(row for row in store.images() if (row.model, row.steps) == ("a", 1))
    store.record_scores([ScoreRow(CLIP.id, lost.id or 0, None, "black")])
    assert cheapest_within(View([store]), CLIP, 0.5).n == 2 * PROMPTS - 1


def test_set_metrics_by_their_replicates(store: RunStore) -> None:
    rng = np.random.default_rng(2)
    shared = rng.normal(0, 1, (2 * PROMPTS, 16))
    for (model, steps), shift in {("a", 1): 4.0, ("a", 4): 0.1, ("b", 1): 2.0, ("b", 4): 0.1}.items():
        rows = [row for row in store.images() if (row.model, row.steps) == (model, steps)]
        x = (shared + 0.05 * rng.normal(0, 1, shared.shape) + shift / 4).astype(np.float32)
        write_features(store.folder, FID.features, model, steps, "",
                       {row.sha256: y for row, y in zip(rows, x, strict=True)})  # fmt: skip
    view = View([store])
    got = cheapest_within(view, FID, 1.0)
    assert got.choice == ("a", 4)
    assert {(x.model, x.steps) for x in got.losses if x.within} == {("a", 4), ("b", 4)}
    on_front = {cell for cell, beaten_by in _front(store, "memory", FID).items() if beaten_by is None}
    assert on_front == {("a", 4), ("b", 4)}
    (store.folder / "features" / "lite0_128" / "a@4.npz").unlink()
    with pytest.raises(InputError, match="score the run again"):
        cheapest_within(View([store]), FID, 1.0)


@pytest.mark.parametrize("delta", [0.0, -1.0, float("nan"), float("inf")])
def test_a_delta_must_be_a_difference(store: RunStore, delta: float) -> None:
    with pytest.raises(InputError, match="give a difference above 0 in the unit of clip-score/pocket"):
        cheapest_within(View([store]), CLIP, delta)


def _choices(P: int, losses: NDArray[np.float64], delta: float, runs: int, seed: int) -> list[Cheapest]:
    """The choice among configurations, of which dearer ones come later, in simulated sets of P prompts."""
    rng = np.random.default_rng(seed)
    costs = np.arange(len(losses))
    found = []
    for _ in range(runs):
        means = -losses + rng.normal(0, 2, (P, 1)) + rng.normal(0, 1, (P, len(losses)))
        one, draws = module.joint_means(means)
        judged = module.judge_losses([(("m", int(c)), float(c)) for c in costs], one, draws, delta)
        found.append(Cheapest("", delta, "steps", P, P, module.cheapest_of(judged), judged))
    return found


@pytest.mark.parametrize(("P", "num_bad"), [(6, 3), (12, 8), (64, 8)])
def test_a_choice_is_rarely_wrong_however_many_there_are(P: int, num_bad: int) -> None:
    """All bad ones are cheaper than the good one, and worse than it by a hair more than delta."""
    delta, runs = 0.5, 80
    losses = np.array([delta + 1e-9] * num_bad + [0.0])
    wrong = sum(x.choice is not None and losses[x.choice[1]] > delta for x in _choices(P, losses, delta, runs, seed=P))
    assert wrong / runs <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)


def test_a_choice_finds_what_is_clearly_good_enough() -> None:
    found = _choices(100, np.array([3.0, 0.1, 0.0]), 0.8, 20, seed=1)
    assert [x.choice for x in found].count(("m", 1)) >= 18


# the command line


def test_compare_within_prints_the_curve_the_front_and_the_answer(store: RunStore) -> None:
    store.manifest["models"][0]["trained_on"] = [CLIP.id]
    write_json(store.folder / "run.json", store.manifest)
    result = CliRunner().invoke(compare, [str(store.folder), "--within", "0.5"])
    assert result.exit_code == 0, result.output
    text = result.output
    assert "Cheapest by latency within 0.5 (cosine x100) of the best at 95 %: a\u2020 at 4 steps, 30.0 ms" in text
    assert "(48 images of 24 prompts)" in text
    assert "\u2020: the model was trained on this metric." in text
    assert text.count("a\u2020") == 2 + 1 + 1, "curve, gain, answer"
    by_steps = CliRunner().invoke(compare, [str(store.folder), "--within", "0.5", "--cost", "steps"]).output
    assert "behind " in by_steps + text
    assert "2.00" in text


def test_compare_within_json(store: RunStore) -> None:
    options = [str(store.folder), "--within", "0.5", "--metric", AESTHETIC.id, "--cost", "steps", "--json"]
    result = CliRunner().invoke(compare, options)
    assert result.exit_code == 0, result.output
    values = json.loads(result.output)
    assert values["cheapest"]["metric"] == values["tradeoff"]["metric"] == AESTHETIC.id
    assert values["cheapest"]["cost"] == "steps"
    assert {"latency", "memory", "steps"} == values["tradeoff"]["fronts"].keys()
    assert len(values["tradeoff"]["points"]) == len(values["cheapest"]["losses"]) == 4
    assert values["tradeoff"]["points"][0]["latency"]["value"] == pytest.approx(10)


def test_compare_within_falls_back_on_steps_and_says_when_nothing_is_shown(store: RunStore) -> None:
    for model, steps in QUALITY:
        store.forget_timings(model, steps)
    text = CliRunner().invoke(compare, [str(store.folder), "--within", "0.01"]).output
    assert "No configuration is shown to be within 0.01 (cosine x100)" in text
    assert "latency was not measured." in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--within", "0"], "give a difference above 0"),
        (["--within", "1", "--cost", "time"], "unknown cost 'time'"),
        (["--within", "1", "--metric", "clip"], "unknown metric 'clip'"),
        (["--within", "1", "--metric", AESTHETIC.id, "--steps", "9"], "no images at 9 steps"),
    ],
)
def test_what_can_not_be_answered_is_refused(store: RunStore, options: list[str], message: str) -> None:
    result = CliRunner().invoke(compare, [str(store.folder), *options])
    assert isinstance(result.exception, InputError)
    assert re.search(message, str(result.exception)), result.exception
