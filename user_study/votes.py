"""Raters, assignments and votes: the study's only SQL, and the place where a vote is counted exactly once.

One transaction records a vote and hands out the next pair. A rater meets a pair once (UNIQUE), an assignment has one
vote (its primary key), and the first vote stays: whoever sends it again gets the same answer.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import sqlalchemy as sa

from hypersd_bench.errors import InputError
from user_study.assignment import Side, next_pair
from user_study.design import Design

Choice = Literal["left", "right", "tie"]
SCHEMA_VERSION = 1

_schema = sa.MetaData()
_study = sa.Table(
    "study", _schema, sa.Column("design_hash", sa.String, primary_key=True), sa.Column("version", sa.Integer)
)
_image = sa.Table(
    "image",
    _schema,
    sa.Column("id", sa.String, primary_key=True),  # opaque; all that a browser ever sees of an image's origin
    sa.Column("pair_id", sa.String, nullable=False),
    sa.Column("arm", sa.String, nullable=False),  # "a" or "b"
    sa.UniqueConstraint("pair_id", "arm"),
)
_rater = sa.Table(
    "rater",
    _schema,
    sa.Column("id", sa.String, primary_key=True),  # random, says nothing about the person
    sa.Column("token_hash", sa.String, nullable=False, unique=True),
    sa.Column("joined_at", sa.String, nullable=False),
)
_assignment = sa.Table(
    "assignment",
    _schema,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("rater_id", sa.ForeignKey("rater.id"), nullable=False),
    sa.Column("pair_id", sa.String, nullable=False, index=True),
    sa.Column("a_side", sa.String, nullable=False),
    sa.Column("assigned_at", sa.String, nullable=False),
    sa.UniqueConstraint("rater_id", "pair_id"),
)
_vote = sa.Table(
    "vote",
    _schema,
    sa.Column("assignment_id", sa.ForeignKey("assignment.id"), primary_key=True),
    sa.Column("choice", sa.String, nullable=False),
    sa.Column("response_ms", sa.Integer, nullable=False),
    sa.Column("voted_at", sa.String, nullable=False),
)


class UnknownAssignment(Exception):
    """The assignment does not exist, or is somebody else's."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What a rater sees next: image ids are opaque; ``assignment_id`` is None when all pairs are done."""

    done: int
    total: int
    assignment_id: str | None = None
    prompt: str = ""
    left: str = ""
    right: str = ""


@dataclass(frozen=True, slots=True)
class VoteRow:
    """One vote as stored; ``a_side`` is where the pair's image ``a`` was."""

    rater: str
    pair_id: str
    a_side: Side
    choice: Choice
    response_ms: int
    voted_at: str


class VoteStore:
    """The votes of one design in one SQLite file (WAL); safe for many threads, and for kill -9 at any moment."""

    def __init__(self, path: Path, design: Design) -> None:
        """Open the file, or create it; raises InputError when it belongs to another design or program version."""
        self.path = path
        self.design = design
        self._pairs = {pair.id: pair for pair in design.pairs}
        self._lock = Lock()  # one writer at a time here costs less than writers waiting for each other in SQLite
        self._engine = _make_engine(path)
        try:
            self._claim()
        except InputError:
            self.close()
            raise

    def _claim(self) -> None:
        """Write into the file which design it belongs to, or read that it is this one."""
        ours = (self.design.hash, SCHEMA_VERSION)
        with self._transaction() as db:
            _schema.create_all(db)
            found = db.execute(sa.select(_study)).one_or_none()
            if found is None:
                db.execute(sa.insert(_study).values(ours))
        if found is not None and tuple(found) != ours:
            raise InputError(
                f"{self.path} holds votes on another design, or of another version; "
                f"put the design back that they were given on, or move {self.path.parent} away to start a new study"
            )

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def ping(self) -> None:
        """Raise unless the database answers."""
        with self._transaction() as db:
            db.execute(sa.select(_study)).one()

    def add_images(self, ids: Sequence[tuple[str, str, str]]) -> None:
        """Enter (opaque id, pair id, "a" or "b") for all images at once."""
        with self._transaction() as db:
            db.execute(sa.insert(_image), [dict(zip(("id", "pair_id", "arm"), row, strict=True)) for row in ids])

    def image_ids(self) -> dict[tuple[str, str], str]:
        """Opaque ids by (pair id, arm); empty before the images are published."""
        with self._transaction() as db:
            return {(row.pair_id, row.arm): row.id for row in db.execute(sa.select(_image))}

    def join(self) -> str:
        """Enter a new rater; returns the secret token, of which only a hash is kept."""
        token = secrets.token_urlsafe(32)
        row = {"id": secrets.token_hex(8), "token_hash": _hashed(token), "joined_at": _now()}
        with self._transaction() as db:
            db.execute(sa.insert(_rater).values(row))
        return token

    def rater(self, token: str) -> str | None:
        """The id of the rater who holds this token, if any."""
        with self._transaction() as db:
            return db.scalar(sa.select(_rater.c.id).where(_rater.c.token_hash == _hashed(token)))

    def turn(self, rater_id: str) -> Turn:
        """The rater's open pair, or the next one; asking again changes nothing."""
        with self._transaction() as db:
            return self._turn(db, rater_id)

    def vote(self, rater_id: str, assignment_id: str, choice: Choice, response_ms: int) -> tuple[Choice, Turn]:
        """Record a vote unless there is one; returns the choice that counts (the first) and the rater's next turn.

        Raises UnknownAssignment when the assignment is not this rater's.
        """
        vote = {
            "assignment_id": assignment_id,
            "choice": choice,
            "response_ms": response_ms,
            "voted_at": _now(),
        }
        with self._transaction() as db:
            owner = db.scalar(sa.select(_assignment.c.rater_id).where(_assignment.c.id == assignment_id))
            if owner != rater_id:
                raise UnknownAssignment(assignment_id)
            mine = _vote.c.assignment_id == assignment_id
            if db.scalar(sa.select(_vote.c.choice).where(mine)) is None:
                db.execute(sa.insert(_vote).values(vote))
            return db.execute(sa.select(_vote.c.choice).where(mine)).scalar_one(), self._turn(db, rater_id)

    def votes(self) -> list[VoteRow]:
        """All votes, in the order they were given."""
        query = (
            sa.select(
                _assignment.c.rater_id,
                _assignment.c.pair_id,
                _assignment.c.a_side,
                _vote.c.choice,
                _vote.c.response_ms,
                _vote.c.voted_at,
            )
            .join_from(_vote, _assignment)
            .order_by(_vote.c.voted_at, _assignment.c.id)
        )
        with self._transaction() as db:
            return [VoteRow(*row) for row in db.execute(query)]

    def _turn(self, db: sa.Connection, rater_id: str) -> Turn:
        mine = db.execute(
            sa.select(_assignment.c.id, _assignment.c.pair_id, _assignment.c.a_side, _vote.c.choice)
            .join_from(_assignment, _vote, isouter=True)
            .where(_assignment.c.rater_id == rater_id)
        ).all()
        done, total = sum(row.choice is not None for row in mine), len(self._pairs)
        for row in mine:
            if row.choice is None:
                return self._show(db, row.id, row.pair_id, row.a_side, done)
        coverage = db.execute(sa.select(_assignment.c.pair_id, sa.func.count()).group_by(_assignment.c.pair_id))
        counts = {pair_id: int(count) for pair_id, count in coverage}
        chosen = next_pair(self.design.pairs, counts, {row.pair_id: row.a_side for row in mine}, rater_id)
        if chosen is None:
            return Turn(done, total)
        pair, a_side = chosen
        assignment_id = secrets.token_urlsafe(16)
        db.execute(sa.insert(_assignment).values((assignment_id, rater_id, pair.id, a_side, _now())))
        return self._show(db, assignment_id, pair.id, a_side, done)

    def _show(self, db: sa.Connection, assignment_id: str, pair_id: str, a_side: Side, done: int) -> Turn:
        rows = db.execute(sa.select(_image.c.arm, _image.c.id).where(_image.c.pair_id == pair_id))
        image = {row.arm: row.id for row in rows}
        left, right = (image["a"], image["b"]) if a_side == "left" else (image["b"], image["a"])
        return Turn(done, len(self._pairs), assignment_id, self._pairs[pair_id].prompt, left, right)

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        try:
            with self._lock, self._engine.begin() as db:
                yield db
        except sa.exc.DatabaseError as error:
            raise InputError(f"{self.path}: {error.orig}") from error


def _make_engine(path: Path) -> sa.Engine:
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _: object) -> None:
        connection.isolation_level = None  # the driver begins no transactions of its own; the next listener does
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA foreign_keys=ON")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # the write lock first: no upgrade can fail half-way

    return engine


def _hashed(token: str) -> str:
    return sha256(token.encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
