"""Packed rows of long logs, and snapshots of their folds.

Only additions, so that servers of the release before go on while one of this release starts. They
know nothing of these tables: the database itself empties them when one of those deletes a run.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    identifier = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "segments",
        sa.Column("run_id", identifier, nullable=False),
        sa.Column("last_seq", sa.BigInteger, nullable=False),
        sa.Column("first_seq", sa.BigInteger, nullable=False),
        sa.Column("checksum", sa.Text, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "last_seq", name="pk_segments"),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.id"], name="fk_segments_run_id", ondelete="CASCADE"
        ),
    )
    op.create_table(
        "snapshots",
        sa.Column("run_id", identifier, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("floor", sa.BigInteger, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "seq", name="pk_snapshots"),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.id"], name="fk_snapshots_run_id", ondelete="CASCADE"
        ),
    )
