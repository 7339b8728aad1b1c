"""Answers in JSON, those to what was refused among them."""

import gzip
import logging
from collections.abc import Mapping
from typing import Any

import grpc
from starlette.requests import Request
from starlette.responses import Response

from lrpilot import core
from lrpilot.server._errors import CATALOGUE, REFUSALS
from lrpilot.server._json import json_line
from lrpilot.server._store import StoreUnavailable

logger = logging.getLogger("lrpilot.server")

_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.FAILED_PRECONDITION: 409,
    grpc.StatusCode.ABORTED: 409,
}
"""HTTP status of each status code in the catalogue of errors."""

SMALL_BYTES = 2048
"""What is smaller is not worth compressing."""


class Refused(Exception):
    """A request that is refused before it gets to the runs."""

    def __init__(
        self, status: int, reason: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.headers = headers


def json_answer(request: Request, content: Any) -> Response:
    """Return content as JSON; it may be large, so call it on a thread."""
    body = json_line(content).encode()
    headers = {"Cache-Control": "no-store", "Vary": "Accept-Encoding"}
    if len(body) > SMALL_BYTES and "gzip" in request.headers.get("Accept-Encoding", ""):
        body = gzip.compress(body, 1)
        headers["Content-Encoding"] = "gzip"
    return Response(body, media_type="application/json", headers=headers)


def error_answer(path: str, error: Exception) -> Response:
    """Return what became of a request that failed."""
    if isinstance(error, Refused):
        return _answer(error.status, error.reason, str(error), headers=error.headers)
    if isinstance(error, REFUSALS):
        status = _STATUS[CATALOGUE[type(error)]]
        violations = error.violations if isinstance(error, core.InvalidFields) else ()
        # The fields are told apart from the message, which lists them too.
        message = error.message.partition("\n")[0] if violations else error.message
        return _answer(status, type(error).__name__, message, violations)
    if isinstance(error, StoreUnavailable):
        # Readiness says it in the log, once for all the requests that meet it.
        logger.debug("%s: %s", path, error)
        return _answer(503, "StoreUnavailable", f"the store is unavailable: {error}")
    logger.error("%s failed", path, exc_info=error)
    return _answer(500, "Internal", "internal error; the server's log has more")


def _answer(
    status: int,
    reason: str,
    message: str,
    violations: tuple[core.Violation, ...] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    fields = [
        {"field": item.field, "text": f"got {item.got}; allowed: {item.allowed}"}
        for item in violations
    ]
    error = {"reason": reason, "message": message, "fields": fields}
    return Response(
        json_line({"error": error}),
        status,
        media_type="application/json",
        headers={"Cache-Control": "no-store", **(headers or {})},
    )
