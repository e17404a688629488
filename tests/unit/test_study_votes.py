"""Votes: exactly once, whatever is sent twice, at once, or cut off in the middle."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hypersd_bench.errors import InputError
from tests.synthetic_run import make_run
from user_study.design import Design, make_design, write_design
from user_study.votes import UnknownAssignment, VoteStore


@pytest.fixture
def design(tmp_path: Path) -> Design:
    return make_design(make_run(tmp_path / "run", models=("one", "two"), steps=(1, 4), num_prompts=3, replicates=1))


@pytest.fixture
def open_store(tmp_path: Path, design: Design) -> Iterator[Callable[[], VoteStore]]:
    opened: list[VoteStore] = []

    def open_one() -> VoteStore:
        store = VoteStore(tmp_path / "votes.sqlite", design)
        opened.append(store)
        if not store.image_ids():
            store.add_images([(f"{arm}-{pair.id}", pair.id, arm) for pair in design.pairs for arm in ("a", "b")])
        return store

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[[], VoteStore]) -> VoteStore:
    return open_store()


def _rater(store: VoteStore) -> str:
    rater = store.rater(store.join())
    assert rater is not None
    return rater


def _count(tmp_path: Path) -> int:
    with sqlite3.connect(tmp_path / "votes.sqlite") as db:
        count = int(db.execute("SELECT count(*) FROM vote").fetchone()[0])
    db.close()
    return count


def test_a_rater_meets_every_pair_once_and_is_done(design: Design, store: VoteStore) -> None:
    rater = _rater(store)
    turn = store.turn(rater)
    while turn.assignment_id:
        assert {turn.left[2:], turn.right[2:]} == {turn.left[2:]}  # both images of one pair
        turn = store.vote(rater, turn.assignment_id, "left", 900)[1]
    assert (turn.done, turn.total) == (6, 6)
    assert sorted(row.pair_id for row in store.votes()) == [pair.id for pair in design.pairs]


def test_the_first_vote_stays_and_gets_the_same_answer(store: VoteStore) -> None:
    rater = _rater(store)
    turn = store.turn(rater)
    assert turn.assignment_id
    assert store.turn(rater) == turn  # a refresh shows the same pair
    first = store.vote(rater, turn.assignment_id, "right", 1200)
    assert store.vote(rater, turn.assignment_id, "right", 1200) == first
    assert store.vote(rater, turn.assignment_id, "left", 5) == first
    assert [(row.choice, row.response_ms) for row in store.votes()] == [("right", 1200)]


def test_fifty_duplicates_at_once_are_one_vote(tmp_path: Path, store: VoteStore) -> None:
    rater = _rater(store)
    assignment_id = store.turn(rater).assignment_id
    assert assignment_id
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: store.vote(rater, assignment_id, "tie", 700), range(50)))
    assert len(set(answers)) == 1
    assert _count(tmp_path) == 1


def test_raters_at_once_cover_pairs_evenly(tmp_path: Path, store: VoteStore) -> None:
    raters = [_rater(store) for _ in range(9)]

    def three_votes(rater: str) -> None:
        for _ in range(3):
            turn = store.turn(rater)
            assert turn.assignment_id
            store.vote(rater, turn.assignment_id, "left", 500)

    with ThreadPoolExecutor(9) as pool:
        list(pool.map(three_votes, raters))
    with sqlite3.connect(tmp_path / "votes.sqlite") as db:
        given = Counter(dict(db.execute("SELECT pair_id, count(*) FROM assignment GROUP BY pair_id")))
    db.close()
    assert len(store.votes()) == 27
    assert sum(given.values()) == 27 + 9  # every rater has one more pair open
    assert max(given.values()) - min(given.values()) <= 2


def test_somebody_elses_assignment_is_refused(store: VoteStore) -> None:
    mine, other = _rater(store), _rater(store)
    assignment_id = store.turn(mine).assignment_id
    assert assignment_id
    for stranger, wanted in ((other, assignment_id), (mine, "no-such-assignment")):
        with pytest.raises(UnknownAssignment):
            store.vote(stranger, wanted, "left", 1)
    assert store.votes() == []


def test_tokens_are_kept_only_as_hashes(tmp_path: Path, store: VoteStore) -> None:
    token = store.join()
    assert store.rater(token)
    assert store.rater(token[:-1]) is None
    store.close()
    assert token.encode() not in (tmp_path / "votes.sqlite").read_bytes()


def test_votes_survive_a_restart_and_another_design_is_refused(
    tmp_path: Path, design: Design, store: VoteStore, open_store: Callable[[], VoteStore]
) -> None:
    token = store.join()
    rater = store.rater(token)
    assert rater
    turn = store.turn(rater)
    assert turn.assignment_id
    following = store.vote(rater, turn.assignment_id, "left", 800)[1]
    store.close()
    again = open_store()
    assert again.rater(token) == rater
    assert again.turn(rater) == following
    again.close()
    shorter = Design(design.run, design.question, design.instruction, design.requested, design.pairs[:2])
    with pytest.raises(InputError, match="another design"):
        VoteStore(tmp_path / "votes.sqlite", shorter)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path, design: Design) -> None:
    (tmp_path / "votes.sqlite").write_bytes(b"not a database at all, but long enough to be taken for one" * 20)
    with pytest.raises(InputError, match="not a database"):
        VoteStore(tmp_path / "votes.sqlite", design)


_VOTER = """
import sys
from pathlib import Path
from user_study.design import load_design
from user_study.votes import VoteStore
store = VoteStore(Path(sys.argv[1]), load_design(Path(sys.argv[2])))
while True:
    rater = store.rater(store.join())
    turn = store.turn(rater)
    while turn.assignment_id:
        mine = turn.assignment_id
        turn = store.vote(rater, mine, "left", 1)[1]
        print(mine, flush=True)
"""


def test_no_acknowledged_vote_is_lost_to_kill_9(
    tmp_path: Path, design: Design, store: VoteStore, open_store: Callable[[], VoteStore]
) -> None:
    store.close()
    write_design(tmp_path / "design.json", design)
    acknowledged: list[str] = []
    for wanted in (3, 17):
        command = [sys.executable, "-c", _VOTER, str(tmp_path / "votes.sqlite"), str(tmp_path / "design.json")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as voter:
            assert voter.stdout is not None
            acknowledged += [voter.stdout.readline().strip() for _ in range(wanted)]
            voter.send_signal(signal.SIGKILL)
            acknowledged += [line.strip() for line in voter.stdout if line.endswith("\n")]
    with sqlite3.connect(tmp_path / "votes.sqlite") as db:
        stored = [row[0] for row in db.execute("SELECT assignment_id FROM vote")]
    db.close()
    assert len(acknowledged) >= 20
    assert set(acknowledged) <= set(stored)
    assert len(stored) == len(set(stored)) <= len(acknowledged) + 2  # at most one unacknowledged per kill
    assert len(open_store().votes()) == len(stored)
