"""Levels and verdicts of a run: the right images paired, the right way round, missing never zero."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats

from hypersd_bench.errors import InputError
from hypersd_bench.store import RunStore, ScoreRow, SetScoreRow, write_json
from metrics.cli import compare
from metrics.comparison import Comparison, Summary, comparisons, summaries, verdict
from metrics.frechet import feature_distance
from tests.synthetic_run import AESTHETIC, CLIP, FID, make_run


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return make_run(tmp_path / "run", models=("hyper-sd", "lightning", "tcd"), steps=(1, 4), num_prompts=12)


def _summary(store: RunStore, metric: str, model: str, steps: int) -> Summary:
    (found,) = [s for s in summaries(store) if (s.metric, s.model, s.steps) == (metric, model, steps)]
    return found


def _comparison(found: list[Comparison], metric: str, model: str, steps: int) -> Comparison:
    (comparison,) = [c for c in found if (c.metric, c.model, c.steps) == (metric, model, steps)]
    return comparison


def _values(store: RunStore, metric: str, model: str, steps: int) -> dict[tuple[str, int], float]:
    scores = store.scores(metric)
    rows = [row for row in store.images() if (row.model, row.steps) == (model, steps)]
    return {(row.prompt_id, row.replicate): float(scores[row.id or 0].value or 0) for row in rows}


def _image_id(store: RunStore, key: tuple[str, int, str, int]) -> int:
    return next(row.id or 0 for row in store.images() if row.key == key)


def _shift(store: RunStore, metric: str, model: str, by: float) -> None:
    rows, scores = store.images(), store.scores(metric)
    old = [scores[row.id or 0] for row in rows if row.model == model]
    store.record_scores([replace(score, value=(score.value or 0) + by) for score in old])


def test_every_metric_model_and_step_count_has_a_level(store: RunStore) -> None:
    got = [(s.metric, s.model, s.steps) for s in summaries(store)]
    want = [
        (m.id, model, n) for m in (CLIP, AESTHETIC, FID) for model in ("hyper-sd", "lightning", "tcd") for n in (1, 4)
    ]
    assert got == want


def test_level_is_the_mean_over_images_with_prompts_as_clusters(store: RunStore) -> None:
    estimate = _summary(store, CLIP.id, "tcd", 4).estimate
    assert estimate is not None
    assert estimate.value == pytest.approx(np.mean(list(_values(store, CLIP.id, "tcd", 4).values())))
    assert (estimate.n, estimate.num_clusters) == (24, 12)
    assert estimate.low < estimate.value < estimate.high


def test_difference_is_model_minus_baseline_by_prompt(store: RunStore) -> None:
    got = _comparison(comparisons(store), CLIP.id, "tcd", 4)
    a, b = _values(store, CLIP.id, "tcd", 4), _values(store, CLIP.id, "hyper-sd", 4)
    by_prompt = [np.mean([a[p, r] - b[p, r] for r in (0, 1)]) for p in dict.fromkeys(p for p, _ in a)]
    assert got.difference.value == pytest.approx(np.mean(by_prompt))
    assert got.difference.p_value == pytest.approx(stats.ttest_1samp(by_prompt, 0).pvalue)
    assert (got.baseline, got.difference.n, got.difference.num_clusters) == ("hyper-sd", 24, 12)


def test_verdicts_speak_of_the_model(store: RunStore) -> None:
    _shift(store, CLIP.id, "lightning", 30)
    _shift(store, CLIP.id, "tcd", -30)
    found = comparisons(store)
    assert _comparison(found, CLIP.id, "lightning", 1).verdict == "better"
    assert _comparison(found, CLIP.id, "tcd", 1).verdict == "worse"
    assert {c.verdict for c in comparisons(store, "tcd") if c.metric == CLIP.id} == {"better"}


@pytest.mark.parametrize(
    ("difference", "p", "higher", "want"),
    [
        (1, 0.01, True, "better"),
        (1, 0.01, False, "worse"),
        (-1, 0.01, False, "better"),
        (-1, 0.01, True, "worse"),
        (1, 0.06, True, "no difference shown"),
        (0, 0.0, True, "no difference shown"),
    ],
)
def test_which_way_round(difference: float, p: float, higher: bool, want: str) -> None:
    assert verdict(difference, p, higher) == want


def test_lower_is_better_for_fid(store: RunStore) -> None:
    path = store.features_path(FID.id, "tcd", 1)
    np.save(path, np.load(path) + 50)
    assert _comparison(comparisons(store), FID.id, "tcd", 1).verdict == "worse"


def test_p_is_corrected_over_the_whole_run(store: RunStore) -> None:
    found = comparisons(store)
    assert len(found) == 3 * 2 * 2
    smallest = min(found, key=lambda c: c.difference.p_value)
    assert smallest.p_holm == pytest.approx(min(1, len(found) * smallest.difference.p_value))


def test_unscored_images_are_missing_not_zero(store: RunStore) -> None:
    full = _summary(store, CLIP.id, "hyper-sd", 1)
    first = _image_id(store, ("hyper-sd", 1, "p0000", 0))
    kept = store.scores(CLIP.id)[first].value
    store.record_scores([ScoreRow(CLIP.id, first, None, "black")])
    got = _summary(store, CLIP.id, "hyper-sd", 1)
    assert (got.missing, got.reason) == (1, "black (1)")
    assert got.estimate is not None
    assert full.estimate is not None
    assert got.estimate.n == 23
    assert got.estimate.value == pytest.approx((full.estimate.value * 24 - float(kept or 0)) / 23)
    assert _comparison(comparisons(store), CLIP.id, "tcd", 1).difference.n == 23


def test_nothing_scored_is_no_estimate(store: RunStore) -> None:
    rows = [row for row in store.images() if (row.model, row.steps) == ("tcd", 1)]
    store.record_scores([ScoreRow(CLIP.id, row.id or 0, None, "no weights") for row in rows])
    got = _summary(store, CLIP.id, "tcd", 1)
    assert (got.estimate, got.missing, got.reason) == (None, 24, "no weights (24)")
    assert ("tcd", 1) not in {(c.model, c.steps) for c in comparisons(store) if c.metric == CLIP.id}


def test_a_set_metric_without_value_is_missing_with_its_reason(store: RunStore) -> None:
    store.record_set_scores([SetScoreRow(FID.id, "tcd", 1, None, 0, "", "no reference")])
    got = _summary(store, FID.id, "tcd", 1)
    assert (got.estimate, got.missing, got.reason) == (None, 24, "no reference")


def test_images_newer_than_a_set_score_are_missing(store: RunStore) -> None:
    store.record_set_scores([SetScoreRow(FID.id, "tcd", 1, 9.0, 22, "made up")])
    got = _summary(store, FID.id, "tcd", 1)
    assert (got.missing, got.reason) == (2, "not scored (2)")


def test_set_level_is_the_distance_of_the_features_with_an_interval(store: RunStore) -> None:
    features = np.load(store.features_path(FID.id, "tcd", 4))
    reference = np.load(store.folder / "features" / "fid_lite0" / "reference.npy")
    estimate = _summary(store, FID.id, "tcd", 4).estimate
    assert estimate is not None
    assert estimate.value == pytest.approx(feature_distance(features, reference))
    assert estimate.low < estimate.value < estimate.high


@pytest.mark.parametrize(("num_prompts", "replicates"), [(2, 1), (1, 4)])
def test_too_few_images_for_an_interval_show_nothing(tmp_path: Path, num_prompts: int, replicates: int) -> None:
    store = make_run(tmp_path / "run", ("hyper-sd", "tcd"), (1,), num_prompts=num_prompts, replicates=replicates)
    estimate = _summary(store, FID.id, "tcd", 1).estimate
    assert estimate is not None
    assert estimate.value > 0
    assert np.isnan(estimate.low)
    comparison = _comparison(comparisons(store), FID.id, "tcd", 1)
    assert (comparison.difference.p_value, comparison.verdict) == (1, "no difference shown")


def test_set_level_without_features_keeps_the_recorded_value(store: RunStore) -> None:
    store.features_path(FID.id, "tcd", 4).unlink()
    estimate = _summary(store, FID.id, "tcd", 4).estimate
    assert estimate is not None
    assert estimate.value == 10 + 2 + 8 / 4  # what the run recorded
    assert np.isnan(estimate.low)
    assert not [c for c in comparisons(store) if (c.metric, c.model, c.steps) == (FID.id, "tcd", 4)]


def test_step_counts_the_baseline_lacks_are_compared_to_nothing(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", models=("hyper-sd", "tcd"), steps=(1, 4))
    extra = [replace(row, model="teacher", steps=25, id=None) for row in store.images() if row.key[:2] == ("tcd", 1)]
    store.record_images(extra)
    manifest = {**store.manifest, "models": [*store.manifest["models"], {"name": "teacher"}]}
    write_json(store.folder / "run.json", manifest)
    store = RunStore.open(store.folder)
    assert ("teacher", 25) in {(s.model, s.steps) for s in summaries(store)}
    assert "teacher" not in {c.model for c in comparisons(store)}


def test_unknown_baseline_names_the_nearest(store: RunStore) -> None:
    with pytest.raises(InputError, match="did you mean 'lightning'"):
        comparisons(store, "lightening")


def test_compare_prints_a_table_and_json(store: RunStore) -> None:
    text = CliRunner().invoke(compare, [str(store.folder)])
    assert text.exit_code == 0, text.output
    assert "lightning" in text.output
    assert "[" in text.output
    assert "model minus hyper-sd" in text.output
    result = CliRunner().invoke(compare, [str(store.folder), "--against", "tcd", "--json"])
    values = json.loads(result.output)
    assert values["baseline"] == "tcd"
    assert len(values["comparisons"]) == 12
    assert {"value", "low", "high", "p_value"} <= values["comparisons"][0]["difference"].keys()


@pytest.mark.parametrize("kind", ["prompt", "pair"])
def test_metrics_of_prompts_and_pairs_are_compared_like_those_of_images(store: RunStore, kind: str) -> None:
    want = [replace(c, metric="") for c in comparisons(store) if c.metric == CLIP.id]
    entries = [entry | ({"kind": kind} if entry["id"] == CLIP.id else {}) for entry in store.manifest["metrics"]]
    write_json(store.folder / "run.json", store.manifest | {"metrics": entries})
    again = RunStore.open(store.folder)
    assert [replace(c, metric="") for c in comparisons(again) if c.metric == CLIP.id] == want
    assert len(comparisons(again)) == 12  # one Holm family, whatever the kinds
    assert _summary(again, CLIP.id, "tcd", 4).estimate == _summary(store, CLIP.id, "tcd", 4).estimate
    text = CliRunner().invoke(compare, [str(store.folder), "--against", "tcd"])
    assert text.exit_code == 0, text.output


def test_compare_marks_what_a_model_was_trained_on_and_prints_the_notes(store: RunStore) -> None:
    store.manifest["models"][-1]["trained_on"] = [CLIP.id]
    write_json(store.folder / "run.json", store.manifest)
    text = CliRunner().invoke(compare, [str(store.folder)]).output
    assert text.count("tcd\u2020") == 2, "at both step counts of the one metric"
    assert "\u2020: the model was trained on this metric." in text
    assert "aesthetic/pocket: a proxy." in text
    values = json.loads(CliRunner().invoke(compare, [str(store.folder), "--json"]).output)
    assert values["trained_on"] == {"hyper-sd": [], "lightning": [], "tcd": [CLIP.id]}


def test_compare_json_has_null_for_no_interval(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", models=("hyper-sd", "tcd"), steps=(1,), num_prompts=1)
    values = json.loads(CliRunner().invoke(compare, [str(store.folder), "--json"]).output)
    assert values["levels"][0]["estimate"]["low"] is None
