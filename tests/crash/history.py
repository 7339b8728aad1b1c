"""What every process of a round saw, written as it happens: the crash laboratory's evidence.

Each process writes one file of JSON lines. A line stands in the file before what it tells of has
any effect: a call before it is sent, an answer before the caller gets it, values before a step uses
them. So a process that is killed leaves out at most what nobody saw.

Every line has `t` (nanoseconds of the monotonic clock, which all processes of a machine share),
`who` (the process, such as "r2.0": rank 2, incarnation 0) and `what`:

    call     call (unique in the file), method, server, request (base64 of the message)
    answer   call, response (base64 of the message)
    error    call, code (name of the gRPC status), reason (name of the error, "" where the server
             named none), details (text)
    used     run, attempt (number), progress, learning_rates and weight_decays (hexadecimal floats,
             one per group; weight_decays null where the run sets none)
    stall    seconds, progress
    fault    fault (kind), target, phase ("begin" or "end")
"""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from lrpilot.v1 import errors_pb2, runs_pb2, trainer_pb2

Record = dict[str, Any]

SERVICES = ("/lrpilot.v1.TrainerService/", "/lrpilot.v1.RunService/")
"""Calls of these are written; health checks, say, are not."""

_DETAILS_KEY = "grpc-status-details-bin"


class HistoryWriter:
    """Writes the history of one process; any thread may write."""

    def __init__(self, path: Path, who: str) -> None:
        self.who = who
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()
        self._calls = 0

    def __enter__(self) -> "HistoryWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the file. What is written later, by threads that end late, is left out."""
        with self._lock:
            self._file.close()

    def call(self, method: str, server: str, request: Any) -> int:
        """Write that a request is about to be sent, and return the id of the call."""
        with self._lock:
            self._calls += 1
            call = self._calls
        self._write("call", call=call, method=method, server=server, request=_packed(request))
        return call

    def answer(self, call: int, response: Any) -> None:
        """Write the answer to a call."""
        self._write("answer", call=call, response=_packed(response))

    def error(self, call: int, error: Any) -> None:
        """Write the gRPC error that a call ended with."""
        code = error.code()
        self._write(
            "error",
            call=call,
            code=code.name if code is not None else "UNKNOWN",
            reason=_reason(error),
            details=error.details() or "",
        )

    def used(
        self,
        run: str,
        attempt: int,
        progress: int,
        learning_rates: Sequence[float],
        weight_decays: Sequence[float] | None,
    ) -> None:
        """Write what a training step is about to use, one value per group."""
        self._write(
            "used",
            run=run,
            attempt=attempt,
            progress=progress,
            learning_rates=[value.hex() for value in learning_rates],
            weight_decays=None
            if weight_decays is None
            else [value.hex() for value in weight_decays],
        )

    def stall(self, seconds: float, progress: int) -> None:
        """Write that the training waited for the values at `progress`."""
        self._write("stall", seconds=seconds, progress=progress)

    def fault(self, fault: str, target: str, phase: str) -> None:
        """Write that a fault begins or ends."""
        self._write("fault", fault=fault, target=target, phase=phase)

    def _write(self, what: str, **fields: Any) -> None:
        with self._lock:
            if self._file.closed:
                return
            record = {"t": time.monotonic_ns(), "who": self.who, "what": what, **fields}
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()


def read_history(path: Path) -> list[Record]:
    """Return the records of one process in order; half a line at the end is left out.

    Raises ValueError for a line that is none of ours anywhere else.
    """
    records = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n") and number == len(lines):
            break
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not a line of a history: {line!r}") from error
    return records


def request_of(record: Record) -> Any:
    """Return the message that a call sent."""
    return _message(f"{record['method']}Request", record["request"])


def response_of(call: Record, answer: Record) -> Any:
    """Return the message that a call was answered with."""
    return _message(f"{call['method']}Response", answer["response"])


@contextmanager
def recorded_channels(history: HistoryWriter) -> Iterator[None]:
    """Write the calls of every channel that `grpc.insecure_channel` makes inside.

    A process that records until its end may enter it and never leave.
    """
    make: Callable[..., Any] = grpc.insecure_channel

    def recording(target: str, *args: Any, **options: Any) -> "RecordedChannel":
        return RecordedChannel(make(target, *args, **options), target, history)

    grpc.insecure_channel = recording
    try:
        yield
    finally:
        grpc.insecure_channel = make


class RecordedChannel:
    """A channel that writes its calls to a history; `server` is the address to write."""

    def __init__(self, channel: Any, server: str, history: HistoryWriter) -> None:
        self._channel, self._server, self._history = channel, server, history

    def __enter__(self) -> "RecordedChannel":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def unary_unary(self, method: str, *args: Any, **options: Any) -> Any:
        """Return what calls a method, as `grpc.Channel.unary_unary` does."""
        inner = self._channel.unary_unary(method, *args, **options)
        if not method.startswith(SERVICES):
            return inner
        return _RecordedMethod(inner, method.rpartition("/")[2], self._server, self._history)


class _RecordedMethod:
    def __init__(self, inner: Any, name: str, server: str, history: HistoryWriter) -> None:
        self._inner, self._name, self._server, self._history = inner, name, server, history

    def __call__(self, request: Any, **options: Any) -> Any:
        return self.with_call(request, **options)[0]

    def with_call(self, request: Any, **options: Any) -> Any:
        call = self._history.call(self._name, self._server, request)
        try:
            response, state = self._inner.with_call(request, **options)
        except grpc.RpcError as error:
            self._history.error(call, error)
            raise
        self._history.answer(call, response)
        return response, state

    def future(self, request: Any, **options: Any) -> "_RecordedFuture":
        call = self._history.call(self._name, self._server, request)
        return _RecordedFuture(self._inner.future(request, **options), call, self._history)


class _RecordedFuture:
    """A call under way; it is written before anybody is told of its end."""

    def __init__(self, inner: Any, call: int, history: HistoryWriter) -> None:
        self._inner, self._call, self._history = inner, call, history
        self._lock = threading.Lock()
        self._is_written = False
        inner.add_done_callback(lambda _: self._write())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self._inner.result(timeout)
        finally:
            self._write()

    def exception(self, timeout: float | None = None) -> Any:
        try:
            return self._inner.exception(timeout)
        finally:
            self._write()

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        def told(_: Any) -> None:
            self._write()
            callback(self)

        self._inner.add_done_callback(told)

    def _write(self) -> None:
        with self._lock:
            if self._is_written or not self._inner.done():
                return
            self._is_written = True
            if self._inner.cancelled() or self._inner.exception() is not None:
                self._history.error(self._call, self._inner)
            else:
                self._history.answer(self._call, self._inner.result())


def _packed(message: Any) -> str:
    return base64.b64encode(message.SerializeToString()).decode("ascii")


def _message(name: str, packed: str) -> Any:
    room = trainer_pb2 if hasattr(trainer_pb2, name) else runs_pb2
    return getattr(room, name).FromString(base64.b64decode(packed))


def _reason(error: Any) -> str:
    """Return the name under which the server refused a call, or "" where it named none."""
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            for item in errors_pb2.Status.FromString(value).details:
                if item.type_url.endswith(".ErrorInfo"):
                    return str(errors_pb2.ErrorInfo.FromString(item.value).reason)
    return ""
