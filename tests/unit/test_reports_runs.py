"""Several runs on one page, training folders beside them, and the bad input that a report must not swallow."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from safetensors.numpy import save_file

from hypersd_bench.cli.main import main
from hypersd_bench.runner.export import tables as exported
from hypersd_bench.sampling import CARD_KEY, METADATA_KEY, ddim_trailing
from hypersd_bench.store import ImageRow, RunStore, ScoreRow, write_json
from reports import page
from reports.read import open_report
from tests.synthetic_run import AESTHETIC, CLIP, make_run


def changed(run: RunStore, **entries: object) -> RunStore:
    """The same run with another manifest."""
    write_json(run.folder / "run.json", {**run.manifest, **entries})
    return RunStore.open(run.folder)


def two_runs(folder: Path) -> list[Path]:
    """Runs of other models under one protocol, and one model in both."""
    first = make_run(folder / "first", models=("a", "b"), steps=(1, 4), num_prompts=4)
    second = make_run(folder / "second", models=("b", "c"), steps=(4,), num_prompts=4)
    changed(second, spec_hash="2" * 64)
    return [first.folder, second.folder]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that a wrong ``report`` ends with."""
    assert main(["report", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_runs_stand_side_by_side_where_they_pair(tmp_path: Path) -> None:
    runs, data = open_report(two_runs(tmp_path))
    assert [run.name for run in data.runs] == ["first", "second"]
    assert [model.name for model in data.models] == ["a", "first:b", "second:b", "c"]
    assert len({model.colour for model in data.models}) == 4
    assert data.cell(CLIP.id, "second:b", 4) != data.cell(CLIP.id, "first:b", 4), "each keeps its own scores"
    assert {d.model for d in data.differences if d.steps == 4} == {"first:b", "second:b", "c"}
    out = page.write_report(data, runs, tmp_path / "out")
    html = out.read_text()
    assert all(run.spec_hash in html for run in data.runs)
    assert (out.parent / "spec-1-first.json").is_file()
    for source in re.findall(r'<img[^>]* src="([^"]+)"', html):
        assert (out.parent / source).is_file()
    files = {picture.file for row in data.grid for picture in row.pictures}
    assert len(list(out.parent.rglob("*.png"))) > len(files), "files of one name in two runs are both there"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"spec": {"base": "pocket", "steps": [4], "replicates": 2, "seed": 1}}, "other noise doesn't pair"),
        ({"scored_versions": {CLIP.id: "2"}}, "another version"),
    ],
)
def test_runs_of_another_protocol_are_never_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], why: str
) -> None:
    runs = two_runs(tmp_path)
    changed(RunStore.open(runs[1]), **change)
    assert why in refusal(capsys, *runs, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_metric_in_two_versions_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = two_runs(tmp_path)
    changed(RunStore.open(runs[1]), scored_versions={CLIP.id: "2"})
    assert "--metrics" in refusal(capsys, *runs, "--out", tmp_path / "out")
    arguments = ["report", *map(str, runs), "--out", str(tmp_path / "out"), "--metrics", AESTHETIC.id, "--json"]
    assert main(arguments) == 0
    assert [metric["id"] for metric in json.loads(capsys.readouterr().out)["metrics"]] == [AESTHETIC.id]


def training(folder: Path) -> Path:
    """A folder as ``distill`` leaves it: a log and weights that say how they were made."""
    folder.mkdir()
    rows = [{"stage": "8", "images_seen": 64 * (i + 1), "loss": 1 / (i + 1)} for i in range(5)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    card = {"method": "lcm", "stage": "8", "rank": 4, "seed": 3, "images_seen": 320, "seconds": 9.0}
    told = {METADATA_KEY: ddim_trailing((1, 4)).to_json(), CARD_KEY: json.dumps(card)}
    save_file({"x": pd.Series([1.0]).to_numpy()}, folder / "lcm.safetensors", metadata=told)
    return folder


def test_training_folders_alone_and_beside_a_run(tmp_path: Path) -> None:
    trained = training(tmp_path / "my-lcm")
    _, alone = open_report([trained])
    html = page.write_report(alone, [], tmp_path / "alone").read_text()
    assert '<section id="training">' in html
    assert "1 training, nothing generated or scored yet" in html
    assert '<section id="verdict">' not in html
    (made,) = alone.made
    assert (made.file, made.steps, made.card["images_seen"]) == ("lcm.safetensors", (1, 4), 320)
    run = make_run(tmp_path / "run", models=("a", "b"), steps=(1,), num_prompts=2)
    runs, both = open_report([trained, run.folder])
    assert runs == [run.folder]
    assert [curve.model for curve in both.curves] == ["my-lcm"]
    assert "my-lcm" in (page.write_report(both, runs, tmp_path / "both").parent / "tables" / "training.csv").read_text()


def test_training_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    folders = [training(tmp_path / name / "lcm") for name in ("one", "two")]
    _, data = open_report(folders)
    assert [curve.model for curve in data.curves] == list(map(str, folders))
    figs = page.write_report(data, [], tmp_path / "out").parent / "figs"
    assert len(list(figs.glob("training-*.svg"))) == 2


@pytest.mark.parametrize("line", ['{"stage": "8", "images_seen": "many", "loss": 1}', "[1, 2]", "{"])
def test_a_broken_log_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    folder = training(tmp_path / "lcm")
    log = folder / "train.jsonl"
    log.write_text(f"{line}\n{log.read_text()}")
    assert "the log is broken" in refusal(capsys, folder)
    log.write_text('{"stage": "8", "images_seen": 64, "loss": NaN}\n{"stage": "8", "images_seen": 128, "loss": 1.0}\n')
    _, data = open_report([folder])
    assert data.curves[0].points == ((128, 1.0),), "what is no number is not drawn"


def test_the_page_and_export_say_the_same(tmp_path: Path) -> None:
    """Levels of the report's CSV against means that pandas takes of the exported images."""
    run = make_run(tmp_path / "run", models=("a", "b"), steps=(1, 4), num_prompts=5)
    runs, data = open_report([run.folder])
    written = page.write_report(data, runs, tmp_path / "out").parent / "tables" / "results.csv"
    said = pd.read_csv(written).set_index(["metric", "model", "steps"])["value"]
    images, sets = exported(run)["images"], exported(run)["set_scores"]
    for metric in (CLIP.id, AESTHETIC.id):
        for (model, steps), mean in images.groupby(["model", "steps"])[metric].mean().items():
            assert said[metric, model, steps] == pytest.approx(mean, rel=1e-12)
    assert len(said) == 2 * 4 + len(sets)


def test_a_name_that_two_labels_share_is_told_apart(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", models=("a", "b"), steps=(1,), num_prompts=2)
    for entry in run.manifest["models"]:
        entry["label"] = "Hyper-SD"
    changed(run)
    _, data = open_report([run.folder])
    assert [model.label for model in data.models] == ["Hyper-SD (a)", "Hyper-SD (b)"]


def test_right_to_left_prompts_stand_right_and_are_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", models=("a", "b"), steps=(1,), num_prompts=2)
    first = run.images()[0]
    prompt = "قطة <b>حمراء</b> & כלב"
    run.record_images([ImageRow("a", 1, "rtl", prompt, 0, 1, first.file, first.sha256, "c")])
    runs, data = open_report([run.folder])
    html = page.write_report(data, runs, tmp_path / "out").read_text()
    assert '<h3 dir="auto">قطة &lt;b&gt;حمراء&lt;/b&gt; &amp; כלב</h3>' in html
    assert prompt not in html


def test_one_model_only_is_a_page_without_a_verdict(tmp_path: Path) -> None:
    runs, data = open_report([make_run(tmp_path / "run", models=("a",), steps=(1, 4), num_prompts=3).folder])
    html = page.write_report(data, runs, tmp_path / "out").read_text()
    assert "There is nothing to compare" in html
    assert not data.accords, "two metrics can't agree on one model's order"


def test_a_corrupt_ledger_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", models=("a", "b"), steps=(1,), num_prompts=2)
    whole = (run.folder / "ledger.sqlite").read_bytes()
    (run.folder / "ledger.sqlite").write_bytes(b"not a ledger" * 100)
    assert "ledger.sqlite" in refusal(capsys, run.folder, "--out", tmp_path / "out")
    (run.folder / "ledger.sqlite").write_bytes(whole[: len(whole) // 2])
    for left in run.folder.glob("ledger.sqlite-*"):
        left.unlink()
    assert "ledger.sqlite" in refusal(capsys, run.folder, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_manifest_that_is_no_manifest_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", models=("a", "b"), steps=(1,), num_prompts=2)
    for text in ("[]", "{}", '{"models": 3}', "{"):
        (run.folder / "run.json").write_text(text)
        assert "run.json" in refusal(capsys, run.folder, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--metrics", "clip-scor/pocket"], "did you mean 'clip-score/pocket'?"),
        (["--steps", "x"], "give step counts"),
        (["--steps", "16"], "no images at 16 steps"),
        (["--within", "-1"], "give a difference above 0"),
        (["--format", "csv"], "--only tables"),
        (["--results", "page.md", "--within", "1"], "leave out"),
    ],
)
def test_options_that_can_not_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    run = make_run(tmp_path / "run", models=("a", "b"), steps=(1,), num_prompts=2)
    assert why in refusal(capsys, run.folder, *arguments)
    assert not (run.folder / "report").exists()


def test_within_is_asked_and_answered(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", models=("a", "b"), steps=(1, 4), num_prompts=12)
    _, wide = open_report([run.folder], within=10.0)
    assert wide.cheapest is not None
    assert wide.cheapest.steps == 1, "everything is within ten points of CLIP score"
    _, narrow = open_report([run.folder], within=0.5)
    assert narrow.cheapest is not None
    assert (narrow.cheapest.model, narrow.cheapest.steps) == ("a", 4)


def test_accord_counts_pairs_ordered_alike(tmp_path: Path) -> None:
    """Two models, four prompts: the metrics agree on three, one of which twice by halves (a tie)."""
    run = make_run(tmp_path / "run", models=("a", "b"), steps=(1,), num_prompts=4, replicates=1)
    clip = {"a": (1.0, 1.0, 1.0, 1.0), "b": (0.0, 0.0, 0.0, 0.0)}
    aesthetic = {"a": (1.0, 1.0, 0.0, 0.5), "b": (0.0, 0.0, 1.0, 0.5)}
    for metric, values in ((CLIP.id, clip), (AESTHETIC.id, aesthetic)):
        run.record_scores(
            [ScoreRow(metric, row.key_id, values[row.model][int(row.prompt_id[1:])]) for row in run.images()]
        )
    _, data = open_report([run.folder])
    (accord,) = data.accords
    assert accord.value == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert accord.num_prompts == 4


def test_figures_are_the_same_bytes_as_pdf(tmp_path: Path) -> None:
    runs, data = open_report([make_run(tmp_path / "run", models=("a", "b"), steps=(1, 4), num_prompts=3).folder])
    first, second = (page.write_report(data, runs, tmp_path / name).parent / "figs" for name in ("one", "two"))
    names = sorted(file.name for file in first.glob("*.pdf"))
    assert len(names) == len(list(first.glob("*.svg"))) > 5
    for name in names:
        data_of_one = (first / name).read_bytes()
        assert data_of_one.startswith(b"%PDF")
        assert data_of_one == (second / name).read_bytes()
