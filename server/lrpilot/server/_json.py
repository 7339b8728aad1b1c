"""Messages as JSON: names as in the proto files, and each number as a number.

The JSON of protobuf itself writes 64-bit integers as strings and leaves out what is zero, which
people, `jq` and pages have no use for.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from lrpilot.core._errors import InvalidRequest, Violation
from lrpilot.v1 import runs_pb2

M = TypeVar("M", bound=Message)

MAX_VIOLATIONS = 20
"""Most fields at fault that one answer names."""

MAX_SHOWN = 80
"""Most characters of what was got that an answer repeats."""

_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
}
"""Least and greatest value of each type of integers that requests have."""


def json_line(value: Any) -> str:
    """Return a value as JSON in one line.

    Floats are in shortest round-trip form, non-finite ones the strings "nan", "inf" and "-inf";
    messages are as `fields_of` has them.
    """
    return json.dumps(_plain(value), allow_nan=False)


def fields_of(message: Message) -> dict[str, Any]:
    """Return a message as plain data by field name.

    Absent values are None, times RFC 3339, and where a run stands is one word.
    """
    return {field.name: _value(message, field) for field in message.DESCRIPTOR.fields}


def _value(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if hasattr(value, "extend"):
        if field.message_type is None:
            return list(value)
        return [fields_of(item) for item in value]
    if hasattr(value, "items"):
        # Maps have no order on the wire.
        return {
            key: fields_of(item) if isinstance(item, Message) else item
            for key, item in sorted(value.items())
        }
    # An optional scalar of proto3 stands alone in a oneof.
    is_optional = field.message_type is not None or field.containing_oneof is not None
    if is_optional and not message.HasField(field.name):
        return None
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if field.enum_type is runs_pb2.RunState.DESCRIPTOR:
        return state_name(value)
    return fields_of(value) if isinstance(value, Message) else value


def state_name(state: int) -> str:
    """Return the word for where a run stands.

    >>> state_name(runs_pb2.RUN_STATE_RUNNING)
    'running'
    """
    known = runs_pb2.RunState.DESCRIPTOR.values_by_number.get(state)
    # A newer server may know others.
    return str(state) if known is None else known.name.removeprefix("RUN_STATE_").lower()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return _plain(fields_of(value)) if isinstance(value, Message) else value


def read_message(kind: type[M], text: bytes, *, without: str) -> M:
    """Return the message that a JSON object holds.

    Args:
        kind: class of the message; no field of it is repeated.
        text: the JSON, as `json_line` writes it; null stands for absent.
        without: a field that is said elsewhere, and is none of the object's.

    Raises InvalidRequest, which names every field at fault.
    """
    try:
        content = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            "the body is no JSON", [Violation("", str(error) or "deep nesting", "one JSON object")]
        ) from None
    message = kind()
    violations: list[Violation] = []
    _fill(message, content, "", violations, without)
    if violations:
        raise InvalidRequest("the request is invalid", violations)
    return message


def _fill(
    message: Message, content: Any, path: str, violations: list[Violation], without: str = ""
) -> None:
    """Set the fields of a message that are good, and list the others."""
    if not isinstance(content, dict):
        violations.append(Violation(path, _shown(content), "an object"))
        return
    fields = {item.name: item for item in message.DESCRIPTOR.fields if item.name != without}
    chosen: dict[str, str] = {}
    for name, value in content.items():
        if len(violations) == MAX_VIOLATIONS:
            return
        place = f"{path}.{name[:MAX_SHOWN]}" if path else name[:MAX_SHOWN]
        field = fields.get(name)
        if field is None:
            violations.append(Violation(place, "a field", f"one of {', '.join(fields)}"))
        elif value is None:
            continue
        elif (
            field.containing_oneof is not None
            and (other := chosen.setdefault(field.containing_oneof.name, name)) is not name
        ):
            violations.append(Violation(place, "a field", f"nothing beside {other}"))
        elif field.message_type is not None:
            inner = getattr(message, name)
            inner.SetInParent()
            _fill(inner, value, place, violations)
        elif (allowed := _allowed(field, value)) is not None:
            violations.append(Violation(place, _shown(value), allowed))
        else:
            setattr(message, name, value)


def _allowed(field: Any, value: Any) -> str | None:
    """Return what is allowed in a field of a scalar type; None: the value is."""
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        return None if isinstance(value, str) and _is_text(value) else "a string"
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return None if isinstance(value, bool) else "true or false"
    if kind == FieldDescriptor.CPPTYPE_DOUBLE:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        is_finite = is_number and abs(value) <= sys.float_info.max
        return None if is_finite else "a finite number"
    least, greatest = _INTEGERS[kind]
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return None if is_integer and least <= value <= greatest else f"{least} to {greatest}"


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can say half of a character.
        return False
    return True


def _once(pairs: Sequence[tuple[str, Any]]) -> Mapping[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{_shown(twice)} is given twice")
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"
