"""Votes in both databases: exactly once, leases, quotas, undo, an audit that stays, and the right design."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from hypersd_bench.errors import InputError
from tests.postgres import fresh_schema
from tests.tiny_design import tiny_design
from user_study.design import Design
from user_study.votes import (
    Ballot,
    NotConsented,
    Turn,
    UnknownAssignment,
    UnknownRater,
    VoteStore,
)
from user_study.votes.database import Database, DatabaseDown, sqlite_url
from user_study.votes.schema import metadata


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def move(self, minutes: float) -> None:
        self.now += timedelta(minutes=minutes)


@pytest.fixture
def url(database: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    if database == "sqlite":
        return sqlite_url(tmp_path / "votes.sqlite")
    return fresh_schema(request.getfixturevalue("postgres"))


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def clock() -> Clock:
    return Clock()


Opener = Callable[[Design], VoteStore]


@pytest.fixture
def open_store(url: str, clock: Clock) -> Iterator[Opener]:
    opened: list[VoteStore] = []

    def open_one(design: Design) -> VoteStore:
        opened.append(VoteStore(url, design, clock))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def _joined(store: VoteStore) -> tuple[str, Turn]:
    rater = store.join()
    store.consent(rater, "en")
    return rater, store.begin(rater)


_keys = iter(range(10**9))


def _ballot(turn: Turn, choice: str = "left", item: int = 0, **changes: Any) -> Ballot:
    key = f"key-{next(_keys):020d}"
    return Ballot(**{"key": key, "assignment_id": turn.items[item].assignment_id, "choices": {"overall": choice},
                     "response_ms": 1500, **changes})  # fmt: skip


def test_a_rater_goes_through_all_phases(open_store: Opener) -> None:
    store = open_store(tiny_design(3, num_practice=2, practice=2))
    rater = store.join(language="zh")
    assert store.turn(rater).phase == "consent"
    with pytest.raises(NotConsented):
        store.begin(rater)
    assert store.consent(rater, "zh").phase == "instructions"
    turn = store.begin(rater)
    phases = []
    while turn.items:
        assert len(turn.items) == min(2, turn.total + turn.practice_total - turn.done - turn.practice_done)
        phases.append((turn.phase, turn.practice_done, turn.done))
        recorded, turn = store.vote(rater, _ballot(turn))
        assert (recorded.better is not None) == (phases[-1][0] == "practice")
    assert phases == [("practice", 0, 0), ("practice", 1, 0), *[("rating", 2, done) for done in range(6)]]
    assert (turn.phase, turn.done, turn.total, turn.items) == ("finished", 6, 6, ())
    assert Counter(vote.kind for vote in store.votes()) == {"practice": 2, "main": 6}
    assert [row.language for row in store.raters()] == ["zh"]


def test_the_next_turn_shows_what_was_announced(open_store: Opener) -> None:
    store = open_store(tiny_design())
    rater, turn = _joined(store)
    for _ in range(6):
        announced = turn.items[1]
        turn = store.vote(rater, _ballot(turn))[1]
        assert turn.items[0] == announced
        assert store.turn(rater).items == turn.items


def test_a_vote_counts_once_however_often_it_is_sent(open_store: Opener) -> None:
    store = open_store(tiny_design())
    rater, turn = _joined(store)
    first, second = _ballot(turn, "left"), _ballot(turn, "right")
    answers = [store.vote(rater, ballot) for ballot in (first, first, second)]
    assert answers[0] == answers[1] == answers[2]
    assert [dict(vote.choices) for vote in store.votes()] == [{"overall": "left"}]
    assert [event["key"] for event in store.events() if event["kind"] == "voted"] == [first.key]


def test_fifty_copies_at_once_are_one_vote(open_store: Opener) -> None:
    store = open_store(tiny_design())
    rater, turn = _joined(store)
    ballots = [_ballot(turn, "left"), _ballot(turn, "right")] * 25
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda ballot: store.vote(rater, ballot)[0].choices, ballots))
    assert len(store.votes()) == 1
    assert {str(choices) for choices in answers} == {str(store.votes()[0].choices)}


def test_an_undone_vote_is_gone_but_not_from_the_events(open_store: Opener) -> None:
    store = open_store(tiny_design())
    rater, turn = _joined(store)
    ballot = _ballot(turn, "left")
    after = store.vote(rater, ballot)[1]
    assert after.undo == ballot.key
    back = store.undo(rater, ballot.key)
    assert (back.items[0], back.done, back.undo) == (turn.items[0], 0, None)
    assert store.undo(rater, ballot.key).items == back.items
    assert store.votes() == []
    late = store.vote(rater, ballot)  # a copy of the vote that was taken back arrives late
    assert (late[0].choices, store.votes()) == ({}, [])
    store.vote(rater, _ballot(back, "right"))
    assert [vote.choices["overall"] for vote in store.votes()] == ["right"]
    told = [event["kind"] for event in store.events() if event["assignment_id"] == ballot.assignment_id]
    assert told == ["assigned", "voted", "undone", "voted"]


def test_only_the_last_vote_can_be_taken_back_and_never_a_practice_vote(open_store: Opener) -> None:
    store = open_store(tiny_design(num_practice=1, practice=1))
    rater, turn = _joined(store)
    practice = _ballot(turn)
    turn = store.vote(rater, practice)[1]
    assert turn.undo is None
    store.undo(rater, practice.key)
    assert len(store.votes()) == 1
    first = _ballot(turn)
    turn = store.vote(rater, first)[1]
    last = _ballot(turn)
    store.vote(rater, last)
    store.undo(rater, first.key)
    assert len(store.votes()) == 3
    store.undo(rater, last.key)
    store.undo(rater, first.key)
    assert len(store.votes()) == 1


def test_events_can_t_be_changed(open_store: Opener, url: str) -> None:
    store = open_store(tiny_design())
    _joined(store)
    before = store.events()
    engine = sa.create_engine(url)
    for statement in ("UPDATE event SET kind = 'x'", "DELETE FROM event"):
        with pytest.raises(sa.exc.DatabaseError, match="append-only"), engine.begin() as db:
            db.execute(sa.text(statement))
    engine.dispose()
    assert store.events() == before


def test_nobody_votes_for_others_or_without_being_a_rater(open_store: Opener) -> None:
    store = open_store(tiny_design())
    ann, hers = _joined(store)
    ben, _ = _joined(store)
    with pytest.raises(UnknownAssignment):
        store.vote(ben, _ballot(hers))
    with pytest.raises(UnknownAssignment):
        store.vote(ann, _ballot(hers, assignment_id="nothing"))
    with pytest.raises(UnknownRater):
        store.turn("nobody")
    assert store.votes() == []


def test_a_lost_rater_s_pairs_go_to_others_and_a_late_vote_is_kept_as_surplus(open_store: Opener, clock: Clock) -> None:
    store = open_store(tiny_design(1, (("one", "two"),), votes_per_pair=1, lease_minutes=10))
    lost, hers = _joined(store)
    ben, his = _joined(store)
    assert his.phase == "finished"  # the only pair is leased
    clock.move(11)
    his = store.turn(ben)
    assert his.items[0].pair_id == hers.items[0].pair_id
    store.vote(ben, _ballot(his))
    clock.move(1)
    recorded, turn = store.vote(lost, _ballot(hers, "tie"))
    assert recorded.choices == {"overall": "tie"}
    assert turn.phase == "finished"
    assert [vote.surplus for vote in store.votes()] == [False, True]


def test_who_comes_back_late_keeps_the_pair_while_it_has_room(open_store: Opener, clock: Clock) -> None:
    store = open_store(tiny_design(2, votes_per_pair=1, lease_minutes=10))
    rater, turn = _joined(store)
    clock.move(60)
    assert store.turn(rater).items == turn.items
    ben, _ = _joined(store)
    clock.move(9)
    held = {row.pair_id for row in store.assignments() if row.rater == rater}
    assert not held & {item.pair_id for item in store.turn(ben).items}


def test_who_comes_back_to_a_filled_pair_gets_another(open_store: Opener, clock: Clock) -> None:
    store = open_store(tiny_design(2, (("one", "two"),), votes_per_pair=1, lease_minutes=10))
    ann, hers = _joined(store)
    assert len(hers.items) == 2
    clock.move(11)
    ben, his = _joined(store)
    store.vote(ben, _ballot(his))
    back = store.turn(ann)
    assert [item.pair_id for item in back.items] == []  # the one is voted on, the other is Ben's now
    assert (back.phase, back.total) == ("finished", 0)
    late = store.vote(ann, _ballot(hers))[0]
    assert late.choices


def test_a_pause_hands_out_nothing_and_loses_nothing(open_store: Opener) -> None:
    store = open_store(tiny_design())
    rater, turn = _joined(store)
    store.set_paused(True)
    assert store.paused()
    assert (store.turn(rater).phase, store.turn(rater).items) == ("paused", ())
    assert store.vote(rater, _ballot(turn))[1].phase == "paused"
    assert len(store.votes()) == 1
    store.set_paused(False)
    assert store.turn(rater).items[0] == turn.items[1]


def test_several_criteria_are_one_vote(open_store: Opener) -> None:
    store = open_store(tiny_design(criteria=("overall", "appeal")))
    rater, turn = _joined(store)
    choices = {"overall": "left", "appeal": "both-bad"}
    store.vote(rater, _ballot(turn, choices=choices))
    (vote,) = store.votes()
    assert dict(vote.choices) == choices
    assert vote.preferred("appeal") == "both-bad"
    assert vote.preferred("overall") == ("a" if vote.a_side == "left" else "b")


def test_an_invited_rater_is_the_same_on_every_device(open_store: Opener) -> None:
    store = open_store(tiny_design())
    assert store.join("invited1") == store.join("invited1") == "invited1"
    assert [(row.id, row.invited) for row in store.raters()] == [("invited1", True)]
    assert store.language("invited1") == ""
    store.set_language("invited1", "zh")
    assert (store.language("invited1"), store.language("nobody")) == ("zh", None)


def test_opened_again_everything_is_there(open_store: Opener) -> None:
    design = tiny_design()
    store = open_store(design)
    rater, turn = _joined(store)
    turn = store.vote(rater, _ballot(turn))[1]
    again = open_store(design)
    assert again.turn(rater) == turn
    assert (again.votes(), again.assignments(), again.events()) == (store.votes(), store.assignments(), store.events())


def test_two_servers_on_one_database_keep_quotas(open_store: Opener) -> None:
    design = tiny_design(6, votes_per_pair=2, pairs_per_rater=6)
    stores = [open_store(design), open_store(design)]
    seats = [(stores[r % 2], *_joined(stores[r % 2])) for r in range(6)]

    def session(seat: tuple[VoteStore, str, Turn]) -> None:
        store, rater, turn = seat
        while turn.items:
            turn = store.vote(rater, _ballot(turn))[1]

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(session, seats))
    per_pair = Counter(vote.pair_id for vote in stores[0].votes())
    assert max(per_pair.values()) <= 2
    assert len({(vote.rater, vote.pair_id) for vote in stores[0].votes()}) == per_pair.total() == 24


def test_votes_on_another_design_are_refused(open_store: Opener) -> None:
    design = tiny_design()
    open_store(design)
    with pytest.raises(InputError, match="another design"):
        open_store(replace(design, planned_rate=0.7))


def test_a_database_of_another_version_is_refused(open_store: Opener, url: str) -> None:
    design = tiny_design()
    open_store(design).close()
    engine = sa.create_engine(url)
    with engine.begin() as db:
        db.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(InputError, match="another version"):
        open_store(design)
    with engine.begin() as db:
        assert db.scalar(sa.text("SELECT version_num FROM alembic_version")) == "9999"
    engine.dispose()


def test_a_database_of_another_program_is_refused(open_store: Opener, url: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as db:
        db.execute(sa.text("CREATE TABLE study (name VARCHAR)"))
    with pytest.raises(InputError, match="another program"):
        open_store(tiny_design())
    with engine.begin() as db:
        assert not sa.inspect(db).has_table("vote")
    engine.dispose()


def test_migrations_make_the_tables_that_the_code_uses(url: str) -> None:
    Database(url).close()
    engine = sa.create_engine(url)
    with engine.connect() as db:
        assert compare_metadata(MigrationContext.configure(db), metadata) == []
    engine.dispose()


@contextmanager
def _closing(store: VoteStore) -> Iterator[VoteStore]:
    yield store
    store.close()


def test_a_broken_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "votes.sqlite"
    file.write_bytes(b"not a database" * 1000)
    with pytest.raises(InputError, match="not a database"):
        VoteStore(sqlite_url(file), tiny_design())


def test_a_database_lost_while_serving_is_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "votes.sqlite"
    with _closing(VoteStore(sqlite_url(file), tiny_design())) as store:
        store.close()
        for name in tmp_path.iterdir():
            name.unlink()
        file.write_bytes(b"overwritten" * 1000)
        with pytest.raises(DatabaseDown):
            store.ping()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "not a database URL"),
        ("mysql://host/db", "not supported"),
        ("postgresql+psycopg://nobody@127.0.0.1:9/none", "refused"),
    ],
)
def test_a_wrong_url_is_one_line(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        VoteStore(url, tiny_design())
