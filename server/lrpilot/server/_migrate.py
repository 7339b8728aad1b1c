"""Bringing the tables of a database up to date, or refusing it where a newer release wrote it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from lrpilot.server._store import SchemaTooNew

logger = logging.getLogger("lrpilot.server")

_MIGRATIONS = Path(__file__).parent / "migrations"


def is_newest(connection: sa.Connection) -> bool:
    """Return whether the tables are those of this release."""
    with _quiet("alembic"):
        return _revisions(connection).is_newest


@dataclass(frozen=True, slots=True)
class _Revisions:
    config: Any
    """Alembic's, with the connection."""
    known: frozenset[str]
    newest: str | None
    found: str | None
    """The revision of the database; None: it is empty."""

    @property
    def is_newest(self) -> bool:
        return self.found == self.newest


def _revisions(connection: sa.Connection) -> _Revisions:
    # Imported here, because it logs its plugins at import.
    from alembic.config import Config  # noqa: PLC0415
    from alembic.migration import MigrationContext  # noqa: PLC0415
    from alembic.script import ScriptDirectory  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    scripts = ScriptDirectory.from_config(config)
    return _Revisions(
        config,
        known=frozenset(step.revision for step in scripts.walk_revisions()),
        newest=scripts.get_current_head(),
        found=MigrationContext.configure(connection).get_current_revision(),
    )


def migrate(connection: sa.Connection, name: str) -> None:
    """Bring the tables of the database `name` up to date. Raises SchemaTooNew."""
    with _quiet("alembic"):
        from alembic.command import upgrade  # noqa: PLC0415

        revisions = _revisions(connection)
        if revisions.is_newest:
            return
        if revisions.found is not None and revisions.found not in revisions.known:
            raise SchemaTooNew(
                f"{name} is at revision {revisions.found}, written by a newer release of lrpilot; "
                f"this one knows revisions up to {revisions.newest}. Start the newer release, or "
                "restore a backup made before the upgrade"
            )
        upgrade(revisions.config, "head")
    if revisions.found is not None:
        logger.info("database upgraded from revision %s to %s", revisions.found, revisions.newest)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Hold a library's progress reports back."""
    noisy = logging.getLogger(name)
    level = noisy.level
    noisy.setLevel(logging.WARNING)
    try:
        yield
    finally:
        noisy.setLevel(level)
