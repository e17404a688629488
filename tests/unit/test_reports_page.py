"""The report folder: whole or not at all, the same bytes twice, no overwriting of what is not ours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from hypersd_bench.errors import InputError
from hypersd_bench.store import ImageRow, RunStore
from reports.cli import report
from reports.pictures import MAX_SIDE_PX, carry_picture
from reports.training import MAX_POINTS, read_curves
from tests.report_pages import write_report
from tests.synthetic_run import make_run

SECTIONS = ("steps", "latency", "memory", "differences", "training", "study")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return make_run(tmp_path_factory.mktemp("run") / "a_run", models=("a", "b"), steps=(1, 2), num_prompts=3)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_run_same_bytes(run: RunStore, tmp_path: Path) -> None:
    write_report(run.folder, tmp_path / "out")
    first = contents(tmp_path / "out")
    (tmp_path / "out" / "left over").touch()
    write_report(run.folder, tmp_path / "out")
    assert contents(tmp_path / "out") == first, "and the first report is replaced whole"
    assert {"index.html", "data.json", "spec.json", "tables/results.tex", "tables/differences.csv"} <= first.keys()


def test_a_folder_of_somebody_else_is_left_alone(run: RunStore, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "data.json").write_text('{"mine": 1}')
    with pytest.raises(InputError, match="is no report"):
        write_report(run.folder, tmp_path / "thesis")
    assert contents(tmp_path) == {"thesis/data.json": b'{"mine": 1}'}


def test_a_failure_keeps_the_old_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", models=("a", "b"), steps=(1,), num_prompts=2)
    out = tmp_path / "out"
    write_report(run.folder, out)
    before = contents(out)
    (run.folder / run.images()[0].file).write_bytes(b"not a picture")
    with pytest.raises(InputError, match="can't read"):
        write_report(run.folder, out)
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"], "no partial folder stays"


def test_a_run_without_images_is_refused(tmp_path: Path) -> None:
    manifest = make_run(tmp_path / "full", models=("a",), steps=(1,), num_prompts=2).manifest
    RunStore.create(tmp_path / "empty", manifest)
    with pytest.raises(InputError, match="holds no images yet"):
        write_report(tmp_path / "empty", tmp_path / "out")


def test_markup_in_prompts_and_names_is_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", models=("<b>a</b>", "b"), steps=(1,), num_prompts=2)
    hostile = '<script>alert("x")</script> & "quotes"'
    first = run.images()[0]
    Image.new("RGB", (64, 64), (9, 9, 9)).save(run.folder / "images" / "odd #1.png")
    run.record_images([ImageRow(first.model, 1, "odd", hostile, 0, 1, "images/odd #1.png", "0", "c")])
    page = write_report(run.folder, tmp_path / "out").read_text()
    assert hostile not in page
    assert "&lt;script&gt;alert(" in page
    assert "<b>a</b>" not in page, "neither in the text nor inside the drawings"
    assert 'src="images/odd%20%231.png"' in page


def test_a_missing_picture_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", models=("a", "b"), steps=(1,), num_prompts=2)
    (run.folder / run.images()[0].file).unlink()
    page = write_report(run.folder, tmp_path / "out").read_text()
    assert "1 image of the grid can&#39;t be found on disk." in page


def test_large_pictures_are_carried_smaller(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((900, 600, 3), np.uint8)).save(tmp_path / "big.png")
    Image.fromarray(np.zeros((64, 48, 3), np.uint8)).save(tmp_path / "small.png")
    big = carry_picture(tmp_path, "big.png", tmp_path / "report")
    assert (big.src, big.width, big.height) == ("big.webp", round(600 * MAX_SIDE_PX / 900), MAX_SIDE_PX)
    with Image.open(tmp_path / "report" / "big.webp") as image:
        assert image.size == (big.width, big.height)
    small = carry_picture(tmp_path, "small.png", tmp_path / "report")
    assert (tmp_path / "report" / small.src).read_bytes() == (tmp_path / "small.png").read_bytes()


def test_a_picture_outside_the_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    with pytest.raises(InputError, match="outside the run"):
        carry_picture(tmp_path / "run", "../secret.png", tmp_path / "report")


def log(folder: Path, rows: list[dict[str, object]], tail: str = "") -> dict[str, object]:
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return {"name": "a", "training": folder.name}


def test_curves_go_on_where_a_stage_counts_from_zero(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"stage": stage, "images_seen": seen, "loss": 1.0} for stage in ("8", "4") for seen in (64, 128)
    ]
    entry = log(tmp_path / "train", rows, tail='{"stage": "4", "ima')  # cut short by a kill
    assert [(c.stage, [x for x, _ in c.points]) for c in read_curves(tmp_path, entry)] == [
        ("8", [64, 128]),
        ("4", [192, 256]),
    ]


def test_long_curves_keep_their_shape(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"stage": "s", "images_seen": i, "loss": 1000.0 - i} for i in range(1000)]
    (curve,) = read_curves(tmp_path, log(tmp_path / "train", rows))
    assert len(curve.points) <= MAX_POINTS
    assert curve.points[-1][0] == 999
    losses = [loss for _, loss in curve.points]
    assert losses == sorted(losses, reverse=True)


def test_no_log_no_curve_and_a_broken_log_is_named(tmp_path: Path) -> None:
    assert read_curves(tmp_path, {"name": "a", "training": None}) == []
    assert read_curves(tmp_path, {"name": "a", "training": "gone"}) == []
    entry = log(tmp_path / "train", [{"stage": "s", "images_seen": 1, "loss": 1.0}], tail="broken\n{}\n")
    with pytest.raises(InputError, match="line 2"):
        read_curves(tmp_path, entry)


def test_command_prints_the_page_or_json(run: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reports.page.all_figures", lambda data: {key: [] for key in SECTIONS})
    done = CliRunner().invoke(report, [str(run.folder), "--out", str(tmp_path / "out")])
    assert done.output.strip() == str(tmp_path / "out" / "index.html")
    done = CliRunner().invoke(report, [str(run.folder), "--out", str(tmp_path / "out"), "--json"])
    assert json.loads(done.output)["models"][0]["name"] == "a"
