"""Scores of images that are already there: one reference, one version, and each image read once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hypersd_bench import reference, registry
from hypersd_bench.cli.main import main
from hypersd_bench.cli.run import read_spec
from hypersd_bench.errors import InputError
from hypersd_bench.features import read_reference
from hypersd_bench.machine import num_cores
from hypersd_bench.provenance import collect, sha256
from hypersd_bench.reference import FolderReference, Picture, open_reference
from hypersd_bench.runner import forecast, image_reader, pair_scores, score
from hypersd_bench.runner.benchmark import run_benchmark
from hypersd_bench.runner.canaries import PROMPTS
from hypersd_bench.runner.needs import unscorable
from hypersd_bench.runner.plan import draw_scenes, make_plan
from hypersd_bench.runner.score import score_run
from hypersd_bench.runner.spec import load_spec
from hypersd_bench.seeding import image_seed
from hypersd_bench.store import ImageRow, RunStore
from tests.tiny_base import make_tiny_base
from tests.toy_metric import MEAN_COLOUR, Brightness, ColourDistance, MeanColour, Redness

FID = "toy/colour"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture(autouse=True)
def _metrics(toy_metrics: None) -> None:
    MEAN_COLOUR.seen = 0


def score_with(store: RunStore, metrics: Sequence[str], folder: Path | None) -> dict[str, str]:
    return score_run(store, metrics, "cpu", open_reference(folder, scenes=False))


def make_run(
    folder: Path, levels: Mapping[str, int], metrics: tuple[str, ...] = (FID,), pipeline: str = "pocket", count: int = 3
) -> RunStore:
    """A run of ``count`` grey images a model, of levels about the one given; the first model is the teacher."""
    manifest: dict[str, Any] = {
        "spec": {"base": pipeline, "reference": None, "seed": 0},
        "spec_hash": "0" * 64,
        "provenance": collect().to_json(),
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
        stripes = np.full((side, side, 3), level + i + 5, np.uint8)  # about their mean: a constant image is a defect
        stripes[::2] -= 10
        Image.fromarray(stripes).save(store.folder / file)
        seed, digest = image_seed(0, f"p{i}", 0), sha256(store.folder / file)
        store.record_images([ImageRow(model, 4, f"p{i}", f"prompt {i}", 0, seed, file, digest, "")])


def make_reference(folder: Path, level: int, count: int = 3) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (8, 8), (level + i,) * 3).save(folder / f"{i}.png")
    return folder


def fids(store: RunStore) -> dict[str, float | None]:
    return {row.model: row.value for row in store.set_scores() if row.metric == FID}


def references(store: RunStore) -> set[str]:
    return {row.reference for row in store.set_scores()}


# Grey levels differ alike in each of three channels.
def distance(a: int, b: int) -> Any:
    return pytest.approx(3**0.5 * abs(a - b), rel=1e-5)


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
    store = make_run(folder, {"teacher": 100}, (FID, "toy/brightness"), SDXL)
    assert main(["score", str(folder)]) == 2
    assert f"not scored: {FID}: needs a reference: give --reference FOLDER of real images" in capsys.readouterr().err
    row = next(row for row in store.set_scores() if row.metric == FID)
    assert row.value is None
    assert "needs a reference" in row.reason
    assert not (folder / "features").exists()
    assert len(store.scores("toy/brightness")) == 3  # the rest is worth having
    reference = make_reference(tmp_path / "photographs", 90)
    assert main(["score", str(folder), "--reference", str(reference)]) == 0
    assert fids(store) == {"teacher": distance(100, 90)}


def test_a_distance_to_scenes_that_an_sdxl_run_holds_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "NUM_RENDERS", 3)
    store = make_run(tmp_path / "run", {"teacher": 100}, pipeline=SDXL)
    score_run(store, [FID], "cpu", open_reference(None, scenes=True))  # as it once was
    assert fids(store)["teacher"] is not None
    assert next(iter(references(store))).startswith("held-out-renders-3-")
    score_run(store, [FID], "cpu", open_reference(None, scenes=False))
    assert fids(store) == {"teacher": None}


def test_plan_and_fetch_say_that_a_reference_is_wanted(tmp_path: Path) -> None:
    raw = {"base": "sdxl", "models": ["teacher@25"], "prompts": "pocket/held-out", "metrics": [FID, "toy/brightness"]}
    plan = make_plan(load_spec(None, raw))
    assert set(unscorable(plan, "cpu")) == {FID}
    notes = forecast.forecast(plan, tmp_path / "run", "cpu", probing=False).notes
    assert any(note.startswith(f"{FID} can't be computed: needs a reference") for note in notes)
    given = make_plan(load_spec(None, raw | {"reference": make_reference(tmp_path / "photographs", 90)}))
    assert unscorable(given, "cpu") == {}


def test_all_sets_are_compared_with_one_reference(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", {"teacher": 100, "lcm": 110})
    a, b = make_reference(tmp_path / "a", 90), make_reference(tmp_path / "b", 200)
    score_with(store, [FID], a)
    assert fids(store) == {"teacher": distance(100, 90), "lcm": distance(110, 90)}
    add_images(store, "lcm", 110, range(3, 5))
    score_with(store, [FID], b)
    assert references(store) == {FolderReference(b).id}
    assert fids(store)["teacher"] == distance(100, 200)
    kept = read_reference(store.folder, MEAN_COLOUR.id, FolderReference(b).id)
    assert kept is not None
    assert isinstance(kept.values, np.ndarray)
    np.testing.assert_allclose(kept.values, [[200] * 3, [201] * 3, [202] * 3])
    before = store.set_scores()
    score_with(store, [FID], b)
    assert store.set_scores() == before


def test_cut_off_after_a_new_reference_no_value_is_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    store = make_run(tmp_path / "run", {"teacher": 100})
    a, b = make_reference(tmp_path / "a", 90), make_reference(tmp_path / "b", 200)
    score_with(store, [FID], a)
    monkeypatch.setattr(score, "_one_pass", cut_off)
    with pytest.raises(KeyboardInterrupt):
        score_with(store, [FID], b)
    assert fids(store) == {}


def test_score_goes_on_with_the_runs_own_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_run(tmp_path / "run", {"teacher": 100, "lcm": 110})
    make_reference(tmp_path / "a", 90)
    monkeypatch.chdir(tmp_path)
    assert main(["score", "run", "--reference", "a"]) == 0
    add_images(store, "lcm", 110, range(3, 5))
    monkeypatch.chdir(tmp_path / "a")
    assert main(["score", "../run"]) == 0
    assert references(store) == {FolderReference(tmp_path / "a").id}
    assert {row.num_images for row in store.set_scores()} == {3, 5}


def test_a_reference_that_can_not_be_read_stops_its_metric_alone(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", {"teacher": 100})
    a, broken = make_reference(tmp_path / "a", 90), make_reference(tmp_path / "broken", 90)
    score_with(store, [FID], a)
    (broken / "1.png").write_bytes(b"no picture")
    add_images(store, "lcm", 110, range(3))
    failed = score_with(store, [FID, "toy/brightness"], broken)
    assert list(failed) == [FID]
    assert "can't read image" in failed[FID]
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
    monkeypatch.setattr(pair_scores, "BATCH_SIZE", 5)
    store = make_run(tmp_path / "run", {"teacher": 100, "lcm": 90, "tcd": 70}, count=7)
    add_images(store, "turbo", 80, range(7), side=4)
    reads: Counter[str] = Counter()
    read = image_reader._read

    def counted(folder: Path, row: ImageRow) -> Picture:
        reads[row.file] += 1
        return read(folder, row)

    monkeypatch.setattr(image_reader, "_read", counted)
    score_with(store, ["toy/darker"], None)
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
    read = image_reader._read

    def waiting(folder: Path, row: ImageRow) -> Picture:
        together.wait()
        return read(folder, row)

    monkeypatch.setattr(image_reader, "num_cores", lambda: 6)
    monkeypatch.setattr(image_reader, "_read", waiting)
    score_with(store, [metric], None)
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
    assert "toy/brightness" in manifest["canaries"]
    assert manifest["metrics"][0]["version"] == manifest["scored_versions"]["toy/brightness"] == "2"


def test_a_raised_version_of_a_set_metric_scores_its_features_anew(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", {"teacher": 100})
    photographs = make_reference(tmp_path / "a", 90)
    score_with(store, [FID], photographs)
    passed = MEAN_COLOUR.seen
    store.manifest["scored_versions"][FID] = "0"
    store.record_set_scores([replace(row, value=-1.0) for row in store.set_scores()])  # what it made of them
    score_with(store, [FID], photographs)
    assert fids(store) == {"teacher": distance(100, 90)}
    assert MEAN_COLOUR.seen == passed + len(PROMPTS)  # the canaries alone: features are of the images, as they were
    assert RunStore.open(store.folder).manifest["scored_versions"][FID] != "0"


def test_metrics_share_an_extractor_and_what_it_made_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_run(tmp_path / "run", {"teacher": 100, "lcm": 90}, metrics=(FID, "toy/redness"), count=5)
    photographs = make_reference(tmp_path / "a", 60)
    canaries, reference_images = len(PROMPTS), 3
    score_with(store, [FID, "toy/redness"], photographs)
    assert MEAN_COLOUR.seen == canaries + reference_images + 2 * 5  # each image once, for both metrics
    add_images(store, "lcm", 90, range(5, 7))
    before = MEAN_COLOUR.seen
    score_with(store, [FID, "toy/redness"], photographs)
    assert MEAN_COLOUR.seen == before + canaries + 2  # the new ones; the reference is in this machine's cache
    assert {row.model: row.num_images for row in store.set_scores()} == {"teacher": 5, "lcm": 7}
    monkeypatch.setattr(image_reader, "_read", no_reading)
    store.forget_scores("toy/redness")
    assert score_with(store, ["toy/redness"], photographs) == {}  # from the features alone
    levels = {row.key_id: (100 if row.model == "teacher" else 90) + int(row.prompt_id[1:]) for row in store.images()}
    assert {key: row.value for key, row in store.scores("toy/redness").items()} == levels


def no_reading(folder: Path, row: ImageRow) -> Picture:
    raise AssertionError(f"{row.file} was read")


def test_other_weights_forget_the_features_and_the_scores_of_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_run(tmp_path / "run", {"teacher": 100}, metrics=(FID, "toy/redness"))
    photographs = make_reference(tmp_path / "a", 90)
    score_with(store, [FID, "toy/redness"], photographs)
    monkeypatch.setattr(MEAN_COLOUR, "fingerprint", "2")
    monkeypatch.setattr(MeanColour, "__call__", lambda self, images: 2 * images.float().mean((2, 3)).numpy())
    score_with(store, [FID, "toy/redness"], photographs)
    assert fids(store) == {"teacher": distance(200, 180)}
    assert [row.value for row in store.scores("toy/redness").values()] == [200, 202, 204]


def test_a_picture_too_small_for_the_protocol_is_told_with_the_size_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for metric in (ColourDistance, Redness):
        monkeypatch.setattr(metric, "info", replace(metric.info, min_size=16))
    folder = tmp_path / "run"
    store = make_run(folder, {"teacher": 100}, metrics=(FID, "toy/redness", "toy/brightness"))
    photographs = make_reference(tmp_path / "a", 90)
    assert main(["score", str(folder), "--reference", str(photographs)]) == 2
    told = capsys.readouterr().err
    assert "not scored: toy/redness: teacher@4: images of 8x8 pixels; toy/redness needs 16 on the short side" in told
    assert f"not scored: {FID}: " in told
    assert {row.value for row in store.scores("toy/brightness").values()} == {100, 101, 102}


def test_fewer_images_than_a_set_metric_needs_are_told_with_the_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ColourDistance, "info", replace(ColourDistance.info, min_images=4))
    store = make_run(tmp_path / "run", {"teacher": 100, "lcm": 90})
    add_images(store, "lcm", 90, range(3, 4))
    photographs = make_reference(tmp_path / "a", 90, count=4)
    few = make_reference(tmp_path / "few", 90)
    assert main(["score", str(tmp_path / "run"), "--reference", str(few)]) == 2
    assert f"has 3 images; {FID} needs 4 or more" in capsys.readouterr().err
    assert main(["score", str(tmp_path / "run"), "--reference", str(photographs)]) == 2
    assert f"not scored: {FID}: teacher@4: 3 sound images; {FID} needs at least 4" in capsys.readouterr().err
    assert fids(store) == {"lcm": pytest.approx(0, abs=1e-5), "teacher": None}


def test_a_score_that_is_no_number_is_told_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score_well = Brightness.score

    def score_one_badly(self: Brightness, images: Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
        values = score_well(self, images, prompts)
        return np.where(values == 101, np.nan, values)

    monkeypatch.setattr(Brightness, "score", score_one_badly)
    store = make_run(tmp_path / "run", {"teacher": 100}, metrics=("toy/brightness",))
    assert main(["score", str(tmp_path / "run")]) == 2
    assert "toy/brightness: no finite value for images/teacher/4/p1_0.png" in capsys.readouterr().err
    assert [row.value for row in store.scores("toy/brightness").values()] == [100, None, 102]


def test_prompts_and_images_that_do_not_pair_up_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_run(tmp_path / "run", {"teacher": 100}, metrics=("toy/brightness",))
    row = store.images()[0]
    store.record_images([replace(row, model="lcm", prompt="another prompt", id=None)])
    assert main(["score", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "do not pair up: p0 is 'another prompt' for lcm and 'prompt 0' for teacher" in told
    assert store.scores("toy/brightness") == {}


def test_statistics_are_a_reference_for_their_own_convention_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_run(tmp_path / "run", {"teacher": 100})
    path = tmp_path / "val2014.npz"
    np.savez(path, mu=np.full(3, 90.0), sigma=np.eye(3))
    assert main(["score", str(tmp_path / "run"), "--reference", str(path)]) == 2
    assert f"does not say which features its statistics are of; if they are, say --reference {path}={MEAN_COLOUR.id}" \
        in capsys.readouterr().err  # fmt: skip
    assert main(["score", str(tmp_path / "run"), "--reference", f"{path}=inception/clean"]) == 2
    assert f"is of inception/clean, not of {MEAN_COLOUR.id}" in capsys.readouterr().err
    assert main(["score", str(tmp_path / "run"), "--reference", f"{path}={MEAN_COLOUR.id}"]) == 0
    assert fids(store) == {"teacher": distance(101, 90)}
    np.savez(path, mu=np.full(3, 90.0))
    assert main(["score", str(tmp_path / "run"), "--reference", str(path)]) == 2
    assert "holds no statistics" in capsys.readouterr().err


def test_images_of_two_sizes_under_one_name_are_scored_apart(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", {"teacher": 100}, metrics=("toy/brightness", "toy/redness"))
    add_images(store, "teacher", 100, range(3, 5), side=4)
    assert score_with(store, ["toy/brightness", "toy/redness"], None) == {}
    for metric in ("toy/brightness", "toy/redness"):
        assert sorted(row.value or 0 for row in store.scores(metric).values()) == [100, 101, 102, 103, 104]
