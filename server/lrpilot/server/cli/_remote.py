"""The runs of a server, over gRPC: every call with a deadline, every refusal as one failure."""

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Else gRPC writes its own lines about a refused connection between ours.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from google.protobuf.message import DecodeError, Message

from lrpilot.server.cli._failures import INVALID, REFUSED, UNREACHABLE, CommandError
from lrpilot.v1 import errors_pb2, runs_pb2
from lrpilot.v1.runs_pb2_grpc import RunServiceStub

DETAILS_KEY = "grpc-status-details-bin"

CHANNEL_OPTIONS = (
    # Servers stand beside the trainers, never behind the proxy that leads out of the cluster.
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
    # Who waits for a server to come back looks each second.
    ("grpc.max_reconnect_backoff_ms", 1000),
)

_UNANSWERED = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)


_HINTS = {
    "RunLive": "repeat the command with --force",
    "RunNotFound": "`lrpilot run list` shows the runs of this server",
    "PlanChanged": "--dry-run shows what it does to the plan as it is now, and the new etag",
}
"""What to do about a refusal, by its reason."""


class Runs:
    """The runs of one server. Every method raises CommandError for a call that fails."""

    def __init__(self, channel: grpc.Channel, server: str, timeout_s: float) -> None:
        self._stub = RunServiceStub(channel)
        self._server = server
        self._timeout_s = timeout_s

    def create(self, document: str) -> runs_pb2.Run:
        """Create a run from a spec."""
        request = runs_pb2.CreateRunRequest(spec_document=document, request_id=_request_id())
        answer: runs_pb2.CreateRunResponse = self._change(self._stub.CreateRun, request)
        return answer.run

    def get(self, run: str) -> runs_pb2.Run:
        """Return one run."""
        request = runs_pb2.GetRunRequest(run=run)
        answer: runs_pb2.GetRunResponse = self._call(self._stub.GetRun, request)
        return answer.run

    def list(self) -> Iterator[runs_pb2.Run]:
        """Yield every run by name, without adjustments and spec, page after page."""
        request = runs_pb2.ListRunsRequest()
        while True:
            page = self._call(self._stub.ListRuns, request)
            yield from page.runs
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def events(self, run: str) -> Iterator[runs_pb2.Event]:
        """Yield every event of a run's log in order, page after page."""
        request = runs_pb2.ListEventsRequest(run=run)
        while True:
            page = self._call(self._stub.ListEvents, request)
            yield from page.events
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def notable(self, run: str, count: int) -> Sequence[runs_pb2.Event]:
        """Return the newest events of a run that are no mere steps, the newest first."""
        request = runs_pb2.ListEventsRequest(
            run=run, page_size=count, newest_first=True, notable=True
        )
        answer: runs_pb2.ListEventsResponse = self._call(self._stub.ListEvents, request)
        return answer.events

    def curves(self, request: runs_pb2.GetCurvesRequest) -> runs_pb2.GetCurvesResponse:
        """Return what is drawn of a run."""
        answer: runs_pb2.GetCurvesResponse = self._call(self._stub.GetCurves, request)
        return answer

    def adjust(self, request: runs_pb2.AdjustRunRequest) -> runs_pb2.AdjustRunResponse:
        """Change the plan of a run from its horizon on, or show what that would do."""
        answer: runs_pb2.AdjustRunResponse = self._operate(self._stub.AdjustRun, request)
        return answer

    def approve(self, request: runs_pb2.ApproveAdviceRequest) -> runs_pb2.ApproveAdviceResponse:
        """Turn an advice into an adjustment, or show what that would do."""
        answer: runs_pb2.ApproveAdviceResponse = self._operate(self._stub.ApproveAdvice, request)
        return answer

    def revise(self, request: runs_pb2.ReviseRunRequest) -> runs_pb2.ReviseRunResponse:
        """Give a run another spec from its horizon on, or show what that would do."""
        answer: runs_pb2.ReviseRunResponse = self._operate(self._stub.ReviseRun, request)
        return answer

    def finish(self, run: str, *, force: bool) -> runs_pb2.Run:
        """End a run."""
        request = runs_pb2.FinishRunRequest(run=run, force=force, request_id=_request_id())
        answer: runs_pb2.FinishRunResponse = self._change(self._stub.FinishRun, request)
        return answer.run

    def delete(self, run: str, *, force: bool) -> None:
        """Remove a run and its log."""
        self._change(self._stub.DeleteRun, runs_pb2.DeleteRunRequest(run=run, force=force))

    def export(self, run: str, *, force: bool) -> Iterator[runs_pb2.ExportRunResponse]:
        """Yield the parts of a run's file; the first one has no data yet."""
        request = runs_pb2.ExportRunRequest(run=run, force=force)
        try:
            yield from self._stub.ExportRun(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise failure(error, self._server, self._timeout_s) from None

    def import_(
        self, first: runs_pb2.ImportRunRequest, parts: Iterator[runs_pb2.ImportRunRequest]
    ) -> runs_pb2.ImportRunResponse:
        """Take over a run from the parts of its file, of which `first` is signed and the first."""
        first.request_id = _request_id()
        answer: runs_pb2.ImportRunResponse = self._change(self._stub.ImportRun, parts)
        return answer

    def _operate(self, method: Callable[..., Any], request: Any) -> Any:
        if request.dry_run:
            return self._call(method, request)
        request.request_id = _request_id()
        return self._change(method, request)

    def _change(self, method: Callable[..., Any], request: Message | Iterator[Message]) -> Any:
        return self._call(
            method, request, "the server may have done it all the same: look before you repeat it"
        )

    def _call(
        self,
        method: Callable[..., Any],
        request: Message | Iterator[Message],
        doubt: str | None = None,
    ) -> Any:
        try:
            return method(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise failure(error, self._server, self._timeout_s, doubt) from None


@contextmanager
def connected(server: str, timeout_s: float) -> Iterator[Runs]:
    """Yield the runs of the server at HOST:PORT; nothing is sent before the first call."""
    with grpc.insecure_channel(server, options=CHANNEL_OPTIONS) as channel:
        yield Runs(channel, server, timeout_s)


def failure(error: Any, server: str, timeout_s: float, doubt: str | None = None) -> CommandError:
    """Return what a refused or unanswered call means for people.

    Args:
        error: the `grpc.RpcError`.
        server: HOST:PORT that was called.
        timeout_s: deadline of the call, in seconds.
        doubt: what to say when the call may have had its effect although no answer came.
    """
    code: grpc.StatusCode = error.code()
    text: str = error.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return CommandError(
            f"no answer from {server} within {timeout_s:g} s", UNREACHABLE, hint=doubt
        )
    if code in _UNANSWERED:
        return CommandError(
            f"no answer from the server at {server}",
            UNREACHABLE,
            # A connection may break after the server did what was asked.
            lines=[text] if doubt is None else [text, doubt],
            hint="start one with `lrpilot serve`, or say where it is with --server HOST:PORT or "
            "LRPILOT_SERVER",
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return CommandError(
            f"the server at {server} does not know this call: another program, or another version",
            REFUSED,
            lines=[text],
        )
    status, info, bad = _details(error)
    message = status.message or text or code.name
    lines = [
        f"{item.field}: {item.description}" if item.field else item.description
        for item in bad.field_violations
    ]
    if lines:
        # The server's text lists them too.
        message = message.partition("\n")[0]
    exit_code = INVALID if code is grpc.StatusCode.INVALID_ARGUMENT else REFUSED
    return CommandError(
        message, exit_code, lines=lines, hint=_HINTS.get(info.reason), reason=info.reason
    )


def _details(error: Any) -> tuple[errors_pb2.Status, errors_pb2.ErrorInfo, errors_pb2.BadRequest]:
    status, info, bad = errors_pb2.Status(), errors_pb2.ErrorInfo(), errors_pb2.BadRequest()
    for key, value in error.trailing_metadata() or ():
        if key != DETAILS_KEY:
            continue
        try:
            status.ParseFromString(value)
            for detail in status.details:
                kind = detail.type_url.rpartition(".")[2]
                if kind == "ErrorInfo":
                    info.ParseFromString(detail.value)
                elif kind == "BadRequest":
                    bad.ParseFromString(detail.value)
        except DecodeError:
            # Something between here and the server changed them; the text says enough.
            return errors_pb2.Status(), info, bad
    return status, info, bad


def _request_id() -> str:
    return uuid.uuid4().hex
