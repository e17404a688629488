"""Scores of images that are already there: one reference, one version, and each image read once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypersd_bench import registry
from hypersd_bench.cli.main import main
from hypersd_bench.cli.run import read_spec
from hypersd_bench.contracts import MetricContext
from hypersd_bench.errors import InputError
from hypersd_bench.machine import num_cores
from hypersd_bench.runner import forecast, score
from hypersd_bench.runner.benchmark import run_benchmark
from hypersd_bench.runner.needs import unscorable
from hypersd_bench.runner.plan import draw_scenes, make_plan, metric_context
from hypersd_bench.runner.score import score_run
from hypersd_bench.runner.spec import load_spec
from hypersd_bench.store import ImageRow, RunStore
from metrics import backbones
from tests.tiny_base import make_tiny_base
from tests.toy_metric import Brightness

FID = "fid/lite0"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture(autouse=True)
def _metrics(toy_metrics: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toys, and FID of mean colours."""
    monkeypatch.setattr(backbones, "load_lite0", lambda device: lambda images: images.float().mean((2, 3)))


def make_run(
    folder: Path, levels: Mapping[str, int], metrics: tuple[str, ...] = (FID,), pipeline: str = "pocket", count: int = 3
) -> RunStore:
    """A run of ``count`` grey images a model, of levels about the one given; the first model is the teacher."""
    manifest: dict[str, Any] = {
        "spec": {"base": pipeline, "reference": None},
        "models": [
            {"name": name, "family": "teacher" if name == "teacher" else "lcm", "steps": [4], "pipeline": pipeline}
            for name in levels
        ],
        "metrics": [asdict(registry.resolve("metric", name).info) for name in metrics],
        "baseline": next(iter(levels)),
    }
    store = RunStore.create(folder, manifest)
    for name, level in levels.items():
        add_images(store, name, level, range(count))
    return store


def add_images(store: RunStore, model: str, level: int, prompts: range, side: int = 8) -> None:
    for i in prompts:
        file = f"images/{model}/4/p{i}_0.png"
        (store.folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side), (level + i,) * 3).save(store.folder / file)
        store.record_images([ImageRow(model, 4, f"p{i}", f"prompt {i}", 0, i, file, f"{model}{i}", "")])


def make_reference(folder: Path, level: int) -> Path:
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (level + i,) * 3).save(folder / f"{i}.png")
    return folder


def fids(store: RunStore) -> dict[str, float | None]:
    return {row.model: row.value for row in store.set_scores() if row.metric == FID}


def references(store: RunStore) -> set[str]:
    return {row.reference for row in store.set_scores()}


# Grey levels differ by their square in each of three channels; both sets have the same covariance.
def distance(a: int, b: int) -> Any:
    return pytest.approx(3 * (a - b) ** 2, rel=1e-3, abs=1e-2)


def test_only_a_base_of_the_miniatures_words_draws_scenes(tmp_path: Path) -> None:
    tiny = make_tiny_base(tmp_path / "base")
    assert draw_scenes(["pocket"])
    assert draw_scenes([str(tiny), "pocket"])
    assert not draw_scenes([SDXL])
    assert not draw_scenes([f"{SDXL}@0123abc", "pocket"])
    config = tiny / "text_encoder" / "config.json"
    config.write_text('{"vocab_size": 49408}')  # a copy of Stable Diffusion on this disk
    assert not draw_scenes([str(tiny)])


def test_photographs_are_not_compared_with_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    store = make_run(folder, {"teacher": 100}, (FID, "toy/brightness", "toy/colour"), SDXL)
    assert main(["score", str(folder)]) == 0
    assert f"not scored: {FID}: needs a reference: give --reference FOLDER of real images" in capsys.readouterr().err
    row = next(row for row in store.set_scores() if row.metric == FID)
    assert row.value is None
    assert "needs a reference" in row.reason
    assert not (folder / "features" / "fid_lite0").exists()
    assert len(store.scores("toy/brightness")) == 3  # the rest is worth having, another metric's own reference too
    assert [row.value is not None for row in store.set_scores() if row.metric == "toy/colour"] == [True]
    reference = make_reference(tmp_path / "photographs", 90)
    assert main(["score", str(folder), "--reference", str(reference)]) == 0
    assert fids(store) == {"teacher": distance(100, 90)}


def test_a_distance_to_scenes_that_an_sdxl_run_holds_is_dropped(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", {"teacher": 100}, pipeline=SDXL)
    score_run(store, [FID], MetricContext(scenes=True))  # as it once was
    assert fids(store)["teacher"] is not None
    score_run(store, [FID], MetricContext(scenes=False))
    assert fids(store) == {"teacher": None}
    assert not (store.folder / "features" / "fid_lite0").exists()


def test_plan_and_fetch_say_that_a_reference_is_wanted(tmp_path: Path) -> None:
    raw = {"base": "sdxl", "models": ["teacher@25"], "prompts": "pocket/held-out", "metrics": [FID, "toy/colour"]}
    plan = make_plan(load_spec(None, raw))
    assert set(unscorable(plan, metric_context(plan, "cpu"))) == {FID}
    notes = forecast.forecast(plan, tmp_path / "run", "cpu", probing=False).notes
    assert any(note.startswith(f"{FID} can't be computed: needs a reference") for note in notes)
    given = make_plan(load_spec(None, raw | {"reference": make_reference(tmp_path / "photographs", 90)}))
    assert unscorable(given, metric_context(given, "cpu")) == {}


def test_all_sets_are_compared_with_one_reference(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", {"teacher": 100, "lcm": 110})
    a, b = make_reference(tmp_path / "a", 90), make_reference(tmp_path / "b", 200)
    score_run(store, [FID], MetricContext(reference=a))
    assert fids(store) == {"teacher": distance(100, 90), "lcm": distance(110, 90)}
    add_images(store, "lcm", 110, range(3, 5))
    score_run(store, [FID], MetricContext(reference=b))
    assert references(store) == {str(b)}
    assert fids(store)["teacher"] == distance(100, 200)
    np.testing.assert_allclose(np.load(store.folder / "features" / "fid_lite0" / "reference.npy")[0], 200)
    before = store.set_scores()
    score_run(store, [FID], MetricContext(reference=b))
    assert store.set_scores() == before


def test_cut_off_after_a_new_reference_no_value_is_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    store = make_run(tmp_path / "run", {"teacher": 100})
    a, b = make_reference(tmp_path / "a", 90), make_reference(tmp_path / "b", 200)
    score_run(store, [FID], MetricContext(reference=a))
    monkeypatch.setattr(score, "_one_pass", cut_off)
    with pytest.raises(KeyboardInterrupt):
        score_run(store, [FID], MetricContext(reference=b))
    assert fids(store) == {}


def test_score_goes_on_with_the_runs_own_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_run(tmp_path / "run", {"teacher": 100, "lcm": 110})
    make_reference(tmp_path / "a", 90)
    monkeypatch.chdir(tmp_path)
    assert main(["score", "run", "--reference", "a"]) == 0
    add_images(store, "lcm", 110, range(3, 5))
    monkeypatch.chdir(tmp_path / "a")
    assert main(["score", "../run"]) == 0
    assert references(store) == {str(tmp_path / "a")}
    assert {row.num_images for row in store.set_scores()} == {3, 5}


def test_a_reference_that_can_not_be_read_stops_its_metric_alone(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", {"teacher": 100})
    a, broken = make_reference(tmp_path / "a", 90), make_reference(tmp_path / "broken", 90)
    score_run(store, [FID], MetricContext(reference=a))
    (broken / "1.png").write_bytes(b"no picture")
    add_images(store, "lcm", 110, range(3))
    failed = score_run(store, [FID, "toy/brightness"], MetricContext(reference=broken))
    assert list(failed) == [FID]
    assert "can't read reference image" in failed[FID]
    assert len(store.scores("toy/brightness")) == 6
    assert fids(store) == {"teacher": distance(100, 90), "lcm": None}  # of a, whose features are still there


@pytest.mark.parametrize(("name", "message"), [("photograps", "no such folder"), ("empty", "at least two images")])
def test_a_mistyped_reference_is_told_before_anything_is_made(
    tmp_path: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        make_plan(load_spec(None, {"models": ["teacher"], "reference": tmp_path / name}))
    make_run(tmp_path / "run", {"teacher": 100})
    assert main(["score", str(tmp_path / "run"), "--reference", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


def test_a_reference_is_taken_from_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spec's from the spec's folder, a flag's from here; what is recorded holds from anywhere."""
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "a.yaml").write_text("models: [teacher]\nreference: photographs\n")
    ours, theirs = (make_reference(folder / "photographs", 90) for folder in (tmp_path, tmp_path / "specs"))
    monkeypatch.chdir(tmp_path)
    names = ("out", "no_timing", "contract", "models", "steps", "metrics", "prompts", "prompts_file", "pipeline")
    flags: dict[str, Any] = {**dict.fromkeys(names), "model": (), "device": "cpu"}
    spec = Path("specs/a.yaml")
    assert read_spec(spec, {**flags, "reference": None})[0].spec.reference == theirs
    assert read_spec(spec, {**flags, "reference": Path("photographs")})[0].spec.reference == ours
    made = read_spec(None, {**flags, "models": "teacher", "reference": Path("photographs")})[0]
    assert made.spec.reference == ours


def test_the_teachers_images_are_read_once_for_all_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "BATCH_SIZE", 5)
    store = make_run(tmp_path / "run", {"teacher": 100, "lcm": 90, "tcd": 70}, count=7)
    add_images(store, "turbo", 80, range(7), side=4)
    reads: Counter[str] = Counter()
    read = score._read_image

    def counted(folder: Path, row: ImageRow) -> score.Picture:
        reads[row.file] += 1
        return read(folder, row)

    monkeypatch.setattr(score, "_read_image", counted)
    score_run(store, ["toy/darker"], MetricContext())
    assert len(reads) == 4 * 7
    assert set(reads.values()) == {1}
    scores = store.scores("toy/darker")
    expected = {"lcm": (10, ""), "tcd": (30, ""), "turbo": (None, "4x4 pixels, the teacher's has 8x8"),
                "teacher": (None, "it is the teacher's own")}  # fmt: skip
    for row in store.images():
        assert row.id
        assert (scores[row.id].value, scores[row.id].reason) == expected[row.model]


@pytest.mark.parametrize("metric", ["toy/brightness", "toy/darker"])
def test_images_are_read_by_as_many_threads_as_there_are_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    store = make_run(tmp_path / "run", {"teacher": 100, "lcm": 90}, count=6)
    together = threading.Barrier(6, timeout=20)
    read = score._read_image

    def waiting(folder: Path, row: ImageRow) -> score.Picture:
        together.wait()
        return read(folder, row)

    monkeypatch.setattr(score, "num_cores", lambda: 6)
    monkeypatch.setattr(score, "_read_image", waiting)
    score_run(store, [metric], MetricContext())
    assert len(store.scores(metric)) == 12


def test_reading_of_pairs_is_forecast(tmp_path: Path) -> None:
    plan = make_plan(load_spec(None, {"models": ["teacher@4,8,25"], "metrics": ["toy/darker"], "num_prompts": 10}))
    cost = SimpleNamespace(once=0.0, image=0.001, per_set=0.0)
    probed: Any = SimpleNamespace(scoring={"toy/darker": cost}, read=2.0)
    seconds = forecast._scoring_seconds(plan, None, {str(c): 10 for c in plan.configurations}, probed)
    assert seconds == pytest.approx(30 * 2.0 / num_cores())  # 20 pairs, and 10 of the teacher's


def test_a_raised_version_scores_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the run has begun again meanwhile, and its manifest lists the metric's new version already."""
    base = make_tiny_base(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("a fox on a blue background")
    raw = {"base": str(base), "models": ["teacher@1"], "prompts": "prompts.txt", "metrics": ["toy/brightness"]}
    plan = make_plan(load_spec(None, raw).model_copy(update={"timing": None}), tmp_path)
    store, _ = run_benchmark(plan, tmp_path / "run", "cpu")
    (first,) = store.scores("toy/brightness").values()
    store.record_scores([replace(first, value=-1.0)])  # what another version made of it
    store, _ = run_benchmark(plan, tmp_path / "run", "cpu")
    assert [row.value for row in store.scores("toy/brightness").values()] == [-1.0]
    monkeypatch.setattr(Brightness, "info", replace(Brightness.info, version="2"))
    plan = make_plan(plan.spec, tmp_path)
    store, _ = run_benchmark(plan, tmp_path / "run", "cpu")
    assert list(store.scores("toy/brightness").values()) == [first]
    manifest = RunStore.open(tmp_path / "run").manifest
    assert manifest["metrics"][0]["version"] == manifest["scored_versions"]["toy/brightness"] == "2"


def test_a_raised_version_of_a_set_metric_drops_its_features(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", {"teacher": 100})
    reference = make_reference(tmp_path / "a", 90)
    score_run(store, [FID], MetricContext(reference=reference))
    store.manifest["scored_versions"][FID] = "0"
    failed = score_run(store, [FID], MetricContext(reference=tmp_path / "nowhere"))
    assert "no such folder" in failed[FID]
    assert fids(store) == {"teacher": None}
    assert not (store.folder / "features" / "fid_lite0").exists()
    assert RunStore.open(store.folder).manifest["scored_versions"][FID] != "0"
