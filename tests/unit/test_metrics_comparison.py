"""Levels and verdicts of a run: the right images paired, the right way round, missing never zero."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from scipy import stats

from hypersd_bench.errors import InputError
from hypersd_bench.features import features_folder, read_features, read_reference, write_features
from hypersd_bench.store import RunStore, ScoreRow, SetScoreRow, write_json
from metrics import replicate_cache
from metrics.cli import compare
from metrics.comparison import Comparison, Summary, View, comparisons, summaries, verdict
from metrics.frechet import feature_distance
from metrics.set_statistics import evaluate
from metrics.stats import Replicates, jackknife
from tests.synthetic_run import AESTHETIC, CLIP, FID, REFERENCE, make_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for name, models in (
        ("run", ("hyper-sd", "lightning", "tcd")), ("ours", ("hyper-sd", "tcd")), ("theirs", ("lightning", "tcd"))
    ):  # fmt: skip
        make_run(folder / name, models=models, steps=(1, 4), num_prompts=12)
    return folder


def _copy(run: Path, folder: Path) -> RunStore:
    return RunStore.open(shutil.copytree(run, folder / run.name))


@pytest.fixture
def store(made: Path, tmp_path: Path) -> RunStore:
    return _copy(made / "run", tmp_path)


def _summary(store: RunStore, metric: str, model: str, steps: int) -> Summary:
    (found,) = [s for s in summaries(store) if (s.metric, s.model, s.steps) == (metric, model, steps)]
    return found


def _comparison(found: list[Comparison], metric: str, model: str, steps: int) -> Comparison:
    (one,) = [c for c in found if (c.metric, c.model, c.steps) == (metric, model, steps)]
    return one


def _values(store: RunStore, metric: str, model: str, steps: int) -> dict[tuple[str, int], float]:
    scores = store.scores(metric)
    rows = [row for row in store.images() if (row.model, row.steps) == (model, steps)]
    return {(row.prompt_id, row.replicate): float(scores[row.id or 0].value or 0) for row in rows}


def _image_id(store: RunStore, key: tuple[str, int, str, int]) -> int:
    return next(row.id or 0 for row in store.images() if row.key == key)


def _move_features(store: RunStore, model: str, steps: int, by: float) -> None:
    kept = read_features(store.folder, FID.features, model, steps)
    write_features(store.folder, FID.features, model, steps, "", {sha: x + by for sha, x in kept.items()})


def _features(store: RunStore, model: str, steps: int) -> NDArray[np.float32]:
    kept = read_features(store.folder, FID.features, model, steps)
    return np.stack([kept[row.sha256] for row in store.images() if (row.model, row.steps) == (model, steps)])


def _reference(store: RunStore) -> NDArray[np.float32]:
    reference = read_reference(store.folder, FID.features, REFERENCE)
    assert reference is not None
    assert isinstance(reference.values, np.ndarray)
    return reference.values


def _forget_features(store: RunStore, model: str, steps: int) -> None:
    (features_folder(store.folder, FID.features) / f"{model}@{steps}.npz").unlink()


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
    exact = stats.permutation_test((by_prompt,), np.mean, permutation_type="samples", n_resamples=np.inf, axis=0)
    assert got.difference.p_value == pytest.approx(exact.pvalue)
    assert got.difference.low < got.difference.value < got.difference.high
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
    _move_features(store, "tcd", 1, 50)
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
    estimate = _summary(store, FID.id, "tcd", 4).estimate
    assert estimate is not None
    assert estimate.value == pytest.approx(feature_distance(_features(store, "tcd", 4), _reference(store)))
    assert estimate.low < estimate.value < estimate.high


@pytest.mark.parametrize(("num_prompts", "replicates"), [(2, 1), (1, 4)])
def test_too_few_images_for_an_interval_show_nothing(tmp_path: Path, num_prompts: int, replicates: int) -> None:
    store = make_run(tmp_path / "run", ("hyper-sd", "tcd"), (1,), num_prompts=num_prompts, replicates=replicates)
    estimate = _summary(store, FID.id, "tcd", 1).estimate
    assert estimate is not None
    assert estimate.value > 0
    assert np.isnan(estimate.low)
    got = _comparison(comparisons(store), FID.id, "tcd", 1)
    assert (got.difference.p_value, got.verdict) == (1, "no difference shown")


def test_set_level_without_features_keeps_the_recorded_value(store: RunStore) -> None:
    _forget_features(store, "tcd", 4)
    estimate = _summary(store, FID.id, "tcd", 4).estimate
    assert estimate is not None
    assert estimate.value == 10 + 2 + 8 / 4  # what the run recorded
    assert np.isnan(estimate.low)
    assert not [c for c in comparisons(store) if (c.metric, c.model, c.steps) == (FID.id, "tcd", 4)]


def test_features_of_other_weights_are_none(store: RunStore) -> None:
    store.manifest["extractors"] = {FID.features: "of other weights"}
    estimate = _summary(store, FID.id, "tcd", 4).estimate
    assert estimate is not None
    assert np.isnan(estimate.low)


def test_set_scores_of_two_references_are_not_compared(store: RunStore) -> None:
    row = next(row for row in store.set_scores() if (row.model, row.steps) == ("tcd", 1))
    store.record_set_scores([replace(row, reference="another reference")])
    of_fid = {(c.model, c.steps) for c in comparisons(store) if c.metric == FID.id}
    assert of_fid == {("lightning", 1), ("lightning", 4), ("tcd", 4)}
    assert np.isnan(_summary(store, FID.id, "tcd", 1).estimate.low)  # type: ignore[union-attr]


def test_a_set_metric_without_statistic_has_a_value_and_no_interval(store: RunStore) -> None:
    entries = [entry | ({"statistic": ""} if entry["id"] == FID.id else {}) for entry in store.manifest["metrics"]]
    store.manifest["metrics"] = entries
    estimate = _summary(store, FID.id, "tcd", 4).estimate
    assert estimate is not None
    assert (estimate.value, np.isnan(estimate.low)) == (10 + 2 + 8 / 4, True)
    assert FID.id not in {c.metric for c in comparisons(store)}


@pytest.mark.parametrize("statistic", ["kid", "cmmd", "precision", "recall", "density", "coverage"])
def test_every_statistic_has_levels_and_paired_differences(store: RunStore, statistic: str) -> None:
    entries = [
        entry | ({"statistic": statistic} if entry["id"] == FID.id else {}) for entry in store.manifest["metrics"]
    ]
    store.manifest["metrics"] = entries
    estimate = _summary(store, FID.id, "tcd", 4).estimate
    assert estimate is not None
    assert estimate.value == pytest.approx(evaluate(statistic, _features(store, "tcd", 4), _reference(store)))
    assert estimate.low < estimate.high
    got = _comparison(comparisons(store), FID.id, "tcd", 4).difference
    theirs = evaluate(statistic, _features(store, "hyper-sd", 4), _reference(store))
    assert got.value == pytest.approx(estimate.value - theirs)
    assert (got.n, got.num_clusters) == (24, 12)


def test_set_differences_are_on_the_images_that_both_have(store: RunStore) -> None:
    rows = [row for row in store.images() if (row.model, row.steps) == ("tcd", 1)]
    store.record_images([replace(row, id=None, defect="black", sha256="0" * 64) for row in rows[:2]])
    store.record_set_scores([SetScoreRow(FID.id, "tcd", 1, 9.0, 22, REFERENCE)])
    got = _comparison(comparisons(store), FID.id, "tcd", 1).difference
    assert (got.n, got.num_clusters) == (22, 11)
    mine = _features(store, "hyper-sd", 1)[2:]
    kept = read_features(store.folder, FID.features, "tcd", 1)
    theirs = np.stack([kept[row.sha256] for row in rows[2:]])
    want = feature_distance(theirs, _reference(store)) - feature_distance(mine, _reference(store))
    assert got.value == pytest.approx(want)


def test_spoiled_images_have_no_part_in_a_set(store: RunStore) -> None:
    """Also where they have features: black pictures would draw a whole set towards them."""
    rows = [row for row in store.images() if (row.model, row.steps) == ("tcd", 1)]
    store.record_images([replace(row, id=None, defect="black") for row in rows[:2]])
    store.record_set_scores([SetScoreRow(FID.id, "tcd", 1, 9.0, 22, REFERENCE)])
    assert len(View([store]).features(FID, ("tcd", 1))) == len(rows) - 2


def test_replicates_are_computed_once_for_each_configuration(
    store: RunStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    evaluated: list[int] = []
    monkeypatch.setattr(replicate_cache, "_KNOWN", {})
    monkeypatch.setenv("HYPERSD_BENCH_CACHE", str(tmp_path / "cache"))

    def counting(statistic: Callable[[NDArray[np.intp]], float], clusters: Sequence[str]) -> Replicates:
        evaluated.append(len(clusters))
        return jackknife(statistic, clusters)

    monkeypatch.setattr(replicate_cache, "jackknife", counting)
    for baseline in ("hyper-sd", "lightning", "tcd"):
        comparisons(store, baseline)
    summaries(store)
    assert evaluated == [24] * 6  # 3 models at 2 step counts, whatever is compared
    _move_features(store, "tcd", 1, 1)
    before = comparisons(store)
    assert len(evaluated) == 7
    replicate_cache._KNOWN.clear()  # another process finds them on the disk
    assert comparisons(store) == before
    assert len(evaluated) == 7
    for file in (tmp_path / "cache" / "replicates").glob("*/*.json"):
        file.write_text("broken")
    replicate_cache._KNOWN.clear()
    assert comparisons(store) == before
    assert len(evaluated) > 7


def test_the_smallest_difference_that_could_be_shown(store: RunStore) -> None:
    found = comparisons(store)
    got = _comparison(found, CLIP.id, "tcd", 4)
    a, b = _values(store, CLIP.id, "tcd", 4), _values(store, CLIP.id, "hyper-sd", 4)
    by_prompt = [np.mean([a[p, r] - b[p, r] for r in (0, 1)]) for p in dict.fromkeys(p for p, _ in a)]
    want = (stats.norm.isf(0.05 / 2 / len(found)) + stats.norm.isf(0.2)) * stats.sem(by_prompt)
    assert got.detectable == pytest.approx(want)
    text = CliRunner().invoke(compare, [str(store.folder)]).output
    assert text.count("24 images of 12 prompts: a true difference of") == 3, "a line for each table"


def test_the_same_images_tell_nothing_of_what_could_be_shown(store: RunStore) -> None:
    of = {row.key: row for row in store.images()}
    scores = store.scores(CLIP.id)
    theirs = [scores[of["hyper-sd", *key[1:]].id or 0].value for key in of if key[0] == "tcd"]
    store.record_scores([
        ScoreRow(CLIP.id, of[key].id or 0, value)
        for key, value in zip([key for key in of if key[0] == "tcd"], theirs, strict=True)
    ])  # fmt: skip
    got = _comparison(comparisons(store), CLIP.id, "tcd", 1)
    assert (got.difference.value, got.difference.low, got.difference.high, got.difference.p_value) == (0, 0, 0, 1)
    assert np.isnan(got.detectable)


# several runs


@pytest.fixture
def two(made: Path, tmp_path: Path) -> list[RunStore]:
    """Two runs of the same prompts and noise; ``tcd`` is in both."""
    return [_copy(made / name, tmp_path) for name in ("ours", "theirs")]


def test_models_of_several_runs_stand_side_by_side(two: list[RunStore]) -> None:
    view = View(two)
    assert [cell for cell in view.cells if cell[1] == 1] == [
        ("hyper-sd", 1), ("ours:tcd", 1), ("lightning", 1), ("theirs:tcd", 1)
    ]  # fmt: skip
    found = comparisons(view)
    assert {c.model for c in found} == {"ours:tcd", "lightning", "theirs:tcd"}
    assert len(found) == 3 * 3 * 2
    across = _comparison(found, CLIP.id, "lightning", 4)
    a, b = _values(two[1], CLIP.id, "lightning", 4), _values(two[0], CLIP.id, "hyper-sd", 4)
    assert across.difference.value == pytest.approx(np.mean(list(a.values())) - np.mean(list(b.values())))
    assert (across.difference.n, across.difference.num_clusters) == (24, 12)
    of_sets = _comparison(found, FID.id, "theirs:tcd", 1).difference
    reference = _reference(two[0])
    want = feature_distance(_features(two[1], "tcd", 1), reference) - feature_distance(
        _features(two[0], "hyper-sd", 1), reference
    )
    assert of_sets.value == pytest.approx(want)


def test_one_run_is_seen_as_before(store: RunStore) -> None:
    assert comparisons(View([store])) == comparisons(store)
    assert summaries(View([store])) == summaries(store)


def _entries(store: RunStore, change: dict[str, object]) -> None:
    store.manifest["metrics"] = [e | (change if e["id"] == CLIP.id else {}) for e in store.manifest["metrics"]]
    write_json(store.folder / "run.json", store.manifest)


def _mix_versions(store: RunStore) -> None:
    _entries(store, {"version": "2"})


def _mix_scored_versions(store: RunStore) -> None:
    write_json(store.folder / "run.json", store.manifest | {"scored_versions": {CLIP.id: "0"}})


def _mix_references(store: RunStore) -> None:
    store.record_set_scores([replace(row, reference="coco-5000-1a2b3c4d") for row in store.set_scores()])


def _mix_seeds(store: RunStore) -> None:
    write_json(store.folder / "run.json", store.manifest | {"spec": store.manifest["spec"] | {"seed": 1}})


def _mix_noise(store: RunStore) -> None:
    with closing(sqlite3.connect(store.folder / "ledger.sqlite")) as db, db:
        db.execute("UPDATE image SET seed = seed + 1")


def _mix_texts(store: RunStore) -> None:
    with closing(sqlite3.connect(store.folder / "ledger.sqlite")) as db, db:
        db.execute("UPDATE image SET prompt = 'a dog' WHERE prompt_id = 'p0003'")


def _mix_weights(store: RunStore) -> None:
    write_json(store.folder / "run.json", store.manifest | {"extractors": {FID.features: "other"}})


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (_mix_versions, r"clip-score/pocket: .*ours and .*theirs are scored with another version \(1 and 2\)"),
        (_mix_scored_versions, r"another version \(0 and 1\)"),
        (_mix_references, r"fid/lite0: .* another reference \(coco-5000-1a2b3c4d and made-up reference\)"),
        (_mix_weights, "fid/lite0: .* another weights"),
        (_mix_seeds, "ours is of seed 0, .*theirs of 1: other noise doesn't pair"),
        (_mix_noise, "has other noise in .*theirs"),
        (_mix_texts, "p0003 is 'a dog' in .*theirs and 'a fox .*: images of other prompts don't pair"),
    ],
)
def test_mixed_protocols_are_refused(two: list[RunStore], mix: Callable[[RunStore], None], message: str) -> None:
    write_json(two[0].folder / "run.json", two[0].manifest | {"extractors": {FID.features: ""}})
    if mix is _mix_weights:
        write_json(two[0].folder / "run.json", two[0].manifest | {"extractors": {FID.features: "ours"}})
    mix(two[1])
    result = CliRunner().invoke(compare, [str(store.folder) for store in two])
    assert isinstance(result.exception, InputError)
    assert re.search(message, str(result.exception)), result.exception
    assert "\n" not in str(result.exception)


def test_a_mixed_metric_can_be_left_out(two: list[RunStore]) -> None:
    _mix_references(two[1])
    result = CliRunner().invoke(compare, [*(str(s.folder) for s in two), "--metrics", CLIP.id, "--json"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.output)
    assert {c["metric"] for c in values["comparisons"]} == {CLIP.id}
    assert values["runs"] == [str(s.folder) for s in two]


def test_a_run_named_twice_is_refused(store: RunStore) -> None:
    with pytest.raises(InputError, match="named twice"):
        View([store, store])


def test_metrics_and_steps_are_chosen(store: RunStore) -> None:
    result = CliRunner().invoke(compare, [str(store.folder), "--metrics", AESTHETIC.id, "--steps", "4", "--json"])
    found = json.loads(result.output)["comparisons"]
    assert [(c["metric"], c["model"], c["steps"]) for c in found] == [
        (AESTHETIC.id, "lightning", 4), (AESTHETIC.id, "tcd", 4)
    ]  # fmt: skip
    assert max(c["p_holm"] for c in found) <= 2 * max(c["difference"]["p_value"] for c in found)  # a family of two


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metrics", "clip-score/poket"], "unknown metric 'clip-score/poket' .* did you mean 'clip-score/pocket'"),
        (["--steps", "3"], "no images at 3 steps"),
        (["--steps", "few"], "give step counts, as 1,4"),
        (["--against", "lightening"], "did you mean 'lightning'"),
        (["--cost", "latency"], "go with --within"),
    ],
)
def test_what_is_not_there_is_refused(store: RunStore, options: list[str], message: str) -> None:
    result = CliRunner().invoke(compare, [str(store.folder), *options])
    assert isinstance(result.exception, InputError)
    assert re.search(message, str(result.exception)), result.exception


def test_a_run_without_metrics_says_how_to_get_some(store: RunStore) -> None:
    write_json(store.folder / "run.json", store.manifest | {"metrics": []})
    found = CliRunner().invoke(compare, [str(store.folder)])
    assert isinstance(found.exception, InputError)
    assert f"hypersd-bench score {store.folder} --metrics" in str(found.exception)


def test_a_run_without_a_baseline_asks_for_one(store: RunStore) -> None:
    write_json(store.folder / "run.json", store.manifest | {"baseline": ""})
    result = CliRunner().invoke(compare, [str(store.folder)])
    assert "choose one with --against" in str(result.exception)


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
