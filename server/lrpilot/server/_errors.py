"""How errors leave the server: one catalogue from exception to status code, one translator."""

from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message

from lrpilot import core
from lrpilot.server._store import StoreUnavailable
from lrpilot.v1 import errors_pb2

DETAILS_KEY = "grpc-status-details-bin"
"""Trailing metadata in which standard tools look for details."""

_TYPE_PREFIX = "type.googleapis.com/google.rpc."

_CUT = " …"

CATALOGUE: dict[type[core.LrpilotError], grpc.StatusCode] = {
    core.InvalidSpec: grpc.StatusCode.INVALID_ARGUMENT,
    core.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    core.InvalidState: grpc.StatusCode.INVALID_ARGUMENT,
    core.RunNotFound: grpc.StatusCode.NOT_FOUND,
    core.RunExists: grpc.StatusCode.ALREADY_EXISTS,
    core.LossConflict: grpc.StatusCode.ALREADY_EXISTS,
    core.BelowResumePoint: grpc.StatusCode.OUT_OF_RANGE,
    core.BeyondHorizon: grpc.StatusCode.OUT_OF_RANGE,
    core.BeforeAttempt: grpc.StatusCode.OUT_OF_RANGE,
    core.RunFinished: grpc.StatusCode.FAILED_PRECONDITION,
    core.RunLive: grpc.StatusCode.FAILED_PRECONDITION,
    core.SpecChanged: grpc.StatusCode.FAILED_PRECONDITION,
    core.RevisionRefused: grpc.StatusCode.FAILED_PRECONDITION,
    core.ResumePointRequired: grpc.StatusCode.FAILED_PRECONDITION,
    core.JoinRefused: grpc.StatusCode.FAILED_PRECONDITION,
    core.StateMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    core.AttemptSuperseded: grpc.StatusCode.FAILED_PRECONDITION,
    core.LogForgotten: grpc.StatusCode.FAILED_PRECONDITION,
    core.NotReporter: grpc.StatusCode.FAILED_PRECONDITION,
    core.NotHolder: grpc.StatusCode.FAILED_PRECONDITION,
    core.BeyondPermit: grpc.StatusCode.OUT_OF_RANGE,
    core.ValuesConflict: grpc.StatusCode.ALREADY_EXISTS,
    core.LossesPending: grpc.StatusCode.FAILED_PRECONDITION,
    core.AdjustmentNotFound: grpc.StatusCode.NOT_FOUND,
    core.AdjustmentRefused: grpc.StatusCode.FAILED_PRECONDITION,
    core.AdviceExpired: grpc.StatusCode.FAILED_PRECONDITION,
    core.PlanChanged: grpc.StatusCode.ABORTED,
}
"""Status code of each error that a request can meet."""

REFUSALS = tuple(CATALOGUE)
"""What `details` takes; anything else is a fault of the server's own."""

MAX_TEXT = 2000
"""Most bytes of the text for people on the wire, where gRPC writes all but plain ASCII as %XX."""

MAX_DETAILS = 3600
"""Most bytes of the details before base64. With the text they stay under the 8 KiB of metadata
that peers accept by default; past that, gRPC replaces the whole error by one of its own."""


def details(error: core.LrpilotError) -> tuple[grpc.StatusCode, str, bytes]:
    """Return the status code, the text for people, and the serialized details of an error.

    What does not fit is cut, and says so.
    """
    code = CATALOGUE[type(error)]
    info = errors_pb2.ErrorInfo(reason=type(error).__name__, domain="lrpilot")
    for name, fact in error.facts.items():
        info.metadata[name] = _cut(str(fact), 200)
    status = errors_pb2.Status(code=code.value[0], message=_cut(error.message, 400))
    status.details.append(_pack(info, "ErrorInfo"))
    if isinstance(error, core.InvalidFields):
        status.details.append(
            _pack(_bad_request(error, MAX_DETAILS - status.ByteSize()), "BadRequest")
        )
    return code, _cut(str(error), MAX_TEXT, _percent_encoded), status.SerializeToString()


def unavailable(error: StoreUnavailable) -> tuple[grpc.StatusCode, str, bytes]:
    """Return what `details` does of a store that fails: the call may be repeated as it is."""
    code = grpc.StatusCode.UNAVAILABLE
    text = f"the store is unavailable: {error}"
    info = errors_pb2.ErrorInfo(reason=StoreUnavailable.__name__, domain="lrpilot")
    info.metadata["reason"] = error.reason
    status = errors_pb2.Status(code=code.value[0], message=_cut(text, 400))
    status.details.append(_pack(info, "ErrorInfo"))
    return code, _cut(text, MAX_TEXT, _percent_encoded), status.SerializeToString()


def _bad_request(error: core.InvalidFields, room: int) -> errors_pb2.BadRequest:
    bad = errors_pb2.BadRequest()
    for index, violation in enumerate(error.violations):
        bad.field_violations.add(
            field=_cut(violation.field, 120),
            description=f"got {_cut(violation.got, 80)}; allowed: {_cut(violation.allowed, 240)}",
        )
        if bad.ByteSize() > room - 100:
            del bad.field_violations[-1]
            left = len(error.violations) - index
            bad.field_violations.add(field="", description=f"and {left} more")
            break
    return bad


def _utf8(text: str) -> int:
    return len(text.encode("utf-8"))


def _percent_encoded(text: str) -> int:
    return sum(1 if " " <= char <= "~" and char != "%" else 3 * _utf8(char) for char in text)


def _cut(text: str, room: int, size: Callable[[str], int] = _utf8) -> str:
    """Return a text of at most `room` bytes as `size` counts them."""
    # No character takes less than a byte.
    if len(text) <= room and size(text) <= room:
        return text
    ends = accumulate((size(char) for char in text[:room]), initial=size(_CUT))
    return text[: bisect_right(list(ends), room) - 1] + _CUT


def _pack(message: Message, name: str) -> AnyMessage:
    return AnyMessage(type_url=f"{_TYPE_PREFIX}{name}", value=message.SerializeToString())
