"""The first tables, and the triggers that keep events as they were written."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_REFUSAL = "events are append-only"


def upgrade() -> None:
    """Make all tables."""
    op.create_table(
        "study",
        sa.Column("design_hash", sa.String(64), primary_key=True),
        sa.Column("paused", sa.Boolean, nullable=False),
    )
    op.create_table(
        "rater",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("invited", sa.Boolean, nullable=False),
        sa.Column("language", sa.String(8), nullable=False),
        sa.Column("joined_at", sa.String(32), nullable=False),
        sa.Column("consented_at", sa.String(32), nullable=False),
        sa.Column("began_at", sa.String(32), nullable=False),
    )
    op.create_table(
        "assignment",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("rater_id", sa.String(32), sa.ForeignKey("rater.id"), nullable=False),
        sa.Column("pair_id", sa.String(16), nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("a_side", sa.String(5), nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("propensity", sa.Float, nullable=False),
        sa.Column("state", sa.String(8), nullable=False),
        sa.Column("assigned_at", sa.String(32), nullable=False),
        sa.Column("expires_at", sa.String(32), nullable=False),
        sa.UniqueConstraint("rater_id", "pair_id", "kind", name="uq_assignment_rater_id_pair_id_kind"),
        sa.UniqueConstraint("rater_id", "position", name="uq_assignment_rater_id_position"),
    )
    op.create_index("ix_assignment_load", "assignment", ["kind", "state", "expires_at", "pair_id"])
    op.create_table(
        "vote",
        sa.Column("assignment_id", sa.String(32), sa.ForeignKey("assignment.id"), primary_key=True),
        sa.Column("key", sa.String(40), nullable=False),
        sa.Column("design_hash", sa.String(64), nullable=False),
        sa.Column("response_ms", sa.Integer, nullable=False),
        sa.Column("hidden_ms", sa.Integer, nullable=False),
        sa.Column("language", sa.String(8), nullable=False),
        sa.Column("input", sa.String(8), nullable=False),
        sa.Column("viewport", sa.String(16), nullable=False),
        sa.Column("pixel_ratio", sa.Float, nullable=False),
        sa.Column("voted_at", sa.String(32), nullable=False),
        sa.UniqueConstraint("key", name="uq_vote_key"),
    )
    op.create_table(
        "answer",
        sa.Column("assignment_id", sa.String(32), sa.ForeignKey("vote.assignment_id"), primary_key=True),
        sa.Column("criterion", sa.String(32), primary_key=True),
        sa.Column("choice", sa.String(8), nullable=False),
    )
    op.create_table(
        "event",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at", sa.String(32), nullable=False),
        sa.Column("kind", sa.String(12), nullable=False),
        sa.Column("rater_id", sa.String(32)),
        sa.Column("assignment_id", sa.String(32)),
        sa.Column("key", sa.String(40)),
        sa.Column("detail", sa.Text, nullable=False),
        sa.UniqueConstraint("kind", "key", name="uq_event_kind_key"),
    )
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            "CREATE FUNCTION event_append_only() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION '{_REFUSAL}'; END $$"
        )
        op.execute(
            "CREATE TRIGGER event_append_only BEFORE UPDATE OR DELETE ON event "
            "FOR EACH ROW EXECUTE FUNCTION event_append_only()"
        )
        return
    for verb in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER event_no_{verb.lower()} BEFORE {verb} ON event "
            f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END"
        )


def downgrade() -> None:
    """There is nothing before the first tables."""
    raise NotImplementedError("votes are never thrown away by a migration")
