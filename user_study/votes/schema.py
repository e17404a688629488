"""The tables. ``migrations/`` makes them; a test holds that both say the same.

A rater meets a pair once in each kind, an assignment has one vote, a vote attempt has one key: UNIQUE constraints say
so, whatever the code does. ``event`` is append-only (triggers refuse the rest) and keeps what undo takes back.
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData(naming_convention={"uq": "uq_%(table_name)s_%(column_0_N_name)s"})

study = sa.Table(
    "study",
    metadata,
    sa.Column("design_hash", sa.String(64), primary_key=True),
    sa.Column("paused", sa.Boolean, nullable=False),
)
rater = sa.Table(
    "rater",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),  # random, says nothing about the person
    sa.Column("invited", sa.Boolean, nullable=False),
    sa.Column("language", sa.String(8), nullable=False),
    sa.Column("joined_at", sa.String(32), nullable=False),
    sa.Column("consented_at", sa.String(32), nullable=False),  # empty before
    sa.Column("began_at", sa.String(32), nullable=False),  # when the instructions were read; empty before
)
assignment = sa.Table(
    "assignment",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("rater_id", sa.String(32), sa.ForeignKey("rater.id"), nullable=False),
    sa.Column("pair_id", sa.String(16), nullable=False),
    sa.Column("kind", sa.String(8), nullable=False),
    sa.Column("a_side", sa.String(5), nullable=False),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("propensity", sa.Float, nullable=False),
    sa.Column("state", sa.String(8), nullable=False),  # open, voted, surplus (voted, beyond the quota), released
    sa.Column("assigned_at", sa.String(32), nullable=False),
    sa.Column("expires_at", sa.String(32), nullable=False),
    sa.UniqueConstraint("rater_id", "pair_id", "kind"),
    sa.UniqueConstraint("rater_id", "position"),
    sa.Index("ix_assignment_load", "kind", "state", "expires_at", "pair_id"),  # all that the load of pairs reads
)
vote = sa.Table(
    "vote",
    metadata,
    sa.Column("assignment_id", sa.String(32), sa.ForeignKey("assignment.id"), primary_key=True),
    sa.Column("key", sa.String(40), nullable=False, unique=True),  # of the attempt; the browser draws it
    sa.Column("design_hash", sa.String(64), nullable=False),
    sa.Column("response_ms", sa.Integer, nullable=False),
    sa.Column("hidden_ms", sa.Integer, nullable=False),
    sa.Column("language", sa.String(8), nullable=False),
    sa.Column("input", sa.String(8), nullable=False),
    sa.Column("viewport", sa.String(16), nullable=False),
    sa.Column("pixel_ratio", sa.Float, nullable=False),
    sa.Column("voted_at", sa.String(32), nullable=False),
)
answer = sa.Table(
    "answer",
    metadata,
    sa.Column("assignment_id", sa.String(32), sa.ForeignKey("vote.assignment_id"), primary_key=True),
    sa.Column("criterion", sa.String(32), primary_key=True),
    sa.Column("choice", sa.String(8), nullable=False),
)
event = sa.Table(
    "event",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.String(32), nullable=False),
    sa.Column("kind", sa.String(12), nullable=False),
    sa.Column("rater_id", sa.String(32)),
    sa.Column("assignment_id", sa.String(32)),
    sa.Column("key", sa.String(40)),
    sa.Column("detail", sa.Text, nullable=False),  # JSON
    sa.UniqueConstraint("kind", "key"),
)
