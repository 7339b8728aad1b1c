"""What a request says, read strictly: what is not understood is refused, and named."""

from typing import TypeVar

from google.protobuf.message import Message
from starlette.requests import Request

from lrpilot import core
from lrpilot.server._json import MAX_SHOWN, MAX_VIOLATIONS, read_message
from lrpilot.server.web._answers import Refused

M = TypeVar("M", bound=Message)

MAX_BODY_BYTES = 64 * 1024
"""Largest body taken; the longest text in one has 2,000 characters."""

_YES_NO = {"1": True, "true": True, "0": False, "false": False}


async def read_body(request: Request, kind: type[M]) -> M:
    """Return the message about a run that the body of a request holds, as JSON.

    Raises Refused and InvalidRequest.
    """
    media_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Refused(415, "UnsupportedMediaType", "the body must be application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            # What is left of it is not read.
            close = {"Connection": "close"}
            text = f"a body has at most {MAX_BODY_BYTES:,} bytes"
            raise Refused(413, "BodyTooLarge", text, close)
    return read_message(kind, bytes(body), without="run")


class Query:
    """The query of a request, of which every name must be asked for. All methods are to be called
    before `end`, which raises InvalidRequest for all that is wrong."""

    def __init__(self, request: Request) -> None:
        self._values = request.query_params.multi_items()
        self._known: list[str] = []
        self._violations: list[core.Violation] = []

    def texts(self, name: str) -> list[str]:
        """Return every value of a name."""
        self._known.append(name)
        return [value for key, value in self._values if key == name]

    def text(self, name: str) -> str:
        """Return the value of a name; empty: it is not there."""
        found = self.texts(name)
        if len(found) > 1:
            self._refuse(name, f"{len(found)} values", "one")
        return found[0] if found else ""

    def number(self, name: str, greatest: int) -> int:
        """Return a count, at most `greatest`; 0: it is not there."""
        text = self.text(name)
        # Python refuses to read thousands of digits.
        if text and not (text.isascii() and text.isdigit() and len(text) < 20):
            self._refuse(name, repr(text), "a whole number")
            return 0
        number = int(text or 0)
        if number > greatest:
            self._refuse(name, text, f"at most {greatest}")
            return 0
        return number

    def flag(self, name: str) -> bool:
        """Return a yes or no; no: it is not there."""
        text = self.text(name)
        if text and text not in _YES_NO:
            self._refuse(name, repr(text), "1 or 0")
        return _YES_NO.get(text, False)

    def end(self) -> None:
        """Refuse what was not asked for, or was no good. Raises InvalidRequest."""
        known = ", ".join(self._known) or "none"
        for name in dict.fromkeys(key for key, _ in self._values if key not in self._known):
            self._refuse(name, "a parameter", f"one of {known}")
        if self._violations:
            raise core.InvalidRequest("the query is invalid", self._violations)

    def _refuse(self, name: str, got: str, allowed: str) -> None:
        if len(self._violations) < MAX_VIOLATIONS:
            violation = core.Violation(name[:MAX_SHOWN], got[:MAX_SHOWN], allowed)
            self._violations.append(violation)
