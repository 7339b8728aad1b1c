"""Reports that are sent twice, in another order, or long after their time.

A network that repeats and reorders whole requests, between the client and the server: the client
knows nothing of it. What comes of the requests made up here is written to the history like any.
"""

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import grpc

from lrpilot.v1 import trainer_pb2
from tests.crash.history import HistoryWriter

DEADLINE_S = 2.0

_METHOD = "/lrpilot.v1.TrainerService/ReportLosses"

_KEPT = 12
"""Requests that may come again."""


@dataclass(frozen=True)
class Meddling:
    """What is done to the reports of a rank, and where."""

    kind: Literal["duplicated", "reordered", "late"]
    begin: int
    """First progress whose report it is done to."""
    count: int
    """To how many requests."""
    seed: int


@contextmanager
def meddled_channels(plan: Meddling | None, history: HistoryWriter) -> Iterator[None]:
    """Meddle with the reports of every channel that `grpc.insecure_channel` makes inside."""
    if plan is None:
        yield
        return
    make = grpc.insecure_channel
    meddler = _Meddler(plan, history)
    grpc.insecure_channel = lambda *args, **options: _Channel(make(*args, **options), meddler)
    try:
        yield
    finally:
        grpc.insecure_channel = make


class _Channel:
    def __init__(self, channel: Any, meddler: "_Meddler") -> None:
        self._channel, self._meddler = channel, meddler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def unary_unary(self, method: str, *args: Any, **options: Any) -> Any:
        inner = self._channel.unary_unary(method, *args, **options)
        if method != _METHOD:
            return inner
        return lambda request, **given: self._meddler.report(inner, request, **given)


class _Meddler:
    def __init__(self, plan: Meddling, history: HistoryWriter) -> None:
        self._plan, self._history = plan, history
        self._random = random.Random(plan.seed)
        self._left = plan.count
        self._sent: deque[Any] = deque(maxlen=_KEPT)

    def report(self, call: Any, request: Any, **options: Any) -> Any:
        """Send a request, and others that it was not asked for."""
        last = max((report.moves_to for report in request.reports), default=0)
        if self._left <= 0 or last < self._plan.begin:
            self._sent.append(request)
            return call(request, **options)
        self._left -= 1
        self._history.fault(f"{self._plan.kind} reports", "report", "begin")
        try:
            return getattr(self, f"_{self._plan.kind}")(call, request, **options)
        finally:
            self._sent.append(request)
            self._history.fault(f"{self._plan.kind} reports", "report", "end")

    def _duplicated(self, call: Any, request: Any, **options: Any) -> Any:
        """Send it twice at the same time; either answer may be the one that is heard."""
        calls = [call.future(request, timeout=DEADLINE_S) for _ in range(2)]
        self._random.shuffle(calls)
        try:
            return calls[0].result()
        finally:
            _settle(calls[1])

    def _reordered(self, call: Any, request: Any, **options: Any) -> Any:
        """Send its reports one by one in any order, then what came before, then itself."""
        single = []
        for report in request.reports:
            one = trainer_pb2.ReportLossesRequest()
            one.CopyFrom(request)
            del one.reports[:]
            one.reports.append(report)
            single.append(one)
        old = self._random.sample(list(self._sent), min(2, len(self._sent)))
        mixed = [*single, *old]
        self._random.shuffle(mixed)
        for future in [call.future(one, timeout=DEADLINE_S) for one in mixed]:
            _settle(future)
        return call(request, **options)

    def _late(self, call: Any, request: Any, **options: Any) -> Any:
        """Send it, and then what came long before: copies that were under way all the time."""
        answer = call(request, **options)
        for one in self._random.sample(list(self._sent), min(3, len(self._sent))):
            _settle(call.future(one, timeout=DEADLINE_S))
        return answer


def _settle(future: Any) -> None:
    """Wait for the end of a call, whatever it is."""
    future.exception()
