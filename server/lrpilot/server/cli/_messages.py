"""Messages of the server as plain data, for `--json`."""

from typing import Any

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from lrpilot.server._documents import load_document
from lrpilot.v1 import runs_pb2


def run_fields(run: runs_pb2.Run) -> dict[str, Any]:
    """Return a run as plain data: the fields of the message, with the spec as a mapping."""
    fields = fields_of(run)
    document = fields.pop("spec_document")
    return fields | {
        "state": state_name(run.state),
        "spec": load_document(document) if document else None,
    }


def fields_of(message: Message) -> dict[str, Any]:
    """Return a message as plain data by field name: absent values are None, times RFC 3339."""
    return {field.name: _plain(message, field) for field in message.DESCRIPTOR.fields}


def _plain(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if hasattr(value, "extend"):
        return [fields_of(item) if isinstance(item, Message) else item for item in value]
    if hasattr(value, "items"):
        # Maps have no order on the wire.
        return dict(sorted(value.items()))
    # An optional scalar of proto3 stands alone in a oneof.
    is_optional = field.message_type is not None or field.containing_oneof is not None
    if is_optional and not message.HasField(field.name):
        return None
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    return fields_of(value) if isinstance(value, Message) else value


def state_name(state: int) -> str:
    """Return the word for where a run stands.

    >>> state_name(runs_pb2.RUN_STATE_RUNNING)
    'running'
    """
    known = runs_pb2.RunState.DESCRIPTOR.values_by_number.get(state)
    # A newer server may know others.
    return str(state) if known is None else known.name.removeprefix("RUN_STATE_").lower()
