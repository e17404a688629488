"""Votes and assignments of one design: handing out pairs, recording votes exactly once, taking the last one back.

One transaction records a vote and hands out the next pair. A pair handed out is leased: it counts towards its quota
until the lease ends, then others may get it. Whoever comes back late keeps the pair while it has room, and a vote that
comes later still is kept as surplus. Nothing that was written is ever lost: ``event`` keeps all of it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Any, Literal

import sqlalchemy as sa

from hypersd_bench.errors import InputError
from user_study.assignment import Given, Item, Tally, kinds_of, next_item
from user_study.design import Choice, Design, Kind, Side
from user_study.records import AssignmentRow, RaterRow, VoteRow
from user_study.votes.database import Database
from user_study.votes.schema import answer, assignment, event, rater, study, vote

Phase = Literal["consent", "instructions", "practice", "rating", "paused", "finished"]
AHEAD = 2  # pairs a rater holds: the one on show and the one to load meanwhile
_PAUSE_MS = 1000  # between two pairs, for the time left


class UnknownAssignment(Exception):
    """The assignment does not exist, or is somebody else's."""


class UnknownRater(Exception):
    """No such rater in this database."""


class NotConsented(Exception):
    """The rater has not agreed to take part yet."""


@dataclass(frozen=True, slots=True)
class Ballot:
    """A vote as it arrives. key: drawn by the sender for this attempt; the same key is the same vote."""

    key: str
    assignment_id: str
    choices: Mapping[str, Choice]
    response_ms: int
    hidden_ms: int = 0
    language: str = "en"
    input: str = "key"
    viewport: str = ""
    pixel_ratio: float = 1.0


@dataclass(frozen=True, slots=True)
class TurnItem:
    """A pair on its way to a rater; a_side says where image ``a`` goes."""

    assignment_id: str
    pair_id: str
    kind: Kind
    a_side: Side


@dataclass(frozen=True, slots=True)
class Turn:
    """Where a rater stands. items: what to show now and what comes after it. undo: key of the vote to take back."""

    phase: Phase
    done: int = 0
    total: int = 0
    practice_done: int = 0
    practice_total: int = 0
    seconds_left: int | None = None
    undo: str | None = None
    items: tuple[TurnItem, ...] = ()


@dataclass(frozen=True, slots=True)
class Recorded:
    """What counts for an assignment now: the first vote's choices, and for practice on which side the better one is."""

    assignment_id: str
    choices: Mapping[str, Choice]
    better: Side | None


class VoteStore:
    """The votes on one design; safe for many threads and processes, and for kill -9 at any moment."""

    def __init__(self, url: str, design: Design, clock: Callable[[], datetime] | None = None) -> None:
        """Open the database at ``url``, or make it; raises InputError when it holds votes on another design."""
        self.design = design
        self._clock = clock or (lambda: datetime.now(UTC))
        self._lease = timedelta(minutes=design.session.lease_minutes)
        self._database = Database(url)
        try:
            self._claim()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all connections."""
        self._database.close()

    def ping(self) -> None:
        """Raise DatabaseDown unless the database answers."""
        with self._database.reading() as db:
            db.execute(sa.select(study)).one()

    def paused(self) -> bool:
        """Whether no pairs are handed out at present."""
        with self._database.reading() as db:
            return bool(db.scalar(sa.select(study.c.paused)))

    def set_paused(self, paused: bool) -> None:
        """Stop handing out pairs, or go on; votes on pairs that are out are taken either way."""
        with self._database.writing() as db:
            db.execute(sa.update(study).values(paused=paused))
            self._log(db, "paused" if paused else "resumed")

    def join(self, rater_id: str | None = None, language: str = "") -> str:
        """Enter a rater and return the id; a known ``rater_id`` (an invited rater's) changes nothing."""
        invited = rater_id is not None
        rater_id = rater_id or secrets.token_hex(8)
        with self._database.writing() as db:
            if db.scalar(sa.select(rater.c.id).where(rater.c.id == rater_id)) is None:
                row = (rater_id, invited, language, self._now(), "", "")
                db.execute(sa.insert(rater).values(row))
                self._log(db, "joined", rater_id, invited=invited)
        return rater_id

    def language(self, rater_id: str) -> str | None:
        """The language the rater chose, "" before a choice; None for an unknown rater."""
        with self._database.reading() as db:
            return db.scalar(sa.select(rater.c.language).where(rater.c.id == rater_id))

    def set_language(self, rater_id: str, language: str) -> None:
        """Keep the language that the rater chose."""
        with self._database.writing() as db:
            self._know(db, rater_id)
            db.execute(sa.update(rater).where(rater.c.id == rater_id).values(language=language))

    def consent(self, rater_id: str, language: str) -> Turn:
        """Note that the rater agreed to take part, having read the consent in this language."""
        with self._database.writing() as db:
            if not self._know(db, rater_id).consented_at:
                values = {"consented_at": self._now(), "language": language}
                db.execute(sa.update(rater).where(rater.c.id == rater_id).values(values))
                self._log(db, "consented", rater_id, language=language)
            return self._turn(db, rater_id)

    def begin(self, rater_id: str) -> Turn:
        """Note that the rater has read the instructions."""
        with self._database.writing() as db:
            known = self._know(db, rater_id)
            if not known.consented_at:
                raise NotConsented
            if not known.began_at:
                db.execute(sa.update(rater).where(rater.c.id == rater_id).values(began_at=self._now()))
                self._log(db, "began", rater_id)
            return self._turn(db, rater_id)

    def turn(self, rater_id: str) -> Turn:
        """Where the rater stands, with the pairs to show; asking again changes nothing but leases."""
        with self._database.writing() as db:
            return self._turn(db, rater_id)

    def vote(self, rater_id: str, ballot: Ballot) -> tuple[Recorded, Turn]:
        """Record a vote unless the assignment has one; returns the choices that count and the rater's next turn.

        A key that was used before, by a vote since taken back, records nothing: it is a late copy. Raises
        UnknownAssignment when the assignment is not this rater's.
        """
        with self._database.writing() as db:
            self._know(db, rater_id)
            row = self._mine(db, rater_id, ballot.assignment_id)
            used = db.scalar(sa.select(event.c.seq).where(event.c.kind == "voted", event.c.key == ballot.key))
            if row.state in ("open", "released") and used is None:
                self._record(db, row, ballot)
            return self._recorded(db, row), self._turn(db, rater_id)

    def undo(self, rater_id: str, key: str) -> Turn:
        """Take back the rater's last vote if ``key`` is its key; anything else is a late copy and changes nothing."""
        with self._database.writing() as db:
            self._know(db, rater_id)
            last = self._last_vote(db, rater_id)
            if last is not None and last.key == key:
                choices = self._choices(db, last.assignment_id)
                mine = vote.c.assignment_id == last.assignment_id
                db.execute(sa.delete(answer).where(answer.c.assignment_id == last.assignment_id))
                db.execute(sa.delete(vote).where(mine))
                self._set_state(db, last.assignment_id, state="open", expires_at=self._expiry())
                self._log(db, "undone", rater_id, last.assignment_id, key, choices=choices)
            return self._turn(db, rater_id)

    def votes(self) -> list[VoteRow]:
        """All votes that count, in the order they were given."""
        joined = sa.select(assignment, vote).join_from(vote, assignment).order_by(vote.c.voted_at, assignment.c.id)
        with self._database.reading() as db:
            choices: dict[str, dict[str, Choice]] = {}
            for assignment_id, criterion, choice in db.execute(sa.select(answer)):
                choices.setdefault(assignment_id, {})[criterion] = choice
            return [_vote_row(row, choices[row.id]) for row in db.execute(joined)]

    def assignments(self) -> list[AssignmentRow]:
        """All pairs that were handed out, in the order of raters and positions."""
        with self._database.reading() as db:
            rows = db.execute(sa.select(assignment).order_by(assignment.c.rater_id, assignment.c.position))
            return [_assignment_row(row) for row in rows]

    def raters(self) -> list[RaterRow]:
        """All raters, in the order they joined."""
        with self._database.reading() as db:
            rows = db.execute(sa.select(rater).order_by(rater.c.joined_at, rater.c.id))
            return [RaterRow(row.id, row.invited, row.language, row.joined_at, row.consented_at) for row in rows]

    def events(self) -> list[dict[str, Any]]:
        """Everything that happened, oldest first; what was undone is here too."""
        with self._database.reading() as db:
            return [dict(row._mapping) for row in db.execute(sa.select(event).order_by(event.c.seq))]

    def _claim(self) -> None:
        """Write into the database which design it belongs to, or read that it is this one."""
        with self._database.writing() as db:
            found = db.scalar(sa.select(study.c.design_hash))
            if found is None:
                db.execute(sa.insert(study).values((self.design.hash, False)))
        if found not in (None, self.design.hash):
            raise InputError(
                f"{self._database.name} holds votes on another design ({found[:12]}, not {self.design.hash[:12]}); "
                f"put back the design they were given on, or use an empty database for the new study"
            )

    def _turn(self, db: sa.Connection, rater_id: str) -> Turn:
        known = self._know(db, rater_id)
        if not known.consented_at:
            return Turn("consent")
        if not known.began_at:
            return Turn("instructions")
        paused = bool(db.scalar(sa.select(study.c.paused)))
        mine = sa.select(assignment).where(assignment.c.rater_id == rater_id).order_by(assignment.c.position)
        rows = [dict(row) for row in db.execute(mine).mappings()]
        if not paused:
            self._renew(db, rows)
            self._hand_out(db, rater_id, rows)
        return self._standing(db, rater_id, rows, paused)

    def _renew(self, db: sa.Connection, rows: Sequence[dict[str, Any]]) -> None:
        """Extend leases that ended while their pairs have room; release the pairs that others have filled."""
        late = [row for row in rows if row["state"] == "open" and row["expires_at"] <= self._now()]
        quota = self.design.session.votes_per_pair
        load = self._load(db) if late else {}
        for row in late:
            full = row["kind"] == "main" and quota is not None and load.get(row["pair_id"], 0) >= quota
            change = {"state": "released"} if full else {"expires_at": self._expiry()}
            row.update(change)
            self._set_state(db, row["id"], **change)
            self._log(db, "released" if full else "renewed", row["rater_id"], row["id"])

    def _hand_out(self, db: sa.Connection, rater_id: str, rows: list[dict[str, Any]]) -> None:
        """Fill up the pairs that the rater holds."""
        design, adaptive = self.design, self.design.session.policy == "adaptive"
        load: dict[str, int] | None = None
        while sum(row["state"] == "open" for row in rows) < AHEAD and len(rows) < len(kinds_of(design, rater_id)):
            load = self._load(db) if load is None else load
            given = [
                Given(row["pair_id"], row["kind"], row["a_side"], row["position"], row["state"] == "released")
                for row in rows
            ]
            item = next_item(design, rater_id, given, load, self._tallies(db) if adaptive else None)
            if item is None:
                return
            rows.append(self._assign(db, rater_id, item, len(rows)))
            load[item.pair.id] = load.get(item.pair.id, 0) + 1

    def _assign(self, db: sa.Connection, rater_id: str, item: Item, position: int) -> dict[str, Any]:
        row: dict[str, Any] = {
            "id": secrets.token_urlsafe(16),
            "rater_id": rater_id,
            "pair_id": item.pair.id,
            "kind": item.kind,
            "a_side": item.a_side,
            "position": position,
            "propensity": item.propensity,
            "state": "open",
            "assigned_at": self._now(),
            "expires_at": self._expiry(),
        }
        db.execute(sa.insert(assignment), row)
        detail = {name: row[name] for name in ("pair_id", "a_side", "position", "propensity")}
        self._log(db, "assigned", rater_id, row["id"], **detail)
        return row

    def _standing(self, db: sa.Connection, rater_id: str, rows: Sequence[dict[str, Any]], paused: bool) -> Turn:
        held = [row for row in rows if row["state"] == "open"]
        voted = [row for row in rows if row["state"] in ("voted", "surplus")]
        kinds = kinds_of(self.design, rater_id)
        practice = sum(kind == "practice" for kind in kinds)
        practice_done = sum(row["kind"] == "practice" for row in voted)
        lost = sum(row["state"] == "released" for row in rows)
        done = len(voted) - practice_done
        total = len(kinds) - practice - lost if held or paused else done
        last = self._last_vote(db, rater_id)
        return Turn(
            phase="paused" if paused else "finished" if not held else _phase(held[0]["kind"]),
            done=done,
            total=total,
            practice_done=practice_done,
            practice_total=practice,
            seconds_left=self._seconds_left(db, rater_id, total - done),
            undo=None if last is None else last.key,
            items=() if paused else tuple(_turn_item(row) for row in held[:AHEAD]),
        )

    def _record(self, db: sa.Connection, row: Any, ballot: Ballot) -> None:
        quota = self.design.session.votes_per_pair
        surplus = False
        if row.kind == "main" and quota is not None and (row.state == "released" or row.expires_at <= self._now()):
            surplus = self._load(db).get(row.pair_id, 0) >= quota
        values = {
            "assignment_id": row.id,
            "key": ballot.key,
            "design_hash": self.design.hash,
            "response_ms": ballot.response_ms,
            "hidden_ms": ballot.hidden_ms,
            "language": ballot.language,
            "input": ballot.input,
            "viewport": ballot.viewport,
            "pixel_ratio": ballot.pixel_ratio,
            "voted_at": self._now(),
        }
        db.execute(sa.insert(vote), values)
        answers = [
            {"assignment_id": row.id, "criterion": criterion, "choice": choice}
            for criterion, choice in ballot.choices.items()
        ]
        db.execute(sa.insert(answer), answers)
        self._set_state(db, row.id, state="surplus" if surplus else "voted")
        self._log(db, "voted", row.rater_id, row.id, ballot.key, choices=dict(ballot.choices), surplus=surplus)

    def _recorded(self, db: sa.Connection, row: Any) -> Recorded:
        return Recorded(row.id, self._choices(db, row.id), row.a_side if row.kind == "practice" else None)

    def _load(self, db: sa.Connection) -> dict[str, int]:
        """Votes within the quota and live leases of each main pair."""
        live = sa.and_(assignment.c.state == "open", assignment.c.expires_at > self._now())
        query = (
            sa.select(assignment.c.pair_id, sa.func.count())
            .where(assignment.c.kind == "main", sa.or_(assignment.c.state == "voted", live))
            .group_by(assignment.c.pair_id)
        )
        return {pair_id: int(count) for pair_id, count in db.execute(query)}

    def _tallies(self, db: sa.Connection) -> dict[str, Tally]:
        """Main votes on the first criterion so far, by comparison."""
        query = (
            sa.select(assignment.c.pair_id, answer.c.choice, assignment.c.a_side, sa.func.count())
            .join_from(answer, assignment, answer.c.assignment_id == assignment.c.id)
            .where(assignment.c.kind == "main", answer.c.criterion == self.design.criteria[0])
            .group_by(assignment.c.pair_id, answer.c.choice, assignment.c.a_side)
        )
        counts: dict[str, list[int]] = {}
        for pair_id, choice, a_side, count in db.execute(query):
            mine = counts.setdefault(self.design.pair(pair_id).comparison, [0, 0, 0])
            mine[2 if choice in ("tie", "both-bad") else 0 if choice == a_side else 1] += count
        return {comparison: Tally(*mine) for comparison, mine in counts.items()}

    def _seconds_left(self, db: sa.Connection, rater_id: str, left: int) -> int | None:
        query = (
            sa.select(vote.c.response_ms)
            .join_from(vote, assignment)
            .where(assignment.c.rater_id == rater_id)
            .order_by(assignment.c.position.desc())
            .limit(20)
        )
        times = list(db.scalars(query))
        return round(left * (median(times) + _PAUSE_MS) / 1000) if len(times) >= 3 else None

    def _last_vote(self, db: sa.Connection, rater_id: str) -> Any:
        """The rater's last vote, unless it is on a practice pair, whose answer was shown."""
        query = (
            sa.select(vote.c.key, vote.c.assignment_id, assignment.c.kind)
            .join_from(vote, assignment)
            .where(assignment.c.rater_id == rater_id)
            .order_by(assignment.c.position.desc())
            .limit(1)
        )
        last = db.execute(query).one_or_none()
        return None if last is None or last.kind == "practice" else last

    def _choices(self, db: sa.Connection, assignment_id: str) -> dict[str, Choice]:
        query = sa.select(answer.c.criterion, answer.c.choice).where(answer.c.assignment_id == assignment_id)
        return {row.criterion: row.choice for row in db.execute(query)}

    def _mine(self, db: sa.Connection, rater_id: str, assignment_id: str) -> Any:
        row = db.execute(sa.select(assignment).where(assignment.c.id == assignment_id)).one_or_none()
        if row is None or row.rater_id != rater_id:
            raise UnknownAssignment(assignment_id)
        return row

    def _know(self, db: sa.Connection, rater_id: str) -> Any:
        known = db.execute(sa.select(rater).where(rater.c.id == rater_id)).one_or_none()
        if known is None:
            raise UnknownRater(rater_id)
        return known

    def _set_state(self, db: sa.Connection, assignment_id: str, **values: str) -> None:
        db.execute(sa.update(assignment).where(assignment.c.id == assignment_id).values(values))

    def _log(
        self,
        db: sa.Connection,
        kind: str,
        rater_id: str | None = None,
        assignment_id: str | None = None,
        key: str | None = None,
        **detail: Any,
    ) -> None:
        values = {"at": self._now(), "kind": kind, "rater_id": rater_id, "assignment_id": assignment_id, "key": key}
        db.execute(sa.insert(event), {**values, "detail": json.dumps(detail, sort_keys=True)})

    def _now(self) -> str:
        return _stamp(self._clock())

    def _expiry(self) -> str:
        return _stamp(self._clock() + self._lease)


def _stamp(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")


def _phase(kind: Kind) -> Phase:
    return "practice" if kind == "practice" else "rating"


def _turn_item(row: Mapping[str, Any]) -> TurnItem:
    return TurnItem(row["id"], row["pair_id"], row["kind"], row["a_side"])


def _vote_row(row: Any, choices: Mapping[str, Choice]) -> VoteRow:
    return VoteRow(
        rater=row.rater_id,
        assignment_id=row.id,
        pair_id=row.pair_id,
        kind=row.kind,
        a_side=row.a_side,
        choices=choices,
        position=row.position,
        propensity=row.propensity,
        surplus=row.state == "surplus",
        response_ms=row.response_ms,
        hidden_ms=row.hidden_ms,
        language=row.language,
        input=row.input,
        viewport=row.viewport,
        pixel_ratio=row.pixel_ratio,
        design_hash=row.design_hash,
        assigned_at=row.assigned_at,
        voted_at=row.voted_at,
    )


def _assignment_row(row: Any) -> AssignmentRow:
    return AssignmentRow(
        id=row.id,
        rater=row.rater_id,
        pair_id=row.pair_id,
        kind=row.kind,
        a_side=row.a_side,
        position=row.position,
        propensity=row.propensity,
        assigned_at=row.assigned_at,
        expires_at=row.expires_at,
        voted=row.state in ("voted", "surplus"),
    )
