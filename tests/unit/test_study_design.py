"""Designs: what is paired, balance, known answers, and a file that tells when it was changed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hypersd_bench.errors import InputError
from hypersd_bench.store import RunStore
from tests.synthetic_run import make_run
from tests.tiny_design import SESSION
from user_study.assignment import kinds_of
from user_study.design import Design, Rules, load_design, write_design
from user_study.making import Plan, make_design
from user_study.wording import load_wording


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    folder = tmp_path_factory.mktemp("design") / "run"
    return make_run(folder, models=("hyper-sd", "lightning", "lcm"), steps=(1, 4), num_prompts=8, replicates=2)


def _design(
    run: RunStore, comparisons: str | None = None, session: dict[str, Any] | None = None, **plan: Any
) -> Design:
    made = Plan(comparisons, **plan)
    return make_design(
        run, made, ("overall",), load_wording(None, ("overall",)), {**SESSION, **(session or {})}, Rules()
    )


def test_the_baseline_meets_all_others_at_each_step_count(run: RunStore) -> None:
    assert set(_design(run).comparisons) == {
        "hyper-sd@1:lightning@1", "hyper-sd@1:lcm@1", "hyper-sd@4:lightning@4", "hyper-sd@4:lcm@4",
    }  # fmt: skip


def test_named_comparisons_may_cross_step_counts(run: RunStore) -> None:
    design = _design(run, "hyper-sd@1:lcm@4, lightning@1:lightning@4")
    assert design.comparisons == ("hyper-sd@1:lcm@4", "lightning@1:lightning@4")
    images = {row.file: row for row in run.images()}
    for pair in design.pairs:
        a, b = images[pair.a.file], images[pair.b.file]
        assert (a.prompt_id, a.replicate, a.seed) == (b.prompt_id, b.replicate, b.seed)  # the same noise


def test_comparisons_and_prompts_are_balanced(run: RunStore) -> None:
    design = _design(run, pairs_each=8)
    assert set(Counter(pair.comparison for pair in design.pairs).values()) == {8}
    assert set(Counter(pair.prompt_id for pair in design.pairs).values()) == {4}
    assert len({pair.id for pair in design.pairs}) == 32
    assert {len({p.prompt_id for p in design.pairs if p.comparison == c}) for c in design.comparisons} == {8}


def test_the_same_plan_gives_the_same_design_and_another_seed_another(run: RunStore) -> None:
    assert _design(run).hash == _design(run).hash
    assert _design(run, pairs_each=4).pairs != _design(run, pairs_each=4, seed=1).pairs


def test_gold_and_practice_are_enough_and_known(run: RunStore) -> None:
    design = _design(run, session={"practice": 3, "gold_every": 3, "repeat_every": 4}, pairs_each=16)
    most = max(kinds_of(design, f"rater {r}").count("gold") for r in range(200))
    assert most <= len(design.gold)
    assert len(design.practice) == 3
    for pair in (*design.gold, *design.practice):
        assert pair.a.file == pair.b.file
        assert not pair.a.spoiled
        assert pair.b.spoiled
    assert {pair.b.spoiled for pair in design.gold} == {"blur", "blocks", "noise"}
    assert not {pair.id for pair in design.gold} & {pair.id for pair in design.pairs}


def test_the_quota_is_what_the_planned_raters_give(run: RunStore) -> None:
    design = _design(run, pairs_each=10, pairs_per_rater=20, planned_raters=30)
    assert design.session.votes_per_pair == 15  # 30 raters, 20 pairs each, of 40
    assert _design(run, votes_per_pair=3).session.votes_per_pair == 3
    assert _design(run, pairs_each=2, pairs_per_rater=100).session.pairs_per_rater == 8


@pytest.mark.parametrize(
    ("comparisons", "message"),
    [
        ("hyper-sd@4:lightnin@4", "did you mean 'lightning@4'"),
        ("hyper-sd@4:lightning@2", "did you mean 'lightning@"),
        ("hyper-sd@4", "hyper-sd@4:lightning@4"),
        ("lcm@4:lcm@4", "with itself"),
        ("lcm@4:lightning@4,lightning@4:lcm@4", "twice"),
    ],
)
def test_comparisons_that_can_t_be_are_refused(run: RunStore, comparisons: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _design(run, comparisons)


def test_a_run_with_one_configuration_is_refused(tmp_path: Path) -> None:
    lonely = make_run(tmp_path / "run", models=("one",), steps=(4,), num_prompts=2)
    with pytest.raises(InputError, match="a study compares two"):
        _design(lonely)


def test_defective_images_are_left_out(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", models=("one", "two"), steps=(4,), num_prompts=3, replicates=1)
    rows = store.images()
    store.record_images([replace(rows[0], defect="black", sha256="f" * 64)])
    pairs = _design(store).pairs
    assert len(pairs) == 2
    assert rows[0].file not in {arm.file for pair in pairs for arm in (pair.a, pair.b)}


def test_a_design_reads_back_as_it_was_written(run: RunStore, tmp_path: Path) -> None:
    design = _design(run, session={"practice": 1, "gold_every": 5})
    write_design(tmp_path / "design.json", design, "../run")
    assert load_design(tmp_path / "design.json") == (design, "../run")


@pytest.mark.parametrize("field", ["seed", "planned_rate", "wording", "rules", "session", "pairs"])
def test_a_changed_design_is_noticed(run: RunStore, tmp_path: Path, field: str) -> None:
    path = tmp_path / "design.json"
    write_design(path, _design(run), "../run")
    raw = json.loads(path.read_text())
    changes: dict[str, Any] = {
        "seed": 1, "planned_rate": 0.9, "wording": {"en": {"title": "other"}},
        "rules": {**raw["design"]["rules"], "gold_share": 0}, "session": {**raw["design"]["session"], "practice": 9},
        "pairs": raw["design"]["pairs"][1:],
    }  # fmt: skip
    raw["design"][field] = changes[field]
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError, match="was changed after it was written"):
        load_design(path)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": 2}', '{"format": 1, "hash": "", "run_folder": ""}'])
def test_what_is_no_design_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "design.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"design|format") as caught:
        load_design(path)
    assert "\n" not in str(caught.value)


def test_own_wording_takes_the_place_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "wording.yaml"
    path.write_text("en: {title: Mine, questions: {overall: 'Which?'}}\n")
    wording = load_wording(path, ("overall", "appeal"))
    assert list(wording) == ["en"]
    assert wording["en"]["title"] == "Mine"
    assert wording["en"]["questions"]["overall"] == "Which?"
    assert wording["en"]["questions"]["appeal"]
    assert wording["en"]["consent"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "write a language"),
        ("en: 3", "write a language"),
        ("english: {title: x}", "unknown language"),
        ("en: {titel: x}", "did you mean 'title'"),
        ("en: {consent: all in one}", "list of paragraphs"),
        ("en: {consent: [1]}", "no text"),
        ("en: {questions: {overal: x}}", "did you mean 'overall'"),
        ("en: {title: ''}", "nothing"),
        ("en: {", "no YAML"),
    ],
)
def test_wording_of_another_shape_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wording.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_wording(path, ("overall",))


def test_all_languages_have_all_words() -> None:
    from user_study.strings import catalogue

    def shape(value: Any) -> Any:
        return {key: shape(entry) for key, entry in value.items()} if isinstance(value, dict) else type(value)

    shapes = [shape(words) for words in catalogue().values()]
    assert shapes[0] == shapes[1]
    for language in catalogue().values():
        assert all(text.strip() for text in language["page"].values())


def test_the_page_uses_no_word_that_the_catalogue_lacks() -> None:
    import re
    from importlib.resources import files

    from user_study.strings import catalogue

    known = set(catalogue()["en"]["page"])
    page = files("user_study").joinpath("page")
    html = page.joinpath("study.html").read_text()
    script = "".join(page.joinpath(name).read_text() for name in ("outbox.js", "zoom.js", "study.js"))
    used = set(re.findall(r'data-(?:s|alt|label)="(\w+)"', html))
    used |= {key for line in re.findall(r"text\(([^)]*)\)", script) for key in re.findall(r'"(\w+)"', line)}
    assert len(used) > 40
    assert used - known - {"A", "B", "left", "bar"} == set()
