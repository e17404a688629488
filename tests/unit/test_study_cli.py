"""The study's commands as a user meets them."""

from __future__ import annotations

import csv
import json
import socket
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hypersd_bench.errors import InputError
from tests.simulated_raters import SimulatedRater, Tastes
from tests.synthetic_run import make_run
from tests.tiny_study import make_study
from user_study.cli import study as command
from user_study.export import COLUMNS
from user_study.links import read_link
from user_study.records import VoteRow
from user_study.study import Study, load_study
from user_study.votes import Ballot


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(tmp_path, ("one", "two"), (4,), 6, practice=1, gold_every=4)


def _voted(study: Study, num_raters: int = 2) -> None:
    votes = study.open_votes()
    tastes = Tastes({"one@4": 1.0, "two@4": 0.0})
    for r in range(num_raters):
        rater = votes.join(f"rater{r}")
        votes.consent(rater, "en")
        turn, simulated = votes.begin(rater), SimulatedRater(rater, tastes)
        while turn.items:
            item = turn.items[0]
            choice, time = simulated.choose(study.design.pair(item.pair_id), item.a_side == "left")
            ballot = Ballot(f"{rater}-{item.assignment_id}"[:40], item.assignment_id, {"overall": choice}, time)
            turn = votes.vote(rater, ballot)[1]
    votes.close()


def _votes(study: Study) -> list[VoteRow]:
    with closing(study.open_votes()) as store:
        return store.votes()


def _call(*arguments: object) -> Result:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def _error(*arguments: object) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert isinstance(result.exception, InputError), result.output + repr(result.exception)
    assert "\n" not in str(result.exception)
    return str(result.exception)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_plan_says_how_many_votes() -> None:
    said = _call("plan", "--effect", "0.6", "--raters", "30").output
    assert "194 votes on a comparison if votes were independent" in said
    made = json.loads(_call("plan", "--effect", "0.6", "--icc-rater", "0", "--icc-prompt", "0", "--json").output)
    assert made["votes"] == made["votes_in_all"] == 194
    assert "not within reach" in _call("plan", "--effect", "0.51").output
    assert "no preference" in _error("plan", "--effect", "0.5")
    assert "rate" in _error("plan", "--effect", "1")


def test_plan_learns_from_a_pilot(study: Study) -> None:
    _voted(study)
    made = json.loads(_call("plan", "--like", study.folder, "--json").output)
    assert 0 <= made["icc_rater"] <= 1
    assert (made["icc_rater"], made["icc_prompt"]) != (0.05, 0.1)


def test_new_makes_a_whole_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", models=("one", "two"), steps=(1, 4), num_prompts=4, replicates=1).folder
    options = ("--pairs", "one@4:two@4,one@1:two@4", "--pairs-each", "3", "--gold-every", "5", "--criteria",
               "overall,appeal", "--rule", "gold_share=0.8", "--rule", "exclude_flagged=true")  # fmt: skip
    told = json.loads(_call("new", run, "--out", tmp_path / "study", *options, "--json").output)
    made = load_study(tmp_path / "study")
    assert told["hash"] == made.design.hash
    assert (told["pairs"], told["comparisons"]) == (6, ["one@4:two@4", "one@1:two@4"])
    assert made.design.criteria == ("overall", "appeal")
    assert (made.design.rules.gold_share, made.design.rules.exclude_flagged) == (0.8, True)
    assert made.run().folder.resolve() == run.resolve()
    assert (made.folder / "study.key").stat().st_mode & 0o077 == 0
    assert {path.name for path in made.folder.iterdir()} == {"design.json", "study.key", "images"}


def test_new_says_what_its_votes_can_show(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", models=("one", "two"), steps=(4,), num_prompts=40, replicates=1).folder
    few = _call("new", run, "--out", tmp_path / "few", "--raters", "2").output
    assert "not the planned 60%" in few
    options = ("--raters", "40", "--effect", "0.65", "--json")
    told = json.loads(_call("new", run, "--out", tmp_path / "many", *options).output)
    planned = json.loads(_call("plan", "--effect", told["smallest_rate_shown"], "--raters", "40", "--json").output)
    assert planned["votes"] == pytest.approx(told["votes_per_pair"] * told["pairs"], rel=0.05)
    assert 0.5 < told["smallest_rate_shown"] < 0.65


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--pairs", "one@4:tow@4"), "did you mean 'two@4'"),
        (("--pairs", "one@4:two@8"), "did you mean 'two@4'"),
        (("--criteria", "overal"), "did you mean 'overall'"),
        (("--criteria", ","), "known: overall"),
        (("--gold-every", "2"), "at least 3"),
        (("--repeat-every", "-1"), "at least 4"),
        (("--rule", "gold_shar=1"), "did you mean 'gold_share'"),
        (("--rule", "gold_share=high"), "'high' is no value"),
        (("--rule", "exclude_flagged=maybe"), "no value"),
        (("--rule", "gold_share=7"), "between 0 and 1"),
        (("--wording", "nowhere.yaml"), "can't read"),
    ],
)
def test_new_refuses_what_can_t_be_and_writes_nothing(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    run = make_run(tmp_path / "run", models=("one", "two"), steps=(4,), num_prompts=2, replicates=1).folder
    assert message in _error("new", run, "--out", tmp_path / "study", *options)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_new_refuses_a_run_with_missing_images(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", models=("one", "two"), steps=(4,), num_prompts=2, replicates=1).folder
    next((run / "images").rglob("*.png")).unlink()
    assert "can't read the image" in _error("new", run, "--out", tmp_path / "study")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert "run.json" in _error("new", tmp_path / "nowhere", "--out", tmp_path / "study")


def test_an_existing_folder_is_left_alone(study: Study) -> None:
    before = study.design.hash
    assert "exists" in _error("new", study.folder.parent / "run", "--out", study.folder)
    assert load_study(study.folder).design.hash == before


def test_links_are_signed_and_all_different(study: Study, tmp_path: Path) -> None:
    found = _call("links", study.folder, "--raters", 5, "--base-url", "https://study.example.org/study/").output.split()
    assert len(set(found)) == 5
    assert all(link.startswith("https://study.example.org/r/") for link in found)
    assert len({read_link(study.key, link.rsplit("/", 1)[1]) for link in found}) == 5
    out = tmp_path / "links.csv"
    _call("links", study.folder, "--raters", 2, "--base-url", "http://x", "--out", out)
    assert len(_rows(out)) == 2
    assert "exists" in _error("links", study.folder, "--raters", 2, "--base-url", "http://x", "--out", out)
    assert "no address" in _error("links", study.folder, "--raters", 2, "--base-url", "x")


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_export_writes_every_vote_with_what_it_is_about(study: Study, form: str) -> None:
    _voted(study)
    assert "rows in" in _call("export", study.folder, "--format", form).output
    path = study.folder / f"votes.{form}"
    if form == "csv":
        rows = _rows(path)
    elif form == "jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        import pyarrow.parquet as pq

        rows = pq.read_table(path).to_pylist()
    votes = _votes(study)
    assert len(rows) == len(votes)
    assert list(rows[0]) == list(COLUMNS)
    assert len({row["rater"] for row in rows}) == 2
    assert not {row["rater"] for row in rows} & {vote.rater for vote in votes}
    for row in rows:
        neither = row["choice"] in ("tie", "both-bad")
        assert row["preferred"] == (row["choice"] if neither else "a" if row["side_a"] == row["choice"] else "b")
        assert str(row["voted_at"]).endswith("Z")
    book = path.with_name("votes.codebook.md").read_text()
    assert all(f"| {column} |" in book for column in COLUMNS)
    assert "exists" in _error("export", study.folder, "--format", form)


def test_an_export_can_be_reproduced_from(study: Study) -> None:
    from metrics.reproduce.votes import read_votes

    _voted(study)
    _call("export", study.folder)
    main = [vote for vote in _votes(study) if vote.kind == "main"]
    (pair,) = read_votes(study.folder / "votes.csv").items()
    assert pair[0] == ("one", 4, "two", 4)
    assert len(pair[1]) == len(main)


def test_a_prompt_that_looks_like_a_formula_stays_text(study: Study) -> None:
    from dataclasses import replace

    from user_study.export import encode_export, export_rows

    _voted(study)
    pairs = tuple(replace(pair, prompt="=1+1") for pair in study.design.pairs)
    design = replace(study.design, pairs=pairs)
    rows = export_rows(design, _votes(study), study.key)
    assert b"'=1+1" in encode_export(rows, "csv")
    assert b'"=1+1"' in encode_export(rows, "jsonl")


def test_analyse_says_the_verdict_and_keeps_everything(study: Study) -> None:
    _voted(study, 6)
    said = _call("analyse", study.folder).output
    assert "one@4" in said
    assert "people against metrics" in said
    assert "clip-score/pocket" in said
    kept = json.loads((study.folder / "analysis.json").read_text())
    assert kept == json.loads(_call("analyse", study.folder, "--json").output)
    assert kept["criteria"][0]["rates"][0]["n"] == kept["counts"]["votes"] == 36
    assert kept["design_hash"] in (study.folder / "card.md").read_text()


def test_analyse_goes_without_a_run_that_is_gone(study: Study, tmp_path: Path) -> None:
    _voted(study)
    (tmp_path / "run").rename(tmp_path / "moved")
    result = _call("analyse", study.folder)
    assert "without the run's metrics" in result.stderr
    assert "the run is not at hand" in result.stdout
    assert "clip-score" in _call("analyse", study.folder, "--run", tmp_path / "moved").output
    other = make_run(tmp_path / "other", models=("one", "two"), steps=(4,), num_prompts=1).folder
    manifest = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**manifest, "spec_hash": "1" * 64}))
    assert "another run" in _error("analyse", study.folder, "--run", other)


def test_bad_folders_are_one_clear_line(study: Study, tmp_path: Path) -> None:
    for verb in ("export", "analyse"):
        assert "no votes yet" in _error(verb, study.folder)
        assert "is a run; make a study of it" in _error(verb, tmp_path / "run")
        assert "is no study" in _error(verb, tmp_path / "nowhere")
    (study.folder / "study.key").write_bytes(b"short")
    assert "damaged" in _error("serve", study.folder, "--port", 0)
    (study.folder / "study.key").unlink()
    assert "can't be read" in _error("serve", study.folder, "--port", 0)


def test_serving_refuses_what_can_t_be_served(study: Study) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"try --port {port + 1}" in _error("serve", study.folder, "--port", port)
    assert "not supported" in _error("serve", study.folder, "--port", 0, "--db", "mysql://x/y")
    said = _error("serve", study.folder, "--port", 0, "--db", "me:hunter2@somewhere/votes")
    assert "not a database URL" in said
    assert "hunter2" not in said
    next((study.folder / "images").iterdir()).unlink()
    assert "missing (1 of" in _error("serve", study.folder, "--port", 0)
