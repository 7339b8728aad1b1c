"""What stands out of each segment, so that a long run is drawn without reading it whole.

An addition alone, and one that can be made again from the segments: servers of the release before
go on while one of this release starts, and what they pack has an overview later.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table."""
    identifier = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "overviews",
        sa.Column("run_id", identifier, nullable=False),
        sa.Column("last_seq", sa.BigInteger, nullable=False),
        sa.Column("checksum", sa.Text, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "last_seq", name="pk_overviews"),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.id"], name="fk_overviews_run_id", ondelete="CASCADE"
        ),
    )
