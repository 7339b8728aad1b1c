"""Messages of the server as plain data, for `--json`."""

from typing import Any

from lrpilot.server._documents import load_document
from lrpilot.server._json import fields_of
from lrpilot.v1 import runs_pb2


def run_fields(run: runs_pb2.Run) -> dict[str, Any]:
    """Return a run as plain data: the fields of the message, with the spec as a mapping."""
    fields = fields_of(run)
    document = fields.pop("spec_document")
    return fields | {"spec": load_document(document) if document else None}
