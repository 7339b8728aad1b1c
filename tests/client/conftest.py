"""A server that answers what a test tells it to, and pilots that end with their test."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

import lrpilot.client as lrpilot
from lrpilot.client import _timing
from lrpilot.v1 import errors_pb2, trainer_pb2_grpc
from lrpilot.v1 import trainer_pb2 as pb

DETAILS_KEY = "grpc-status-details-bin"
PATIENCE_S = 20.0


@dataclass(frozen=True)
class Fault:
    """What a call does in place of its answer."""

    code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
    text: str = "staged"
    packed: bytes | None = None
    after: bool = False
    """The call is carried out, and its answer is lost."""


def details(
    reason: str,
    facts: Mapping[str, str] | None = None,
    violations: Sequence[tuple[str, str]] = (),
) -> bytes:
    """Return what a server packs beside the status."""
    status = errors_pb2.Status(message="text")
    info = errors_pb2.ErrorInfo(reason=reason, domain="lrpilot", metadata=facts or {})
    item = status.details.add()
    item.type_url, item.value = "type.googleapis.com/google.rpc.ErrorInfo", info.SerializeToString()
    if violations:
        bad = errors_pb2.BadRequest()
        for name, text in violations:
            bad.field_violations.add(field=name, description=text)
        item = status.details.add()
        item.type_url = "type.googleapis.com/google.rpc.BadRequest"
        item.value = bad.SerializeToString()
    return status.SerializeToString()


def refusal(
    reason: str,
    text: str = "refused",
    code: grpc.StatusCode = grpc.StatusCode.FAILED_PRECONDITION,
    violations: Sequence[tuple[str, str]] = (),
    **facts: str,
) -> Fault:
    """Return a fault that the contract names."""
    return Fault(code, text, details(reason, facts, violations))


@dataclass
class FakeTrainer:
    """A TrainerService over gRPC with one run, whose values follow a formula."""

    unit: str = "iterations"
    groups: list[str] = field(default_factory=lambda: [""])
    has_weight_decay: bool = True
    delay: int = 8
    begin: int = 0
    feedback: bool = True
    state: bytes = b"the fold"

    def __post_init__(self) -> None:
        self.changed = threading.Condition()
        self.calls: dict[str, list[Any]] = defaultdict(list)
        self.answered: dict[str, int] = defaultdict(int)
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.always: dict[str, Fault] = {}
        self.losses: dict[int, float | None] = {}
        self.reports: list[pb.LossReport] = []
        """Every report, in order of arrival."""
        self.directives: list[pb.Directive] = []
        self.changes: list[pb.Change] = []
        self.in_force: list[pb.Change] = []
        self.plan = "one"
        self.offer_factor = 1.0
        """By what an offered learning rate is told from one that is fixed."""
        self.declared: dict[int, tuple[tuple[float, float], ...]] = {}
        """What a holder has declared: the pairs of each group by progress."""
        self.attempt = 1
        self.keys: set[str] = set()
        self.outcome = pb.REPORT_OUTCOME_RECORDED
        self.frontier = 0
        self.horizon: int | None = None
        """Set: what the horizon is, whatever was reported."""
        self.limit = 2**53
        """First progress whose values are refused."""
        self.port = 0
        self._server: Any = None
        self.start()

    # What tests do.

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen on the port that it had before, or on a free one."""
        self._server = grpc.server(
            futures.ThreadPoolExecutor(24), options=[("grpc.so_reuseport", 0)]
        )
        service: Any = _Service(self)
        trainer_pb2_grpc.add_TrainerServiceServicer_to_server(service, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        """Cut every call and connection."""
        self._server.stop(0).wait()

    def fail(self, method: str, fault: Fault, times: int = 1) -> None:
        """Let the next calls of a method meet a fault."""
        with self.changed:
            self.faults[method].extend([fault] * times)

    def move(self, horizon: int) -> None:
        """Fix the values below a progress."""
        with self.changed:
            self.horizon = horizon
            self.changed.notify_all()

    def wait(self, condition: Callable[[], object]) -> None:
        """Wait until something that calls change holds."""
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE_S)

    def wait_calls(self, method: str, count: int) -> list[Any]:
        """Wait until a method was called that often and return its requests."""
        self.wait(lambda: len(self.calls[method]) >= count)
        return self.calls[method]

    @staticmethod
    def rate(progress: int, group: int = 0) -> float:
        return (1.0 + group) / (progress + 3.0)

    @staticmethod
    def decay(progress: int, group: int = 0) -> float:
        return 0.1 * (progress + 1) + group

    # What calls do.

    @staticmethod
    def token(attempt: int) -> bytes:
        return b"0123456789abcde" + str(attempt).encode()

    def holder(self) -> bytes:
        """Return the token of the holder of the attempt."""
        return b"holder" + str(self.attempt).encode()

    def fixed(self) -> int:
        if self.horizon is not None:
            return self.horizon
        return max(self.begin, self.frontier) + self.delay

    def attach_run(self, request: pb.AttachRunRequest) -> pb.AttachRunResponse:
        return pb.AttachRunResponse(run=request.run, created=True)

    def open_attempt(self, request: pb.OpenAttemptRequest) -> pb.OpenAttemptResponse:
        if request.HasField("progress"):
            self.begin = request.progress
            self.frontier = max(self.frontier, self.begin)
        if request.directive and not (request.key and request.key in self.keys):
            # A rollback: what came after is forgotten.
            self.attempt += 1
            self.frontier = self.begin
        self.keys.add(request.key)
        return pb.OpenAttemptResponse(
            holder=self.holder() if request.leader else b"",
            attempt=pb.Attempt(number=self.attempt, token=self.token(self.attempt)),
            begin=self.begin,
            delay=self.delay,
            horizon=self.fixed(),
            unit=self.unit,
            groups=self.groups,
            has_weight_decay=self.has_weight_decay,
            feedback=self.feedback,
        )

    def get_values(self, request: pb.GetValuesRequest) -> pb.GetValuesResponse:
        if not self.feedback:
            self.frontier = max(self.frontier, request.in_use)
        self.changed.wait_for(lambda: request.begin < self.fixed(), request.wait_ms / 1000)
        answer = pb.GetValuesResponse(horizon=self.fixed(), frontier=self.frontier, plan=self.plan)
        steps = range(
            request.begin,
            min(self.fixed(), request.begin + request.count * request.stride),
            request.stride,
        )
        if steps:
            answer.block.CopyFrom(self.block(steps))
            answer.directives.extend(item for item in self.directives if item.progress <= steps[-1])
            if request.explain:
                first = steps[0] - request.stride
                answer.changes.extend(
                    item for item in self.changes if first < item.progress <= steps[-1]
                )
        return answer

    def block(self, steps: range, factor: float = 1.0) -> pb.Block:
        """Return the values of some steps: what was declared, else the formula."""
        block = pb.Block(begin=steps[0], stride=steps.step)
        for at in steps:
            formula = [
                (factor * self.rate(at, group), self.decay(at, group)) for group in self.members
            ]
            for rate, decay in self.declared.get(at, formula):
                block.learning_rates.append(rate)
                if self.has_weight_decay:
                    block.weight_decays.append(decay)
        return block

    @property
    def members(self) -> range:
        return range(len(self.groups))

    def offer_values(self, request: pb.OfferValuesRequest) -> pb.OfferValuesResponse:
        steps = range(request.begin, request.begin + request.count * request.stride, request.stride)
        return pb.OfferValuesResponse(
            block=self.block(steps, self.offer_factor),
            plan=self.plan,
            permitted=steps[-1] + 1,
            offer=len(self.calls["OfferValues"]),
        )

    def declare_values(self, request: pb.DeclareValuesRequest) -> pb.DeclareValuesResponse:
        size = len(self.groups)
        for block in request.blocks:
            decays = block.weight_decays or [0.0] * len(block.learning_rates)
            pairs = list(zip(block.learning_rates, decays, strict=True))
            for step in range(len(pairs) // size):
                at = block.begin + step * block.stride
                self.declared[at] = tuple(pairs[step * size : (step + 1) * size])
        end = max(self.declared) + 1
        self.frontier = max(self.frontier, end - self.delay)
        return pb.DeclareValuesResponse(horizon=self.fixed(), frontier=self.frontier)

    def report_losses(self, request: pb.ReportLossesRequest) -> pb.ReportLossesResponse:
        self.reports.extend(request.reports)
        for report in request.reports:
            self.losses[report.progress] = report.loss if report.HasField("loss") else None
            self.frontier = max(self.frontier, report.moves_to)
        return pb.ReportLossesResponse(
            outcomes=[self.outcome] * len(request.reports),
            frontier=self.frontier,
            horizon=self.fixed(),
        )

    def save_state(self, request: pb.SaveStateRequest) -> pb.SaveStateResponse:
        return pb.SaveStateResponse(state=self.state, in_force=self.in_force)

    def acknowledge_directive(
        self, request: pb.AcknowledgeDirectiveRequest
    ) -> pb.AcknowledgeDirectiveResponse:
        return pb.AcknowledgeDirectiveResponse()


class _Service:
    def __init__(self, trainer: FakeTrainer) -> None:
        behaviours: dict[str, Callable[..., Any]] = {
            "AttachRun": trainer.attach_run,
            "OpenAttempt": trainer.open_attempt,
            "GetValues": trainer.get_values,
            "ReportLosses": trainer.report_losses,
            "SaveState": trainer.save_state,
            "AcknowledgeDirective": trainer.acknowledge_directive,
            "OfferValues": trainer.offer_values,
            "DeclareValues": trainer.declare_values,
        }
        for method, behaviour in behaviours.items():
            setattr(self, method, self._served(trainer, method, behaviour))

    def _served(self, trainer: FakeTrainer, method: str, behaviour: Callable[..., Any]) -> Any:
        def serve(request: Any, context: Any) -> Any:
            with trainer.changed:
                trainer.calls[method].append(request)
                trainer.changed.notify_all()
                staged = trainer.faults[method]
                fault = staged.popleft() if staged else trainer.always.get(method)
                if hasattr(request, "attempt") and request.attempt.number != trainer.attempt:
                    fault = refusal("AttemptSuperseded", "another attempt has opened")
                if request.DESCRIPTOR.name == "GetValuesRequest" and request.begin >= trainer.limit:
                    fault = refusal("BeyondHorizon", "far ahead", grpc.StatusCode.OUT_OF_RANGE)
                answer = None
                if fault is None or fault.after:
                    answer = behaviour(request)
                trainer.answered[method] += 1
                trainer.changed.notify_all()
            if fault is not None:
                packed = () if fault.packed is None else ((DETAILS_KEY, fault.packed),)
                context.set_trailing_metadata(packed)
                context.abort(fault.code, fault.text)
            return answer

        return serve


class FakeOptimizer:
    """Param groups, and hooks before a step, as an optimizer of torch has them."""

    def __init__(self, *groups: dict[str, Any]) -> None:
        self.param_groups = list(groups) or [{"lr": 1.0, "weight_decay": 0.01}]
        self.hooks: dict[int, Any] = {}

    @property
    def rates(self) -> list[Any]:
        return [group["lr"] for group in self.param_groups]

    @property
    def decays(self) -> list[Any]:
        return [group.get("weight_decay") for group in self.param_groups]

    def register_step_pre_hook(self, hook: Any) -> Any:
        key = len(self.hooks)
        self.hooks[key] = hook
        outer = self

        class Handle:
            def remove(self) -> None:
                del outer.hooks[key]

        return Handle()

    def step(self) -> None:
        for hook in list(self.hooks.values()):
            hook(self, (), {})


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {
        "BLOCKED_WAIT_S": 0.05,
        "RENEW_WAIT_S": 0.2,
        "LEADER_PATIENCE_S": 20.0,
        "HOLDER_WAIT_S": 0.1,
        "SAVE_WAIT_S": 0.05,
        "BACKOFF_FIRST_S": 0.001,
        "BACKOFF_CAP_S": 0.01,
        "CALL_S": 5.0,
    }.items():
        monkeypatch.setattr(_timing, name, seconds)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def trainer() -> Iterator[FakeTrainer]:
    """A server with one run of one unnamed group."""
    server = FakeTrainer()
    yield server
    server.stop()


@pytest.fixture
def connect(trainer: FakeTrainer) -> Iterator[Callable[..., lrpilot.Pilot]]:
    """Connect to `trainer`; what a test left open is closed without waiting for reports."""
    pilots: list[lrpilot.Pilot] = []

    def connect(**options: Any) -> lrpilot.Pilot:
        pilots.append(lrpilot.connect(trainer.address, **{"run": "small", **options}))
        return pilots[-1]

    yield connect
    for pilot in pilots:
        pilot._end(0.0)


@pytest.fixture
def optimizer() -> FakeOptimizer:
    """An optimizer with one param group of weight decay 0.01."""
    return FakeOptimizer()


@pytest.fixture
def make_optimizer() -> type[FakeOptimizer]:
    """Make an optimizer with the param groups given."""
    return FakeOptimizer


@pytest.fixture
def refuse() -> Callable[..., Fault]:
    """Make a refusal that the contract names, from its reason."""
    return refusal


@pytest.fixture
def fault() -> type[Fault]:
    """Make a fault from a status."""
    return Fault
