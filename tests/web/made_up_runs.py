"""Runs with made-up losses, trained quickly through the real services: for tests and pictures."""

import itertools
import json
import math
from collections.abc import Callable, Mapping
from random import Random
from types import TracebackType
from typing import Any

import grpc

from lrpilot.v1 import runs_pb2, trainer_pb2
from lrpilot.v1.runs_pb2_grpc import RunServiceStub
from lrpilot.v1.trainer_pb2_grpc import TrainerServiceStub

DEADLINE_S = 60.0
"""Every call ends by then."""

BATCH = 128
"""Most losses in a call."""

_NUMBERS = itertools.count(1)


class Trainer:
    """A job of one rank, which uses values and reports losses many steps at a time."""

    def __init__(self, address: str, spec: Mapping[str, Any]) -> None:
        """Create the run of that spec on the server at `address`."""
        self.run: str = spec["name"]
        self._channel = grpc.insecure_channel(address)
        self._runs: Any = RunServiceStub(self._channel)
        self._trainer: Any = TrainerServiceStub(self._channel)
        self._attempt: Any = None
        document = json.dumps(spec)
        request = runs_pb2.CreateRunRequest(spec_document=document, request_id=_fresh("create"))
        self._runs.CreateRun(request, timeout=DEADLINE_S)
        self.delay = self.shown().delay

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()

    def shown(self) -> Any:
        """Return the run as people see it."""
        request = runs_pb2.GetRunRequest(run=self.run)
        return self._runs.GetRun(request, timeout=DEADLINE_S).run

    def open(self, progress: int = 0, directive: str = "") -> None:
        """Open an attempt; `directive`: the rollback that it carries out."""
        request = trainer_pb2.OpenAttemptRequest(
            run=self.run,
            request_id=_fresh("open"),
            progress=progress,
            incarnation=_fresh("process"),
            directive=directive,
            met_in=self._attempt if directive else None,
        )
        self._incarnation = request.incarnation
        self._attempt = self._trainer.OpenAttempt(request, timeout=DEADLINE_S).attempt

    def train(
        self,
        begin: int,
        end: int,
        loss: Callable[[int], float],
        *,
        stride: int = 1,
        validation: Callable[[int], float | None] = lambda _: None,
        norm: Callable[[int], float] | None = None,
    ) -> None:
        """Use the values in [begin, end), and report the losses of these steps."""
        count = max(1, min(BATCH, self.delay // stride))
        for first in range(begin, end, count * stride):
            steps = range(first, min(end, first + count * stride), stride)
            wanted = trainer_pb2.GetValuesRequest(
                run=self.run,
                attempt=self._attempt,
                begin=first,
                stride=stride,
                count=len(steps),
                in_use=steps[-1],
            )
            self._trainer.GetValues(wanted, timeout=DEADLINE_S)
            self._report(steps, loss, stride, validation, norm)

    def report(self, begin: int, end: int, loss: Callable[[int], float]) -> None:
        """Report the losses of [begin, end) without asking for values, which is quicker."""
        for first in range(begin, end, self.delay):
            self._report(range(first, min(end, first + self.delay)), loss)

    def _report(
        self,
        steps: range,
        loss: Callable[[int], float],
        stride: int = 1,
        validation: Callable[[int], float | None] = lambda _: None,
        norm: Callable[[int], float] | None = None,
    ) -> None:
        reports = []
        for at in steps:
            report = trainer_pb2.LossReport(progress=at, loss=loss(at), moves_to=at + stride)
            if norm is not None:
                report.gradient_norm = norm(at)
            if (value := validation(at)) is not None:
                report.validation_losses["validation"] = value
            reports.append(report)
        said = trainer_pb2.ReportLossesRequest(
            run=self.run, attempt=self._attempt, incarnation=self._incarnation, reports=reports
        )
        self._trainer.ReportLosses(said, timeout=DEADLINE_S)

    def adjust(self, **action: Any) -> Any:
        """Change the plan as an operator; return the answer."""
        said = {"reason": "the loss swings", "author": "operator"} | action
        request = runs_pb2.AdjustRunRequest(run=self.run, request_id=_fresh("adjust"), **said)
        return self._runs.AdjustRun(request, timeout=DEADLINE_S)

    def finish(self) -> None:
        """End the run."""
        request = runs_pb2.FinishRunRequest(run=self.run, request_id=_fresh("end"), force=True)
        self._runs.FinishRun(request, timeout=DEADLINE_S)


def _fresh(what: str) -> str:
    return f"{what}-{next(_NUMBERS)}"


def falling(best: float = 2.2, scale: float = 3000.0, start: float = 8.0) -> Callable[[int], float]:
    """Return a loss that falls from `start` to `best`, without noise."""
    return lambda n: best + (start - best) * math.exp(-n / scale)


def noisy(loss: Callable[[int], float], noise: float, seed: int = 1) -> Callable[[int], float]:
    """Return the loss with noise that is the same each time."""
    random = Random(seed)
    return lambda n: loss(n) + random.gauss(0.0, noise)


EVENTFUL = {
    "name": "gpt-7b-pretrain",
    "total": 50_000,
    "groups": [{"name": "matrices"}, {"name": "embedding", "peak": 1e-4}],
    "weight_decay": {"start": 0.05, "end": 0.1, "style": "linear"},
    "stages": [
        {
            "name": "pretrain",
            "until": 40_000,
            "learning_rate": {"peak": 3e-4, "warmup": 2000},
            "policies": [
                {"kind": "divergence", "mode": "act"},
                {"kind": "plateau", "window": 200, "patience": 12, "threshold": 2e-3},
                {"kind": "plateau", "window": 100, "patience": 8, "factor": 0.7, "mode": "advise"},
            ],
        },
        {
            "name": "anneal",
            "learning_rate": {"peak": 1e-4, "min": 0, "decay": {"style": "linear"}},
            "groups": [{"name": "embedding", "peak": 3e-5}],
        },
    ],
    "learning_rate": {"peak": 3e-4},
    "feedback": {"delay": 64, "timeout": "60s"},
}
"""A run of two groups and two stages; see `train_eventful`."""


def train_eventful(address: str, name: str = "gpt-7b-pretrain") -> Trainer:
    """Return the job of a run that diverged, went back, met a NaN, was cut and was given advice.

    It is under way, at 31,000 of 50,000, with one piece of advice or more that can be approved.
    """
    random = Random(3)

    def loss(n: int) -> float:
        if n == 18_240:
            return math.nan
        return 2.35 + 5.5 * math.exp(-n / 900) + 0.9 * math.exp(-n / 7000) + random.gauss(0.0, 0.06)

    def diverging(n: int) -> float:
        return loss(n) + 1.6 * min(1.0, max(0, n - 12_000) / 600)

    def validation(n: int) -> float | None:
        return loss(n) + 0.05 if n % 1000 == 999 else None

    def norm(n: int) -> float:
        return 0.4 + 2.0 * math.exp(-n / 800) + abs(random.gauss(0.0, 0.1))

    job = Trainer(address, {**EVENTFUL, "name": name})
    job.open()
    asked: list[Any] = []
    at = 0
    while not asked:
        job.train(at, at + 256, diverging, validation=validation, norm=norm)
        at += 256
        asked = [item for item in job.shown().adjustments if item.action == "directive"]
    job.open(11_000, asked[-1].id)
    job.train(11_000, 31_000, loss, validation=validation, norm=norm)
    return job
