"""Tracing by OpenTelemetry: spans go to a collector over OTLP/HTTP.

Spans wait in a bounded queue for a thread that sends them; those for which there is no room are
dropped. A collector that is slow or away holds up no call, and the end for CLOSE_S at most.
Sampling, headers, the queue and the name of the service are set by the variables OTEL_… as in any
other program.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any
from urllib.parse import unquote, urlsplit

from google.protobuf.descriptor import MethodDescriptor
from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from lrpilot.server._rpc import subject_of
from lrpilot.server._tracing import Span

logger = logging.getLogger("lrpilot.server")

CLOSE_S = 3.0
"""Longest that what is left may take to be sent at the end."""

FAULTS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
"""Status codes that are a fault of the server, by the semantic conventions; others are answers."""

MAX_TEXT = 256
"""Most characters of a text that came with a request."""


class Telemetry:
    """Sends spans to the collector at `url`, the whole address with its path."""

    def __init__(self, url: str) -> None:
        release = version("lrpilot")
        named = Resource.create({"service.name": "lrpilot", "service.version": release})
        # What the environment says of the service wins.
        resource = named.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_Exporter(url)))
        self._tracer = self._provider.get_tracer("lrpilot.server", release)

    @contextmanager
    def call(self, method: MethodDescriptor, request: Any, context: Any, /) -> Iterator[Span]:
        """See Tracing."""
        name = f"{method.containing_service.full_name}/{method.name}"
        metadata = context.invocation_metadata() or ()
        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        subject = {} if request is None else subject_of(request)
        attributes: dict[str, str | int] = {
            "rpc.system.name": "grpc",
            "rpc.method": name,
            **_peer(context.peer()),
            **{
                f"lrpilot.{key}": value[:MAX_TEXT] if isinstance(value, str) else value
                for key, value in subject.items()
            },
        }
        with self._tracer.start_as_current_span(
            name,
            propagate.extract(carrier),
            trace.SpanKind.SERVER,
            attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            yield _Sent(span)

    @contextmanager
    def span(self, name: str, /, **attributes: float | str) -> Iterator[Span]:
        """See Tracing."""
        with self._tracer.start_as_current_span(
            name, record_exception=False, set_status_on_exception=False
        ) as span:
            sent = _Sent(span)
            for key, value in attributes.items():
                sent.set(key, value)
            try:
                yield sent
            except Exception as error:
                # Whose fault it is, the call says.
                span.set_attribute("error.type", type(error).__name__)
                raise

    @contextmanager
    def waiting(self) -> Iterator[Span]:
        """See Tracing."""
        call = trace.get_current_span()
        started_s = time.monotonic()
        try:
            with self.span("wait") as span:
                yield span
        finally:
            # One call may wait several times.
            before_s = (getattr(call, "attributes", None) or {}).get("lrpilot.waited_s", 0.0)
            call.set_attribute("lrpilot.waited_s", before_s + time.monotonic() - started_s)

    def close(self) -> None:
        """See Tracing."""
        # How long it may take is not for every release of the library to bound.
        ending = threading.Thread(
            target=self._provider.shutdown, name="lrpilot-traces-end", daemon=True
        )
        ending.start()
        ending.join(CLOSE_S)


class _Sent:
    """A span that is sent when it ends."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def set(self, name: str, value: float | str, /) -> None:
        self._span.set_attribute(f"lrpilot.{name}", value)

    def ended(self, code: str, reason: str, /) -> None:
        self._span.set_attribute("rpc.response.status_code", code)
        if code != "OK":
            self._span.set_attribute("error.type", reason or code)
        if code in FAULTS:
            self._span.set_status(trace.StatusCode.ERROR)


class _Exporter(SpanExporter):
    """Sends spans, and says once that it cannot; the library would say so of every batch."""

    def __init__(self, url: str) -> None:
        # Without a password that it may have.
        self._where = urlsplit(url)._replace(netloc=url.split("/")[2].rpartition("@")[2]).geturl()
        self._exporter = OTLPSpanExporter(endpoint=url)
        self._has_failed = False
        self._said = _Said()
        library = logging.getLogger("opentelemetry")
        library.addHandler(self._said)
        library.propagate = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._said.texts.clear()
        try:
            result = self._exporter.export(spans)
        except Exception as error:
            self._said.texts.append(f"{type(error).__name__}: {error}")
            result = SpanExportResult.FAILURE
        has_failed = result is not SpanExportResult.SUCCESS
        if has_failed and not self._has_failed:
            why = " ".join(dict.fromkeys(self._said.texts))
            logger.warning("traces cannot be sent to %s: %s", self._where, why)
        elif self._has_failed and not has_failed:
            logger.info("traces are sent to %s again", self._where)
        self._has_failed = has_failed
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]


class _Said(logging.Handler):
    """Keeps the last things that the library said: why it could not send."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: deque[str] = deque(maxlen=4)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _peer(peer: str) -> dict[str, str | int]:
    """Return who calls, such as `ipv4:127.0.0.1:4711` or `ipv6:%5B::1%5D:4711`."""
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    if not port.isdigit():
        return {"network.peer.address": peer}
    return {"network.peer.address": host.strip("[]"), "network.peer.port": int(port)}
