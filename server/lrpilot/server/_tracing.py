"""What the server says of its work to whoever traces it: nothing, unless it is asked to.

`_telemetry` has the tracing that sends spans; nothing else imports OpenTelemetry, so that a server
which is not traced neither needs it nor pays for it.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from google.protobuf.descriptor import MethodDescriptor


class Span(Protocol):
    """A piece of work under way."""

    def set(self, name: str, value: float | str, /) -> None:
        """Say more of it; the name gets the prefix `lrpilot.`."""

    def ended(self, code: str, reason: str, /) -> None:
        """Say how a call ended: its status code, and the name of the error, or nothing."""


class Tracing(Protocol):
    """Who is told of each piece of work, for as long as the block around it."""

    def call(
        self, method: MethodDescriptor, request: Any, context: Any, /
    ) -> AbstractContextManager[Span]:
        """Trace one call of a method; `request` is None where it has parts."""

    def span(self, name: str, /, **attributes: float | str) -> AbstractContextManager[Span]:
        """Trace a part of what is traced around it."""

    def waiting(self) -> AbstractContextManager[Span]:
        """Trace how long a call waits for what has yet to happen: so it is not slow."""

    def close(self) -> None:
        """Send what is left, for a bounded time. Blocks."""


class _NoSpan:
    def set(self, *_: Any) -> None:
        pass

    def ended(self, *_: Any) -> None:
        pass


class _NoTracing:
    """Keeps nothing."""

    _nothing = nullcontext(_NoSpan())

    def call(self, *_: Any) -> AbstractContextManager[Span]:
        return self._nothing

    def span(self, *_: Any, **__: Any) -> AbstractContextManager[Span]:
        return self._nothing

    def waiting(self) -> AbstractContextManager[Span]:
        return self._nothing

    def close(self) -> None:
        pass


NO_TRACING: Tracing = _NoTracing()
