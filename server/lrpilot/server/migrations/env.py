"""Run by alembic around the migrations; the store hands over an open transaction."""

from alembic import context

from lrpilot.server._schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite cannot alter most of a table in place: alembic copies it instead.
    render_as_batch=True,
)
context.run_migrations()
