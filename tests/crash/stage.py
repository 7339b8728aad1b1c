"""A round that nobody ran: the core in place of the servers, and a clock that counts calls.

For tests of the checker, which take a clean round from here and spoil it.
"""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lrpilot import core
from lrpilot.server._store import LogRow
from lrpilot.v1 import runs_pb2, trainer_pb2
from tests.crash.checker import Violation, check
from tests.crash.history import Record

RUN = "run"

SERVER = "127.0.0.1:1"

OUTCOMES = {
    core.Outcome.RECORDED: trainer_pb2.REPORT_OUTCOME_RECORDED,
    core.Outcome.REPEATED: trainer_pb2.REPORT_OUTCOME_REPEATED,
    core.Outcome.LATE: trainer_pb2.REPORT_OUTCOME_LATE,
}


def spec(**fields: Any) -> core.RunSpec:
    """Return a spec whose LR and WD differ at every progress, with a plateau that fires soon."""
    return core.parse_spec(
        {
            "name": RUN,
            "total": 1000,
            "learning_rate": {"init": 1e-3, "peak": 1e-2, "warmup": 500},
            "weight_decay": {"start": 0.01, "end": 0.1, "style": "cosine", "over": 1000},
            "policies": [{"kind": "plateau", "patience": 0, "factor": 0.5}],
            "feedback": {"delay": 4, "timeout": "60s"},
        }
        | fields
    )


def rechained(events: Sequence[core.Event]) -> list[LogRow]:
    """Return a log of events, with a right chain."""
    return [LogRow(*row, 0) for row in core.rows(core.RunState(RUN), events)]


@dataclass
class Stage:
    """Builds histories and a log; every method is one call of `who`."""

    histories: dict[str, list[Record]] = field(default_factory=dict)
    events: list[core.Event] = field(default_factory=list)
    state: core.RunState = field(default_factory=lambda: core.RunState(RUN))
    now_ns: int = 0
    count: int = 0

    def check(self) -> list[Violation]:
        """Return what the checker says."""
        return check(list(self.histories.values()), {RUN: rechained(self.events)})

    def kinds(self) -> set[str]:
        """Return the kinds of violations that the checker finds."""
        return {item.kind for item in self.check()}

    # What a server does.

    def apply(self, events: Sequence[core.Event]) -> None:
        for event in events:
            self.state.apply(event)
            self.events.append(event)

    def write(self, who: str, what: str, **fields: Any) -> Record:
        self.now_ns += 1
        record = {"t": self.now_ns, "who": who, "what": what, **fields}
        self.histories.setdefault(who, []).append(record)
        return record

    def call(
        self, who: str, method: str, request: Any, serve: Callable[[], Any], server: str = SERVER
    ) -> Any:
        """Write a call, carry it out, and write what came of it; `serve` returns None for no answer
        and a status for a refusal."""
        self.count += 1
        call, packed = self.count, base64.b64encode(request.SerializeToString()).decode("ascii")
        self.write(who, "call", call=call, method=method, server=server, request=packed)
        response = serve()
        if isinstance(response, str):
            self.write(who, "error", call=call, code=response, reason="", details="")
        elif response is not None:
            packed = base64.b64encode(response.SerializeToString()).decode("ascii")
            self.write(who, "answer", call=call, response=packed)
        return response

    @property
    def attempt(self) -> Any:
        return trainer_pb2.Attempt(number=self.state.attempt, token=bytes.fromhex(self.state.token))

    # Calls.

    def attach(self, given: core.RunSpec | None = None) -> None:
        given = given or spec()
        request = trainer_pb2.AttachRunRequest(run=RUN, request_id="attach")

        def serve() -> Any:
            self.apply(core.attach_run(self.state, given, revise=False, request_id="attach"))
            return trainer_pb2.AttachRunResponse(run=RUN, created=True)

        self.call("r0.0", "AttachRun", request, serve)

    def open(self, begin: int | None = None, *, who: str = "r0.0", leader: bool = False) -> Any:
        """Open an attempt, and return it."""
        request_id = f"open-{self.count}"
        request = trainer_pb2.OpenAttemptRequest(run=RUN, request_id=request_id, incarnation=who)

        def serve() -> Any:
            wanted = core.OpenRequest(
                request_id=request_id,
                progress=begin,
                incarnation=who,
                token=f"{self.count:032x}",
                holder="ab" * 16 if leader else "",
            )
            self.apply(core.open_attempt(self.state, wanted))
            state = self.state
            return trainer_pb2.OpenAttemptResponse(
                attempt=self.attempt, begin=state.begin, horizon=state.horizon, delay=state.delay
            )

        self.call(who, "OpenAttempt", request, serve)
        return self.attempt

    def values(self, begin: int, *, who: str = "r0.0", server: str = SERVER, **fields: Any) -> Any:
        """Fetch values, and return the answer."""
        wanted = {"begin": begin, "stride": 1, "count": 128, "in_use": 0} | fields
        request = trainer_pb2.GetValuesRequest(run=RUN, attempt=self.attempt, **wanted)

        def serve() -> Any:
            asked = core.ValuesRequest(**wanted)
            found = core.get_values(self.state, asked)
            if isinstance(found, core.Recorded):
                self.apply([found])
                found = core.get_values(self.state, asked)
            answer = trainer_pb2.GetValuesResponse(
                horizon=self.state.horizon, frontier=self.state.frontier
            )
            if isinstance(found, core.Block):
                answer.block.begin, answer.block.stride = found.begin, found.stride
                answer.block.learning_rates.extend(found.learning_rates)
                answer.block.weight_decays.extend(found.weight_decays or ())
            return answer

        return self.call(who, "GetValues", request, serve, server)

    def use(self, progress: int, *, who: str = "r0.0") -> Record:
        """Use the values that are fixed there."""
        rates, decays = self.state.values(progress)
        return self.write(
            who,
            "used",
            run=RUN,
            attempt=self.state.attempt,
            progress=progress,
            learning_rates=[value.hex() for value in rates],
            weight_decays=[value.hex() for value in decays or ()],
        )

    def report(
        self,
        *reports: tuple[int, float | None],
        who: str = "r0.0",
        lost: bool = False,
        skipped: bool = False,
        **validation: float,
    ) -> Any:
        """Report losses by progress; `lost`: the answer does not come."""
        request = trainer_pb2.ReportLossesRequest(run=RUN, attempt=self.attempt, incarnation=who)
        items = []
        for at, loss in reports:
            to = at if skipped else at + 1
            items.append(core.Report(at, loss, 1.0, to, skipped=skipped, validation=validation))
            request.reports.add(
                progress=at,
                loss=loss,
                moves_to=to,
                skipped=skipped,
                validation_losses=validation,
            )

        def serve() -> Any:
            events, outcomes = core.report_losses(self.state, items, rank=0, incarnation=who)
            self.apply(events)
            if lost:
                return None
            return trainer_pb2.ReportLossesResponse(
                outcomes=[OUTCOMES[item] for item in outcomes],
                frontier=self.state.frontier,
                horizon=self.state.horizon,
            )

        return self.call(who, "ReportLosses", request, serve)

    def waive(self) -> None:
        """Let blocked ranks have waited too long."""
        self.apply(core.waive(self.state, self.state.horizon))

    def adjust(self, factor: float, request_id: str = "half", *, lost: bool = False) -> Any:
        """Multiply the LR as an operator."""
        request = runs_pb2.AdjustRunRequest(
            run=RUN, scale_lr=factor, request_id=request_id, author="oncall", reason="try"
        )

        def serve() -> Any:
            effective = self.state.horizon
            action = core.ScaleLearningRate(factor)
            events = core.adjust_run(
                self.state, action, reason="try", author="oncall", request_id=request_id
            )
            self.apply(events)
            return None if lost else runs_pb2.AdjustRunResponse(effective=effective)

        return self.call("o.0", "AdjustRun", request, serve)

    def save(self, progress: int) -> None:
        """Save a state."""
        request = trainer_pb2.SaveStateRequest(run=RUN, attempt=self.attempt, progress=progress)
        self.call(
            "r0.0",
            "SaveState",
            request,
            lambda: trainer_pb2.SaveStateResponse(state=core.save_state(self.state, progress)),
        )

    def train(self, begin: int, end: int) -> None:
        """Step from one progress to another: fetch, use on two ranks, report."""
        for at in range(begin, end):
            self.values(at)
            self.values(at, who="r1.0", server="127.0.0.1:2")
            self.use(at)
            self.use(at, who="r1.0")
            self.report((at, 1.0 + 0.25 * (at % 3)))
