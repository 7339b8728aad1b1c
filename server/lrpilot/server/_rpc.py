"""What every method has in common: decode, time, translate errors, encode."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message

from lrpilot import core
from lrpilot.server._errors import DETAILS_KEY, REFUSALS, details, unavailable
from lrpilot.server._store import StoreUnavailable

logger = logging.getLogger("lrpilot.server")

Behaviour = Callable[[Any], Awaitable[Message | bytes]]


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
    descriptor: ServiceDescriptor, service: Service, observer: CallObserver
) -> grpc.GenericRpcHandler:
    """Return the handlers of a service: one behaviour and request class per method.

    The generated `add_…_to_server` would do, but for two things: a behaviour here may return
    bytes that were serialized once for every rank, and errors are translated in one place.
    """
    return grpc.method_handlers_generic_handler(
        descriptor.full_name,
        {
            method.name: grpc.unary_unary_rpc_method_handler(
                _served(method.name, service.behaviours[method.name], observer),
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


def _served(name: str, behaviour: Behaviour, observer: CallObserver) -> Callable[..., Any]:
    async def serve(
        request: Message, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Message | bytes:
        started = time.perf_counter()
        code = grpc.StatusCode.OK
        text = ""
        metadata: tuple[tuple[str, bytes], ...] = ()
        try:
            return await behaviour(request)
        except REFUSALS as error:
            code, text, packed = details(error)
            metadata = ((DETAILS_KEY, packed),)
        except StoreUnavailable as error:
            # Readiness says it in the log, once for all the calls that meet it.
            logger.debug("%s: %s", name, error)
            code, text, packed = unavailable(error)
            metadata = ((DETAILS_KEY, packed),)
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception:
            logger.exception("%s failed", name)
            code, text = grpc.StatusCode.INTERNAL, "internal error; the server's log has more"
        finally:
            observer.call_finished(name, code.name, time.perf_counter() - started)
        await context.abort(code, text, metadata)
        raise AssertionError  # abort never returns

    return serve


def _serialize(answer: Message | bytes) -> bytes:
    return answer if isinstance(answer, bytes) else answer.SerializeToString()
