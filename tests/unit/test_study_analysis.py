"""The analysis: known tastes are recovered, bias told, spammers flagged; counts by hand; odd studies."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hypersd_bench.store import RunStore
from tests.simulated_raters import Tastes, simulate
from tests.synthetic_run import make_run
from tests.tiny_design import SESSION, tiny_design
from user_study.analysis import Analysis, analyse, card_markdown, lines
from user_study.design import Design, Rules
from user_study.making import Plan, make_design
from user_study.records import VoteRow

COMPARISONS = (("one", "two"), ("one", "three"), ("two", "three"))
TASTES = Tastes({"one@4": 0.9, "two@4": 0.0, "three@4": -0.9}, side=0.3)


def _design(**session: Any) -> Design:
    values = {"num_prompts": 30, "comparisons": COMPARISONS, "pairs_per_rater": 45, **session}
    design = tiny_design(**values)
    gold = tuple(replace(pair, b=replace(pair.b, spoiled="blur")) for pair in design.gold)
    return replace(design, gold=gold)


@pytest.fixture(scope="module")
def found() -> Analysis:
    design = _design(num_gold=20, gold_every=8, repeat_every=10)
    return analyse(design, *simulate(design, TASTES, num_raters=30, num_spammers=1), None)


def test_known_tastes_are_recovered(found: Analysis) -> None:
    (ranking,) = found.criteria[0].rankings
    assert [entry["name"] for entry in ranking["strengths"]] == ["one@4", "two@4", "three@4"]
    assert [(entry["rank_low"], entry["rank_high"]) for entry in ranking["strengths"]] == [(1, 1), (2, 2), (3, 3)]
    for entry in ranking["strengths"]:
        assert entry["low"] <= TASTES.strength[entry["name"]] <= entry["high"]
    assert [row["verdict"] for row in found.criteria[0].rates] == ["a", "a", "a"]


def test_the_bias_towards_the_left_is_told(found: Analysis) -> None:
    (ranking,) = found.criteria[0].rankings
    side = ranking["side_bias"]
    assert 0 < side["low"] <= TASTES.side <= side["high"]
    assert found.sides is not None
    assert found.sides["low"] > 0.5


def test_the_spammer_and_nobody_else_is_flagged(found: Analysis) -> None:
    flagged = {row["rater"]: row["flags"] for row in found.raters if row["flags"]}
    assert set(flagged) == {"rater030"}
    reasons = " ".join(flagged["rater030"])
    assert all(word in reasons for word in ("gold", "sides", "speed"))


def test_flagged_raters_are_left_out_only_where_the_design_says_so(found: Analysis) -> None:
    assert found.excluded == []
    design = replace(_design(num_gold=20, gold_every=8), rules=Rules(exclude_flagged=True))
    study = simulate(design, TASTES, num_raters=8, num_spammers=1)
    without = analyse(design, *study, None)
    assert without.excluded == ["rater008"]
    counted = sum(row["n"] for row in without.criteria[0].rates)
    assert counted == sum(vote.kind == "main" and vote.rater != "rater008" for vote in study[0])
    for row, rate in zip(without.criteria[0].sensitivity, without.criteria[0].rates, strict=True):
        assert row["scenarios"]["without flagged raters"] == rate["rate"]
        assert row["scenarios"]["all raters"]["n"] > rate["n"]


def test_rates_are_what_counting_by_hand_gives() -> None:
    design = _design()
    votes, assignments, raters = simulate(design, TASTES, num_raters=6)
    found = analyse(design, votes, assignments, raters, None)
    for row in found.criteria[0].rates:
        mine = [vote for vote in votes if design.pair(vote.pair_id).comparison == row["comparison"]]
        count = Counter(vote.preferred("overall") for vote in mine)
        assert row["n"] == len(mine) == sum(count.values())
        assert (row["a_preferred"], row["b_preferred"]) == (count["a"], count["b"])
        neither = count["tie"] + count["both-bad"]
        assert row["rate"]["value"] == pytest.approx((count["a"] + neither / 2) / len(mine))
        assert row["rate_decided"]["value"] == pytest.approx(count["a"] / (count["a"] + count["b"]))


def test_checks_and_repeats_never_count_as_votes(found: Analysis) -> None:
    assert sum(row["n"] for row in found.criteria[0].rates) == found.counts["votes"] == 31 * 45
    assert found.counts["gold"] > 100
    assert found.criteria[0].agreement["retest"]["n"] > 100


def test_sensitivity_leaves_out_what_it_says() -> None:
    design = _design()
    votes, assignments, raters = simulate(design, TASTES, num_raters=5)
    votes[0] = replace(votes[0], surplus=True)
    (row, *_) = analyse(design, votes, assignments, raters, None).criteria[0].sensitivity
    mine = [vote for vote in votes if design.pair(vote.pair_id).comparison == row["comparison"]]
    kinds = Counter(vote.preferred("overall") for vote in mine)
    n = {name: rate["n"] for name, rate in row["scenarios"].items()}
    assert n["ties left out"] == len(mine) - kinds["tie"]
    assert n["both bad left out"] == len(mine) - kinds["both-bad"]
    assert n["ties and both bad left out"] == kinds["a"] + kinds["b"]
    assert n["without surplus votes"] == sum(not vote.surplus for vote in mine)
    scores = {"a": 1.0, "b": 0.0}
    for name in {vote.rater for vote in mine}:
        kept = [scores.get(vote.preferred("overall"), 0.5) for vote in mine if vote.rater != name]
        ends = row["leaving_out_a_rater"]
        assert ends["low"] - 1e-12 <= sum(kept) / len(kept) <= ends["high"] + 1e-12


def test_pairs_add_up_to_the_rates(found: Analysis) -> None:
    for row in found.criteria[0].rates:
        pairs = [pair for pair in found.criteria[0].pairs if pair["comparison"] == row["comparison"]]
        counted = [sum(pair[name] for pair in pairs) for name in ("a", "b", "tie", "both_bad")]
        assert counted == [row["a_preferred"], row["b_preferred"], row["ties"], row["both_bad"]]
    assert len({pair["pair"] for pair in found.criteria[0].pairs}) == found.counts["pairs"]


def test_json_round_trips_and_holds_no_nan(found: Analysis) -> None:
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text) == found.to_json()


def test_words_and_card_say_the_figures(found: Analysis) -> None:
    said = "\n".join(lines(found))
    row = found.criteria[0].rates[0]
    assert f"one@4 preferred over two@4: {100 * row['rate']['value']:.0f} %" in said
    assert "1 of 31 raters flagged" in said
    card = card_markdown(found)
    assert found.design_hash in card
    assert f"{found.counts['gold_right']} of {found.counts['gold']} right" in card
    assert "fill in" in card


def _votes(design: Design, choices: list[str]) -> list[VoteRow]:
    votes = simulate(design, TASTES, num_raters=1)[0][: len(choices)]
    return [replace(vote, choices={"overall": choice}) for vote, choice in zip(votes, choices, strict=True)]  # type: ignore[dict-item]


@pytest.mark.parametrize("choices", [[], ["left"], ["tie"] * 6, ["left"] * 6, ["both-bad", "right"]])
def test_odd_studies_are_analysed_without_a_fuss(choices: list[str]) -> None:
    design = _design(num_prompts=3)
    found = analyse(design, _votes(design, choices), [], [], None)
    json.dumps(found.to_json(), allow_nan=False)
    assert lines(found)
    assert card_markdown(found)


def test_a_comparison_without_votes_is_said_to_have_none() -> None:
    design = _design(num_prompts=3)
    votes = [v for v in simulate(design, TASTES, 3)[0] if design.pair(v.pair_id).comparison != "one@4:two@4"]
    found = analyse(design, votes, [], [], None)
    assert "one@4 against two@4: no votes" in lines(found)


def test_what_no_votes_connect_is_ranked_apart() -> None:
    design = tiny_design(10, (("one", "two"), ("three", "four")))
    tastes = Tastes({"one@4": 1.0, "two@4": 0.0, "three@4": 0.0, "four@4": -1.0})
    found = analyse(design, *simulate(design, tastes, 4), None)
    assert [len(ranking["strengths"]) for ranking in found.criteria[0].rankings] == [2, 2]
    assert any("No votes connect" in line for line in lines(found))


def test_every_criterion_is_analysed() -> None:
    design = _design(num_prompts=4, criteria=("overall", "appeal"))
    found = analyse(design, *simulate(design, TASTES, 3), None)
    assert [result.criterion for result in found.criteria] == ["overall", "appeal"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return make_run(
        tmp_path_factory.mktemp("study") / "run", models=("one", "two", "three"), steps=(2, 4), num_prompts=8
    )


def test_a_metric_that_people_follow_agrees_and_one_turned_round_does_not(run: RunStore) -> None:
    from user_study.wording import load_wording

    plan = Plan("one@4:two@4,one@2:two@4", pairs_each=16)
    design = make_design(run, plan, ("overall",), load_wording(None, ("overall",)), SESSION, Rules())
    rows = {row.file: row for row in run.images()}
    clip = run.scores("clip-score/pocket")
    values = {file: clip[row.key_id].value or 0.0 for file, row in rows.items()}
    votes = []
    for vote in simulate(design, Tastes({"one@4": 0, "two@4": 0, "one@2": 0}), 4)[0]:
        pair = design.pair(vote.pair_id)
        better = "left" if (values[pair.a.file] > values[pair.b.file]) == (vote.a_side == "left") else "right"
        votes.append(replace(vote, choices={"overall": better}))  # type: ignore[dict-item]
    found = analyse(design, votes, [], [], run).criteria[0]
    by_id = {row["id"]: row for row in found.metrics["metrics"]}
    assert by_id["clip-score/pocket"]["agreement"]["value"] == 1
    assert by_id["clip-score/pocket"]["disagreements"] == []
    assert "fid/lite0" not in by_id
    assert found.metrics["ceiling"]["value"] == 1
    others = by_id["aesthetic/pocket"]
    assert others["agreement"]["value"] < 1
    for entry in others["disagreements"]:
        assert (entry["a_preferred"] - 0.5) * entry["metric_lead_of_a"] < 0
    rows_ = {row["comparison"]: row for row in found.axes}
    assert rows_["one@4:two@4"]["equal_steps"]
    assert not rows_["one@2:two@4"]["equal_steps"]


def test_images_that_changed_since_are_not_compared_with_metrics(run: RunStore, tmp_path: Path) -> None:
    design = _design(num_prompts=3)  # files of the run's names, of other content
    found = analyse(design, *simulate(design, TASTES, 2), run).criteria[0].metrics
    assert {row["reason"] for row in found["metrics"]} == {"no pair of which both images are scored"}
