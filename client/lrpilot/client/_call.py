"""One call to the server: deadline, errors by name, repeats with jittered back-off."""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from lrpilot.client import _timing
from lrpilot.client._errors import (
    ClientFailed,
    LrpilotError,
    PilotClosed,
    ServerError,
    ServerUnavailable,
    Violation,
    error_class,
)
from lrpilot.client._held import Held
from lrpilot.v1 import errors_pb2
from lrpilot.v1 import trainer_pb2 as pb
from lrpilot.v1.trainer_pb2_grpc import TrainerServiceStub

logger = logging.getLogger("lrpilot.client")

Answer = TypeVar("Answer")

DETAILS_KEY = "grpc-status-details-bin"
"""Trailing metadata that holds the details of an error."""

RETRIED = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
    }
)
"""Statuses after which a call is repeated: every call of the contract is harmless to repeat. A
server that sheds load cancels calls, so that CANCELLED is one of them. INTERNAL and UNKNOWN come
from broken connections, and from a server at fault that may be mended while training goes on;
errors that the contract names have other statuses."""

# A source of its own: pauses must neither read nor disturb the seeds of the training.
_random = random.SystemRandom()


class Unanswered(Exception):
    """A call found no answer and may be repeated."""


class Backoff:
    """Pauses between repeats: random below a bound that doubles up to a cap."""

    def __init__(self) -> None:
        self._repeats = 0

    def next_s(self) -> float:
        """Return the next pause in seconds."""
        bound = min(_timing.BACKOFF_CAP_S, _timing.BACKOFF_FIRST_S * 2.0**self._repeats)
        self._repeats = min(self._repeats + 1, 32)
        return _random.uniform(0.0, bound)

    def reset(self) -> None:
        """Begin with short pauses again."""
        self._repeats = 0


class Link:
    """The connection of one attempt, and what its threads must tell each other about it."""

    def __init__(
        self,
        make_channel: Callable[[], grpc.Channel],
        *,
        address: str,
        run: str,
        rank: int,
        outage_timeout_s: float,
    ) -> None:
        self.address = address
        self.run = run
        self.rank = rank
        self.outage_timeout_s = outage_timeout_s
        """How long a training thread waits without any contact to the server."""
        self._make_channel = make_channel
        self._channel = make_channel()
        self.stub = TrainerServiceStub(self._channel)
        self.closing = threading.Event()
        self.contact_s: float | None = None
        """When the server last answered, on the monotonic clock; None: not yet."""
        self.frontier = 0
        """Least progress whose loss was not final when the server last said so."""
        self.horizon = 0
        """First progress whose values were not fixed when the server last said so."""
        self.got = Held(rank)
        """What the server gave in this attempt."""
        self.failure: LrpilotError | None = None
        """What a background thread met and the training thread must hear."""
        self.failure_raised = False
        self.undelivered: Callable[[], int] = lambda: 0
        """Returns the number of reports that wait for delivery."""
        self._lock = threading.Lock()

    def successor(self) -> "Link":
        """Return a connection of its own for another attempt: what this one meets is no more its.

        Ending this one then ends the threads and calls of the old attempt alone.
        """
        return Link(
            self._make_channel,
            address=self.address,
            run=self.run,
            rank=self.rank,
            outage_timeout_s=self.outage_timeout_s,
        )

    # Calls.

    def once(self, method: Callable[..., Answer], request: object, timeout_s: float) -> Answer:
        """Return the answer to one call.

        Raises Unanswered when it may be repeated, PilotClosed, or the error that it met.
        """
        if self.closing.is_set():
            raise self.closed()
        try:
            answer = method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            if self.closing.is_set():
                raise self.closed() from None
            met = translated(error, run=self.run, address=self.address)
            if not isinstance(met, Unanswered):
                self.contact_s = time.monotonic()
            raise met from None
        except ValueError:
            # gRPC says so of a channel that was closed between the check and the call.
            if self.closing.is_set():
                raise self.closed() from None
            raise
        self.contact_s = time.monotonic()
        return answer

    def until(
        self,
        method: Callable[..., Answer],
        request: object,
        *,
        timeout_s: float,
        patience_s: float,
        doing: str,
    ) -> Answer:
        """Return the answer to a call, repeating it for `patience_s` seconds.

        `doing` completes the sentence "rank 0 …" in messages. Raises ServerUnavailable.
        """
        start_s = said_s = time.monotonic()
        backoff = Backoff()
        while True:
            left_s = start_s + patience_s - time.monotonic()
            try:
                return self.once(method, request, min(timeout_s, max(left_s, _timing.LEAST_CALL_S)))
            except Unanswered as lost:
                reason = str(lost)
            now_s = time.monotonic()
            if now_s >= start_s + patience_s:
                raise self.unavailable(doing, now_s - start_s, reason)
            if now_s >= said_s + _timing.BLOCKED_WAIT_S:
                said_s = now_s
                logger.warning(
                    "run %s: rank %d %s: no answer from %s for %.0f s (%s); gives up after %.0f s",
                    self.run,
                    self.rank,
                    doing,
                    self.address,
                    now_s - start_s,
                    reason,
                    patience_s,
                )
            self.pause(min(backoff.next_s(), start_s + patience_s - now_s))

    def pause(self, seconds: float) -> None:
        """Wait, but not longer than the pilot is open."""
        self.closing.wait(max(seconds, 0.0))

    def heard(self, frontier: int, horizon: int) -> None:
        """Remember where the run stands, for messages."""
        self.frontier = max(self.frontier, frontier)
        self.horizon = max(self.horizon, horizon)

    def held(self) -> pb.Held:
        """Return what this rank has from the server, to hand back with a request."""
        return self.got.message(self.frontier)

    # Failures.

    def fail(self, error: LrpilotError) -> None:
        """Keep an error for the training thread; the first one stays."""
        with self._lock:
            if self.failure is None:
                self.failure = error

    @contextmanager
    def guard(self, doing: str) -> Iterator[None]:
        """Keep for the training thread whatever ends the work of a background thread inside.

        `doing` completes the sentence "… failed" where that is nothing which the client names. A
        pilot that closes ends the work too, and is no failure.
        """
        try:
            yield
        except PilotClosed:
            return
        except LrpilotError as error:
            self.fail(error)
        except Exception as error:
            logger.exception("run %s: %s failed", self.run, doing)
            self.fail(ClientFailed(f"{doing} failed: {error!r}"))

    def check(self) -> None:
        """Raise what a background thread met, or PilotClosed."""
        if self.failure is not None:
            raise self._failed(self.failure)
        if self.closing.is_set():
            raise self.closed()

    def closed(self) -> PilotClosed:
        """Return the error for a call on a closed pilot."""
        return PilotClosed(f"the pilot of run {self.run!r} is closed", facts={"run": self.run})

    def unavailable(
        self, doing: str, seconds: float, reason: str, remedy: str = "", **facts: object
    ) -> ServerUnavailable:
        """Return the error for a server that could not be reached for `seconds`.

        `remedy` is a sentence on what to do.
        """
        return ServerUnavailable(
            f"run {self.run!r}: rank {self.rank} {doing}, and the server at {self.address} did "
            f"not answer for {seconds:.0f} s ({reason})" + (f". {remedy}" if remedy else ""),
            facts={
                "run": self.run,
                "address": self.address,
                "seconds": f"{seconds:.0f}",
                **facts,
            },
        )

    def close(self) -> None:
        """End every call under way and refuse further ones."""
        self.closing.set()
        self._channel.close()

    def forked(self) -> None:
        """Become closed in a forked child, without the locks that threads of its parent hold."""
        self.closing = threading.Event()
        self.closing.set()

    def _failed(self, error: LrpilotError) -> LrpilotError:
        self.failure_raised = True
        undelivered = self.undelivered()
        if not undelivered:
            return error.again()
        return error.again(f" ({undelivered} reports were not delivered)", undelivered=undelivered)


def translated(error: Any, *, run: str, address: str) -> Unanswered | LrpilotError:
    """Return what a `grpc.RpcError` means."""
    code, text = error.code(), error.details() or ""
    # A message over the size limit fails like shed load, and would at every repeat.
    if code in RETRIED and "larger than max" not in text:
        return Unanswered(f"{code.name}: {text}" if text else code.name)
    return _named(code, text, error.trailing_metadata() or ()) or ServerError(
        f"the server at {address} answered {code.name}: {text}",
        facts={"run": run, "address": address, "code": code.name},
    )


def _named(code: Any, text: str, metadata: Any) -> LrpilotError | None:
    """Return the error that the details name, or None when they name none known here."""
    packed = next((value for key, value in metadata if key == DETAILS_KEY), None)
    if packed is None:
        return None
    reason, facts, violations = _read_details(packed)
    if not reason:
        return None
    lines = "".join(f"\n  {item}" for item in violations if item.description not in text)
    kind = error_class(reason)
    if kind is None:
        # A newer server: its error has no class here, but its name and facts arrive.
        return ServerError(
            f"{reason}: {text}{lines}",
            facts={**facts, "reason": reason, "code": code.name},
            violations=violations,
        )
    return kind(text + lines, facts=facts, violations=violations)


def _read_details(packed: bytes) -> tuple[str, Mapping[str, str], list[Violation]]:
    reason, facts, violations = "", {}, []
    try:
        for item in errors_pb2.Status.FromString(packed).details:
            if item.type_url.endswith(".ErrorInfo"):
                info = errors_pb2.ErrorInfo.FromString(item.value)
                reason, facts = info.reason, dict(info.metadata)
            elif item.type_url.endswith(".BadRequest"):
                bad = errors_pb2.BadRequest.FromString(item.value)
                violations += [
                    Violation(entry.field, entry.description) for entry in bad.field_violations
                ]
    except DecodeError:
        # The status and its text stand; a proxy may have rewritten the rest.
        return "", {}, []
    return reason, facts, violations
