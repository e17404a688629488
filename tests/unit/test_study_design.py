"""The study's design: balanced, of one noise, written once."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from hypersd_bench.errors import InputError
from hypersd_bench.store import RunStore
from tests.synthetic_run import make_run
from user_study.design import load_design, make_design, open_design


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return make_run(tmp_path_factory.mktemp("design") / "run")


def test_pairs_share_prompt_noise_and_steps_and_the_baseline_is_a(run: RunStore) -> None:
    images = {row.file: row for row in run.images()}
    for pair in make_design(run).pairs:
        a, b = images[pair.a.file], images[pair.b.file]
        assert (a.prompt_id, a.replicate, a.seed, a.steps) == (b.prompt_id, b.replicate, b.seed, b.steps)
        assert pair.a.model == "hyper-sd" != pair.b.model


@pytest.mark.parametrize("num_pairs", [1, 7, 24, 60])
def test_a_sample_is_balanced_over_cells_and_prompts(run: RunStore, num_pairs: int) -> None:
    pairs = make_design(run, num_pairs).pairs
    assert len({(pair.a.file, pair.b.file) for pair in pairs}) == len(pairs) == num_pairs
    cells = Counter((pair.b.model, pair.b.steps) for pair in pairs)
    prompts = Counter(pair.prompt_id for pair in pairs)
    models = Counter(pair.b.model for pair in pairs)
    for counts, kinds in ((cells, 12), (models, 3), (prompts, 6)):
        levels = [*counts.values(), *[0] * (kinds - len(counts))]
        assert max(levels) - min(levels) <= 1


def test_a_small_run_gives_all_pairs_it_has(run: RunStore) -> None:
    assert len(make_design(run, 1000).pairs) == 3 * 4 * 6 * 2


def test_the_design_is_deterministic_and_survives_the_file(run: RunStore) -> None:
    first = open_design(run, 12)
    assert first == make_design(run, 12) == open_design(run) == load_design(run.folder / "study" / "design.json")
    assert first.hash != make_design(run, 13).hash


def test_defective_images_are_left_out(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", models=("one", "two"), steps=(4,), num_prompts=2, replicates=1)
    with sqlite3.connect(store.folder / "ledger.sqlite") as db:
        db.execute("UPDATE image SET defect = 'black' WHERE model = 'two' AND prompt_id = 'p0000'")
    db.close()
    assert [pair.prompt_id for pair in make_design(store).pairs] == ["p0001"]


def test_a_changed_design_is_refused(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", models=("one", "two"), steps=(4,), num_prompts=2)
    open_design(store)
    path = store.folder / "study" / "design.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "question": "Which picture is the right one?"}))
    with pytest.raises(InputError, match="changed after it was written"):
        open_design(store)


def test_other_pairs_than_designed_are_refused(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", models=("one", "two"), steps=(4,), num_prompts=2)
    open_design(store, 3)
    with pytest.raises(InputError, match="--pairs 3"):
        open_design(store, 4)


def test_bad_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs two"):
        make_design(make_run(tmp_path / "one", models=("one",), steps=(4,), num_prompts=1))
    store = make_run(tmp_path / "two", models=("one", "two"), steps=(4,), num_prompts=1)
    with pytest.raises(InputError, match="at least one"):
        make_design(store, 0)
    store.manifest["baseline"] = "onne"
    with pytest.raises(InputError, match="'one'"):
        make_design(store)
