"""What every method has in common: decode, time, translate errors, encode."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import MethodDescriptorProto
from google.protobuf.message import Message

from lrpilot import core
from lrpilot.server._errors import DETAILS_KEY, REFUSALS, details, unavailable
from lrpilot.server._journal import about
from lrpilot.server._store import StoreUnavailable
from lrpilot.server._tracing import NO_TRACING, Tracing
from lrpilot.v1.trainer_pb2 import Attempt

T = TypeVar("T")

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

logger = logging.getLogger("lrpilot.server")

Behaviour = Callable[[Any], Awaitable[Message | bytes]] | Callable[[Any], AsyncIterator[Message]]
"""What a method does. It takes the request, or where the client streams an iterator of its parts;
and returns the answer, or where the server streams an iterator of its parts."""

STREAM_S = 15 * 60.0
"""Longest that a stream may take, whatever deadline the client gave it."""

PART_S = 30.0
"""Longest wait for the next part of a request."""


class Service(Protocol):
    """What each service gives to be served."""

    @property
    def behaviours(self) -> Mapping[str, Behaviour]:
        """Method name to behaviour."""

    @property
    def requests(self) -> Mapping[str, type[Message]]:
        """Name of each request message to its class."""


class CallObserver(Protocol):
    """Who is told of each finished call."""

    def call_finished(self, method: str, code: str, seconds: float) -> None:
        """Count one call of `method` that ended with status `code`."""


def handlers(
    descriptor: ServiceDescriptor,
    service: Service,
    observer: CallObserver,
    tracing: Tracing = NO_TRACING,
) -> grpc.GenericRpcHandler:
    """Return the handlers of a service: one behaviour and request class per method.

    The generated `add_…_to_server` would do, but for two things: a behaviour here may return
    bytes that were serialized once for every rank, and errors are translated in one place.
    """
    return grpc.method_handlers_generic_handler(
        descriptor.full_name,
        {
            method.name: _kind(method)(
                _served(method, service.behaviours[method.name], observer, tracing),
                request_deserializer=service.requests[method.input_type.name].FromString,
                response_serializer=_serialize,
            )
            for method in descriptor.methods
        },
    )


def require(field: str, value: str) -> None:
    """Refuse a request that leaves a field empty. Raises InvalidRequest."""
    if not value:
        raise core.InvalidRequest(
            "the request is incomplete", [core.Violation(field, "nothing", "a non-empty string")]
        )


def _streams(method: MethodDescriptor) -> tuple[bool, bool]:
    """Return whether the client streams, and whether the server does."""
    # Descriptors of the oldest protobuf say so only as messages.
    message = MethodDescriptorProto()
    method.CopyToProto(message)
    return message.client_streaming, message.server_streaming


def _kind(method: MethodDescriptor) -> Any:
    """Return what makes the handler of a method."""
    client_streams, server_streams = _streams(method)
    if client_streams:
        return grpc.stream_unary_rpc_method_handler
    if server_streams:
        return grpc.unary_stream_rpc_method_handler
    return grpc.unary_unary_rpc_method_handler


def _served(
    method: MethodDescriptor, behaviour: Any, observer: CallObserver, tracing: Tracing
) -> Callable[..., Any]:
    def answered(request: Message | None, context: Context) -> AbstractAsyncContextManager[None]:
        return _answered(method, request, context, observer, tracing)

    async def serve(request: Any, context: Context) -> Message | bytes:
        async with answered(request, context):
            answer: Message | bytes = await behaviour(request)
        return answer

    async def serve_client_stream(parts: Any, context: Context) -> Message | bytes:
        async with answered(None, context):
            answer: Message | bytes = await _bounded(behaviour(_received(parts)), STREAM_S)
        return answer

    async def serve_server_stream(request: Any, context: Context) -> None:
        async def send() -> None:
            async for part in behaviour(request):
                await context.write(part)

        async with answered(request, context):
            await _bounded(send(), STREAM_S)

    client_streams, server_streams = _streams(method)
    if client_streams:
        return serve_client_stream
    return serve_server_stream if server_streams else serve


class _TooSlow(Exception):
    """A stream did not get on, or not to its end, in time."""


async def _bounded(work: Awaitable[T], seconds: float) -> T:
    """Return what `work` does. Raises _TooSlow."""
    try:
        return await asyncio.wait_for(work, seconds)
    except asyncio.TimeoutError:
        raise _TooSlow(f"the call was not done within {seconds:g} s") from None


async def _received(parts: AsyncIterator[Message]) -> AsyncIterator[Message]:
    """Yield the parts of a request. Raises _TooSlow where one does not come."""
    while True:
        try:
            part = await _bounded(parts.__anext__(), PART_S)
        except StopAsyncIteration:
            return
        yield part


@asynccontextmanager
async def _answered(
    method: MethodDescriptor,
    request: Message | None,
    context: Context,
    observer: CallObserver,
    tracing: Tracing,
) -> AsyncIterator[None]:
    """Time the block, and translate what it raises; `request` is None where it has parts."""
    name = method.name
    started = time.perf_counter()
    code = grpc.StatusCode.OK
    text = reason = ""
    metadata: tuple[tuple[str, bytes], ...] = ()
    with tracing.call(method, request, context) as span:
        try:
            yield
        except REFUSALS as error:
            code, text, packed = details(error)
            reason = type(error).__name__
            metadata = ((DETAILS_KEY, packed),)
        except StoreUnavailable as error:
            # Readiness says it in the log, once for all the calls that meet it.
            logger.debug("%s: %s", name, error)
            code, text, packed = unavailable(error)
            reason = type(error).__name__
            metadata = ((DETAILS_KEY, packed),)
        except _TooSlow as error:
            code, text = grpc.StatusCode.DEADLINE_EXCEEDED, str(error)
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception as error:
            subject = {} if request is None else subject_of(request)
            extra = about(subject.pop("run", None), method=name, peer=context.peer(), **subject)
            logger.exception("%s failed", name, extra=extra)
            code, text = grpc.StatusCode.INTERNAL, "internal error; the server's log has more"
            reason = type(error).__name__
        else:
            return
        finally:
            observer.call_finished(name, code.name, time.perf_counter() - started)
            span.ended(code.name, reason)
    await context.abort(code, text, metadata)


def subject_of(request: Any) -> dict[str, Any]:
    """Return what a request is about: `run`, `attempt`, `rank` and `progress`, where it says so."""
    names = request.DESCRIPTOR.fields_by_name
    said: dict[str, Any] = {}
    if "run" in names and request.run:
        said["run"] = request.run
    if isinstance(attempt := getattr(request, "attempt", None), Attempt):
        said["attempt"] = attempt.number
    if "rank" in names:
        said["rank"] = request.rank
    elif "held" in names and request.HasField("held"):
        said["rank"] = request.held.rank
    for name in ("progress", "begin"):
        # One that is optional stands alone in a oneof.
        if name in names and (names[name].containing_oneof is None or request.HasField(name)):
            said.setdefault("progress", getattr(request, name))
    if reports := getattr(request, "reports", ()):
        said["progress"] = reports[0].progress
    return said


def _serialize(answer: Message | bytes) -> bytes:
    return answer if isinstance(answer, bytes) else answer.SerializeToString()
