"""The tables of the SQL store as this release wants them.

A change here needs a migration in `migrations/versions` that leads to the same tables, and a
golden database of the form before it.
"""

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
)

REVISION = "0003"
"""The revision of the tables below; servers on PostgreSQL tell each other theirs."""

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
    }
)

# SQLite numbers rows by itself only where the type is exactly INTEGER.
_RUN_ID = BigInteger().with_variant(Integer, "sqlite")

runs = Table(
    "runs",
    metadata,
    Column("id", _RUN_ID, primary_key=True),
    # Names are ordered by code point; SQLite does so unasked.
    Column(
        "name",
        Text().with_variant(Text(collation="C"), "postgresql"),
        nullable=False,
        unique=True,
    ),
    Column("created_at_ns", BigInteger, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("run_id", _RUN_ID, ForeignKey(runs.c.id), primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("payload", LargeBinary, nullable=False),
    Column("digest", Text, nullable=False),
    Column("recorded_at_ns", BigInteger, nullable=False),
)

segments = Table(
    "segments",
    metadata,
    Column("run_id", _RUN_ID, ForeignKey(runs.c.id, ondelete="CASCADE"), primary_key=True),
    Column("last_seq", BigInteger, primary_key=True, autoincrement=False),
    Column("first_seq", BigInteger, nullable=False),
    # Names the content, so that one who has unpacked it need not read it again.
    Column("checksum", Text, nullable=False),
    Column("data", LargeBinary, nullable=False),
)
"""Old rows of a log, packed; the rest of it is in `events`, its last row always."""

overviews = Table(
    "overviews",
    metadata,
    Column("run_id", _RUN_ID, ForeignKey(runs.c.id, ondelete="CASCADE"), primary_key=True),
    Column("last_seq", BigInteger, primary_key=True, autoincrement=False),
    # Of the segment that it is an overview of.
    Column("checksum", Text, nullable=False),
    Column("data", LargeBinary, nullable=False),
)
"""What stands out of a segment. Beside it and not in it, so that all of a run are read at once."""

snapshots = Table(
    "snapshots",
    metadata,
    Column("run_id", _RUN_ID, ForeignKey(runs.c.id, ondelete="CASCADE"), primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("digest", Text, nullable=False),
    Column("floor", BigInteger, nullable=False),
    Column("data", LargeBinary, nullable=False),
)
