"""A published user study beside votes of one's own; no torch."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hypersd_bench.errors import InputError
from metrics.preference import Rate, two_way_rate
from metrics.reproduce.preset import Study, StudyRow
from metrics.reproduce.window import Verdict, votes_needed

COLUMNS = ("rater", "model_a", "steps_a", "model_b", "steps_b", "preferred")  # of an export of votes, those read here
VALUES = {"a": 1.0, "tie": 0.5, "both-bad": 0.5, "b": 0.0}
Pair = tuple[str, int, str, int]  # model and steps of the first, of the second
Vote = tuple[str, str, float]  # rater, prompt, and 1 for the first model, 0.5 for a tie, 0 for the second


@dataclass(frozen=True)
class StudyCell:
    """One published preference, in percent, and ours as a rate in [0, 1], its interval clustered by rater and prompt.

    votes_needed: independent votes after which Wilson's interval at the published rate is at most 5 points to a side.
    """

    row: StudyRow
    verdict: Verdict
    votes_needed: int
    reason: str = ""
    ours: Rate | None = None
    ties: int = 0


def compare_votes(study: Study, votes: dict[Pair, list[Vote]] | None) -> list[StudyCell]:
    """Each published preference beside our votes on the same pair; None: there are no votes.

    The paper prints no interval, and nothing from which one could be had, so ours alone decides: ``inside`` where the
    published rate, give or take half a unit of its last digit, is in our 95 % interval.
    """
    return [_study_cell(study, row, votes) for row in study.rows]


def read_votes(path: Path) -> dict[Pair, list[Vote]]:
    """Read votes by pair of models, from a CSV as ``study export`` writes it.

    InputError for a file that can't be read, lacks a column, or holds a value that is none.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            lacking = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            if lacking:
                raise InputError(f"votes {path}: no column {', '.join(lacking)}; give what 'hypersd-bench study "
                                 "export' writes")  # fmt: skip
            return _by_pair(path, list(reader))
    except OSError as error:
        raise InputError(f"can't read votes {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"votes {path} are no CSV in UTF-8: {error}") from error


def unmatched(study: Study, votes: dict[Pair, list[Vote]]) -> int:
    """Votes on pairs that the published study does not have."""
    known = {pair for row in study.rows for pair in (_pair(row), _turned(_pair(row)))}
    return sum(len(given) for pair, given in votes.items() if pair not in known)


def _by_pair(path: Path, rows: Sequence[dict[str, str]]) -> dict[Pair, list[Vote]]:
    found: dict[Pair, list[Vote]] = defaultdict(list)
    for number, row in enumerate(rows, start=2):  # the first line holds the columns' names
        if row.get("kind", "main") != "main" or row.get("criterion", "overall") != "overall":
            continue  # checks and other questions than the published study's
        if not row["rater"]:
            raise InputError(f"votes {path}, line {number}: no rater, by whom votes are counted together")
        try:
            pair = (row["model_a"], int(row["steps_a"]), row["model_b"], int(row["steps_b"]))
            prompt = row.get("prompt_id") or f"line {number}"  # not told: each vote on a prompt of its own
            found[pair].append((row["rater"], prompt, VALUES[row["preferred"]]))
        except (ValueError, TypeError):
            raise InputError(f"votes {path}, line {number}: steps {row['steps_a']!r} and {row['steps_b']!r} must be "
                             "whole numbers") from None  # fmt: skip
        except KeyError:
            raise InputError(f"votes {path}, line {number}: preferred must be a, b, tie or both-bad, "
                             f"not {row['preferred']!r}") from None  # fmt: skip
    if not found:
        raise InputError(f"votes {path}: no votes; give what 'hypersd-bench study export' writes")
    return dict(found)


def _study_cell(study: Study, row: StudyRow, votes: dict[Pair, list[Vote]] | None) -> StudyCell:
    needed = votes_needed(row.preferred / 100)
    if votes is None:
        return StudyCell(row, "not measured", needed, "no votes; give them with --votes CSV")
    pair = _pair(row)
    given = votes.get(pair, []) + [(rater, prompt, 1 - value) for rater, prompt, value in votes.get(_turned(pair), [])]
    if not given:
        return StudyCell(row, "not measured", needed, "no votes on this pair")
    raters, prompts, values = zip(*given, strict=True)
    ours = two_way_rate(values, raters, prompts)
    half_unit = 0.5 * 10**-study.digits / 100
    published = row.preferred / 100
    inside = ours.low - half_unit <= published <= ours.high + half_unit
    return StudyCell(row, "inside" if inside else "outside", needed, "", ours, values.count(0.5))


def _pair(row: StudyRow) -> Pair:
    return (row.model_a, row.steps_a, row.model_b, row.steps_b)


def _turned(pair: Pair) -> Pair:
    return (pair[2], pair[3], pair[0], pair[1])
