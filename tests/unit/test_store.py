"""The run directory: what is entered stays, what is half-done does not count."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hypersd_bench.errors import InputError
from hypersd_bench.store import CostRow, ImageRow, RunStore, ScoreRow, SetScoreRow, TimingRow, write_bytes, write_json

MANIFEST = {"spec": {}, "spec_hash": "abc", "provenance": {}, "models": [], "metrics": []}
ROW = ImageRow("m", 4, "p0", "a fox", 0, 7, "images/m/4/p0_0.png", "0" * 64, "m-4steps")


def test_a_run_is_gone_on_with_and_never_started_over(tmp_path: Path) -> None:
    RunStore.create(tmp_path / "run", MANIFEST).record_images([ROW])
    again = RunStore.open(tmp_path / "run")
    again.record_images([ROW, replace(ROW, replicate=1)])
    assert [row.replicate for row in again.images()] == [0, 1]
    with pytest.raises(InputError, match="not an empty folder"):
        RunStore.create(tmp_path / "run", MANIFEST)


def test_an_image_made_again_keeps_its_id_and_loses_what_its_old_file_scored(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "run", MANIFEST)
    store.record_images([ROW, replace(ROW, replicate=1), replace(ROW, steps=8)])
    before = {row.key: row.id for row in store.images()}
    store.record_scores([ScoreRow("clip", image_id, 3.5) for image_id in before.values() if image_id])
    store.record_set_scores([SetScoreRow("fid", "m", steps, 9.0, 2, "coco") for steps in (4, 8)])
    store.record_images([ROW, replace(ROW, replicate=1, sha256="1" * 64, defect="black", checkpoint="other")])
    again = next(row for row in store.images() if row.replicate == 1)
    assert {row.key: row.id for row in store.images()} == before
    assert (again.sha256, again.defect, again.checkpoint) == ("1" * 64, "black", "other")
    assert set(store.scores("clip")) == set(before.values()) - {again.id}
    assert [row.steps for row in store.set_scores()] == [8]


@pytest.mark.parametrize("folder", ["file", "file/run", "/proc/run", "/proc/self/a/run"])
def test_where_nothing_can_be_written_no_run_is_started(tmp_path: Path, folder: str) -> None:
    if folder.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="choose another --out"):
        RunStore.refuse(tmp_path / folder)
    with pytest.raises(InputError, match="choose another --out"):
        RunStore.create(tmp_path / folder, MANIFEST)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="other permissions")
@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_folder_of_somebody_elses_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    as_root = os.geteuid() == 0
    if as_root:
        os.seteuid(65534)  # whom permissions keep out
    try:
        with pytest.raises(InputError, match="Permission denied; choose another --out"):
            RunStore.refuse(tmp_path / "run")
        if mode == 0:
            with pytest.raises(InputError, match="Permission denied; choose another --out"):
                RunStore.begun(tmp_path / "run")
    finally:
        if as_root:
            os.seteuid(0)
        tmp_path.chmod(0o700)


def test_a_folder_that_is_fine_is_left_as_it_was(tmp_path: Path) -> None:
    RunStore.refuse(tmp_path / "a" / "run")
    assert os.listdir(tmp_path) == []


def test_a_ledger_that_can_not_be_opened_is_named(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "run", MANIFEST)
    (store.folder / "ledger.sqlite").unlink()
    (store.folder / "ledger.sqlite").mkdir()
    with pytest.raises(InputError, match=r"ledger\.sqlite: unable to open"):
        RunStore.open(store.folder)


def test_a_ledger_without_costs_gets_them(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "run", MANIFEST)
    store.record_images([ROW])
    with sqlite3.connect(store.folder / "ledger.sqlite") as db:  # as version 1 was
        db.executescript("DROP TABLE cost; PRAGMA user_version=1;")
    db.close()
    again = RunStore.open(store.folder)
    cost = CostRow("m", 4, "peak-memory", 1, 5.0, "bytes", "cpu")
    again.record_costs([cost])
    again.record_timings([TimingRow("m", 4, "total", 0, 1, 0.5, "cpu")])
    assert RunStore.open(store.folder).costs() == [cost]
    assert len(again.images()) == 1
    again.forget_timings("m", 4)
    assert (again.costs(), again.timings()) == ([], [])


def test_a_folder_of_somebody_elses_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not an empty folder"):
        RunStore.create(tmp_path, MANIFEST)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_start_that_was_killed_is_started_again(tmp_path: Path) -> None:
    run = RunStore.create(tmp_path / "run", MANIFEST).folder
    (run / "run.json").rename(run / ".run.json.17.partial")  # as a kill before the last rename leaves it
    again = RunStore.create(run, MANIFEST)
    again.record_images([ROW])
    (run / "run.json").unlink()
    (run / "images" / "m").mkdir()
    with pytest.raises(InputError, match="not an empty folder"):  # images, of nobody knows what
        RunStore.create(run, MANIFEST)


def test_what_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run\.json"):
        RunStore.open(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match="can't read"):
        RunStore.open(tmp_path)
    write_json(tmp_path / "run.json", MANIFEST)
    with pytest.raises(InputError, match=r"ledger\.sqlite is missing"):
        RunStore.open(tmp_path)
    (tmp_path / "ledger.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(InputError, match="ledger"):
        RunStore.open(tmp_path)


def test_a_ledger_of_another_version_is_refused(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "run", MANIFEST)
    with sqlite3.connect(store.folder / "ledger.sqlite") as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(InputError, match="version 99"):
        RunStore.open(store.folder)


def test_a_missing_score_keeps_its_reason(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "run", MANIFEST)
    store.record_images([ROW])
    store.record_scores([ScoreRow("clip", 1, None, "weights are not here")])
    assert store.scores("clip")[1] == ScoreRow("clip", 1, None, "weights are not here")
    store.record_scores([ScoreRow("clip", 1, 3.5)])
    assert store.scores("clip")[1].value == 3.5


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a" / "file", b"old")
    with pytest.raises(InputError, match="can't write"):
        write_bytes(tmp_path / "a" / "file" / "below-a-file", b"new")
    assert os.listdir(tmp_path / "a") == ["file"]


_WRITER = """
import sys
from pathlib import Path
from hypersd_bench.store import ImageRow, RunStore, write_bytes, write_json
run = Path(sys.argv[1])
begun = (run / "run.json").exists()
manifest = {"spec": {}, "spec_hash": "abc", "provenance": {}, "models": [], "metrics": []}
store = RunStore.open(run) if begun else RunStore.create(run, manifest)
print("ready", flush=True)
done = {row.replicate for row in store.images()}
for i in range(100000):
    if i not in done:
        file = f"images/m/4/p0_{i}.png"
        write_bytes(store.folder / file, b"x" * 50000)
        store.record_images([ImageRow("m", 4, "p0", "a fox", i, i, file, "0", "c")])
"""


@pytest.mark.parametrize("delay_s", [0.01, 0.08, 0.21])
def test_kill_9_loses_at_most_what_was_in_flight(tmp_path: Path, delay_s: float) -> None:
    for _ in range(2):  # the second start goes on in what the first left behind
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path / "run")], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(delay_s)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    store = RunStore.open(tmp_path / "run")
    rows = store.images()
    assert sorted(row.replicate for row in rows) == list(range(len(rows)))  # no gap, nothing twice
    assert all((store.folder / row.file).stat().st_size == 50000 for row in rows)
