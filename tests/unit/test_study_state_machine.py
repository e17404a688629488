"""Many raters, retries, crashes, expiring leases, undo and pauses in any order: what must hold, holds throughout."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.tiny_design import tiny_design
from user_study.assignment import Given, kinds_of, side_balance
from user_study.votes import Ballot, Turn, UnknownAssignment, VoteStore
from user_study.votes.database import sqlite_url

QUOTA = 2
LEASE = 10
CHOICES = st.sampled_from(["left", "right", "tie", "both-bad"])


class Study(RuleBasedStateMachine):
    """A small study with quotas, gold, repeats and practice, and a model of what it has acknowledged."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.raters: list[str] = []
        self.turns: dict[str, Turn] = {}  # what each rater's browser shows, perhaps stale
        self.sent: list[tuple[str, Ballot]] = []
        self.counted: dict[str, Ballot] = {}  # by assignment: what the server has acknowledged and not taken back
        self.store: VoteStore

    @initialize(
        num_prompts=st.integers(1, 5),
        gold_every=st.sampled_from([0, 3]),
        repeat_every=st.sampled_from([0, 4]),
        policy=st.sampled_from(["balanced", "adaptive"]),
    )
    def start(self, num_prompts: int, gold_every: int, repeat_every: int, policy: str) -> None:
        self.design = tiny_design(
            num_prompts,
            num_gold=20,
            num_practice=1,
            practice=1,
            gold_every=gold_every,
            repeat_every=repeat_every,
            policy=policy,
            votes_per_pair=QUOTA,
            lease_minutes=LEASE,
            pairs_per_rater=6,
        )
        self.open()

    def open(self) -> None:
        self.store = VoteStore(sqlite_url(self.folder / "votes.sqlite"), self.design, lambda: self.now)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
        shutil.rmtree(self.folder)

    @precondition(lambda self: len(self.raters) < 5)
    @rule()
    def join(self) -> None:
        rater = self.store.join()
        self.store.consent(rater, "en")
        self.raters.append(rater)
        self.turns[rater] = self.store.begin(rater)

    @precondition(lambda self: self.raters)
    @rule(data=st.data())
    def refresh(self, data: Any) -> None:
        rater = data.draw(st.sampled_from(self.raters))
        self.turns[rater] = self.store.turn(rater)

    @precondition(lambda self: any(turn.items for turn in self.turns.values()))
    @rule(data=st.data(), choice=CHOICES, keep_page=st.booleans(), second=st.booleans())
    def vote(self, data: Any, choice: Any, keep_page: bool, second: bool) -> None:
        rater = data.draw(st.sampled_from([rater for rater, turn in self.turns.items() if turn.items]))
        items = self.turns[rater].items
        item = items[-1] if second else items[0]
        ballot = Ballot(f"key-{len(self.sent):016d}", item.assignment_id, {"overall": choice}, 900)
        self.sent.append((rater, ballot))
        self.send(rater, ballot, keep_page, first=True)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def send_again(self, data: Any) -> None:
        rater, ballot = data.draw(st.sampled_from(self.sent))
        before = dict(self.counted)
        self.send(rater, ballot, keep_page=True, first=False)
        assert self.counted == before

    def send(self, rater: str, ballot: Ballot, keep_page: bool, first: bool) -> None:
        recorded, turn = self.store.vote(rater, ballot)
        if first:
            self.counted.setdefault(ballot.assignment_id, ballot)
        expected = self.counted.get(ballot.assignment_id)
        assert dict(recorded.choices) == (dict(expected.choices) if expected else {})
        if not keep_page:  # a tab that did not get the answer goes on showing what it showed
            self.turns[rater] = turn

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def undo(self, data: Any) -> None:
        rater, ballot = data.draw(st.sampled_from(self.sent))
        counts = self.counted.get(ballot.assignment_id)
        allowed = self.store.turn(rater).undo == ballot.key
        self.turns[rater] = self.store.undo(rater, ballot.key)
        if allowed:
            assert counts is not None
            assert counts.key == ballot.key
            del self.counted[counts.assignment_id]

    @precondition(lambda self: self.sent and len(self.raters) > 1)
    @rule(data=st.data())
    def vote_for_somebody_else(self, data: Any) -> None:
        rater, ballot = data.draw(st.sampled_from(self.sent))
        other = data.draw(st.sampled_from([name for name in self.raters if name != rater]))
        try:
            self.store.vote(other, ballot)
        except UnknownAssignment:
            return
        raise AssertionError("a vote on somebody else's pair was taken")

    @rule(minutes=st.sampled_from([1, 4, LEASE + 1]))
    def wait(self, minutes: int) -> None:
        self.now += timedelta(minutes=minutes)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.open()

    @rule(paused=st.booleans())
    def pause(self, paused: bool) -> None:
        self.store.set_paused(paused)

    @invariant()
    def every_acknowledged_vote_is_there_once(self) -> None:
        votes = self.store.votes() if hasattr(self, "store") else []
        assert {vote.assignment_id: dict(vote.choices) for vote in votes} == {
            assignment: dict(ballot.choices) for assignment, ballot in self.counted.items()
        }
        assert len(votes) == len(self.counted)

    @invariant()
    def quotas_are_never_exceeded(self) -> None:
        if not hasattr(self, "store"):
            return
        counted = Counter(vote.pair_id for vote in self.store.votes() if vote.kind == "main" and not vote.surplus)
        now = self.now.isoformat(timespec="milliseconds")
        released = {event["assignment_id"] for event in self.store.events() if event["kind"] == "released"}
        live = Counter(
            row.pair_id
            for row in self.store.assignments()
            if row.kind == "main" and not row.voted and row.expires_at > now and row.id not in released
        )
        assert all((counted + live)[pair.id] <= QUOTA for pair in self.design.pairs)

    @invariant()
    def each_rater_sees_a_pair_once_with_sides_even_and_checks_at_their_rate(self) -> None:
        rows = self.store.assignments() if hasattr(self, "store") else []
        for rater in self.raters:
            mine = [row for row in rows if row.rater == rater]
            assert [row.position for row in mine] == list(range(len(mine)))
            assert len({(row.pair_id, row.kind) for row in mine}) == len(mine)
            given = [Given(row.pair_id, row.kind, row.a_side, row.position) for row in mine]
            assert all(abs(difference) <= 1 for difference in side_balance(self.design, given).values())
            for row, kind in zip(mine, kinds_of(self.design, rater), strict=False):
                assert row.kind == kind or (kind == "repeat" and row.kind == "main")
            first = {row.pair_id: row for row in mine if row.kind == "main"}
            for row in mine:
                if row.kind == "repeat":
                    assert first[row.pair_id].a_side != row.a_side
                    assert first[row.pair_id].position < row.position


TestStudy = Study.TestCase
TestStudy.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
