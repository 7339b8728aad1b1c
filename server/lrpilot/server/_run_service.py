"""The service for people: create, look at, revise and end runs."""

import time
from collections.abc import Mapping, Set

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from lrpilot import core
from lrpilot.server._documents import dump_document, read_spec
from lrpilot.server._ledger import Ledger, LiveRun
from lrpilot.server._rpc import Behaviour, require
from lrpilot.server._store import LogRow
from lrpilot.v1 import runs_pb2 as pb

LIVE_S = 120.0
"""A run whose ranks asked for something within this time is live: ending it needs force."""

PAGE_OF_RUNS, MAX_PAGE_OF_RUNS = 50, 500
PAGE_OF_EVENTS, MAX_PAGE_OF_EVENTS = 200, 1000
MAX_PAGE_BYTES = 512 * 1024
"""A page ends early rather than exceed this: messages are bounded at 1 MiB."""
MAX_ADJUSTMENTS_BYTES = 256 * 1024
"""A run shows its newest adjustments, as many as fit in this; its history has all of them."""


class RunService:
    """Behaviour of `lrpilot.v1.RunService`."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    @property
    def behaviours(self) -> Mapping[str, Behaviour]:
        """Method name to behaviour."""
        return {
            "CreateRun": self.create_run,
            "GetRun": self.get_run,
            "ListRuns": self.list_runs,
            "ReviseRun": self.revise_run,
            "ListEvents": self.list_events,
            "FinishRun": self.finish_run,
            "DeleteRun": self.delete_run,
        }

    @property
    def requests(self) -> Mapping[str, type[Message]]:
        """Name of each request message to its class."""
        return {
            "CreateRunRequest": pb.CreateRunRequest,
            "GetRunRequest": pb.GetRunRequest,
            "ListRunsRequest": pb.ListRunsRequest,
            "ReviseRunRequest": pb.ReviseRunRequest,
            "ListEventsRequest": pb.ListEventsRequest,
            "FinishRunRequest": pb.FinishRunRequest,
            "DeleteRunRequest": pb.DeleteRunRequest,
        }

    async def create_run(self, request: pb.CreateRunRequest) -> pb.CreateRunResponse:
        """See the proto file."""
        require("request_id", request.request_id)
        spec = read_spec(request.spec_document)
        run = await self._ledger.find(spec.name)
        await self._ledger.transact(
            run, lambda state: (core.create_run(state, spec, request.request_id), None)
        )
        return pb.CreateRunResponse(run=run_message(run))

    async def get_run(self, request: pb.GetRunRequest) -> pb.GetRunResponse:
        """See the proto file."""
        return pb.GetRunResponse(run=run_message(await self._ledger.run(request.run)))

    async def list_runs(self, request: pb.ListRunsRequest) -> pb.ListRunsResponse:
        """See the proto file."""
        size = _page_size(request.page_size, PAGE_OF_RUNS, MAX_PAGE_OF_RUNS)
        names = await self._ledger.names(request.page_token, size + 1)
        answer = pb.ListRunsResponse()
        room = MAX_PAGE_BYTES
        done = 0
        for name in names[:size]:
            run = await self._ledger.find(name)
            if run.state.exists:
                message = run_message(run)
                message.ClearField("adjustments")
                message.ClearField("spec_document")
                room -= message.ByteSize()
                if room < 0 and answer.runs:
                    break
                answer.runs.append(message)
            done += 1
        if done < len(names):
            answer.next_page_token = names[done - 1]
        return answer

    async def revise_run(self, request: pb.ReviseRunRequest) -> pb.ReviseRunResponse:
        """See the proto file."""
        require("request_id", request.request_id)
        spec = read_spec(request.spec_document)
        if spec.name != request.run:
            raise core.InvalidSpec(
                "a revision cannot rename a run",
                [core.Violation("name", repr(spec.name), repr(request.run))],
            )
        run = await self._ledger.run(request.run)

        def evaluate(state: core.RunState) -> tuple[list[core.Event], tuple[int, bool]]:
            events = core.revise_run(state, spec, request.request_id)
            done = state.answers.get(request.request_id)
            if done is not None:
                return events, (done[1], False)
            return events, (state.horizon, not events)

        effective, unchanged = await self._ledger.transact(run, evaluate)
        return pb.ReviseRunResponse(effective=effective, run=run_message(run), unchanged=unchanged)

    async def list_events(self, request: pb.ListEventsRequest) -> pb.ListEventsResponse:
        """See the proto file."""
        run = await self._ledger.run(request.run)
        size = _page_size(request.page_size, PAGE_OF_EVENTS, MAX_PAGE_OF_EVENTS)
        after = _page_start(request.page_token)
        rows = await self._ledger.history(request.run, after, size + 1)
        decided: dict[int, list[pb.Adjustment]] = {}
        for item in adjustment_messages(run.state):
            decided.setdefault(item.seq, []).append(item)
        answer = pb.ListEventsResponse()
        room = MAX_PAGE_BYTES
        for row in rows[:size]:
            event = event_message(row, run.late)
            event.adjustments.extend(decided.get(row.seq, ()))
            room -= event.ByteSize()
            if room < 0 and answer.events:
                break
            answer.events.append(event)
        if len(answer.events) < len(rows):
            answer.next_page_token = str(answer.events[-1].seq)
        return answer

    async def finish_run(self, request: pb.FinishRunRequest) -> pb.FinishRunResponse:
        """See the proto file."""
        require("request_id", request.request_id)
        run = await self._ledger.run(request.run)

        def evaluate(state: core.RunState) -> tuple[list[core.Event], None]:
            events = core.finish_run(state, request.request_id)
            if events and not request.force:
                _refuse_live(run, "finish")
            return events, None

        await self._ledger.transact(run, evaluate)
        return pb.FinishRunResponse(run=run_message(run))

    async def delete_run(self, request: pb.DeleteRunRequest) -> pb.DeleteRunResponse:
        """See the proto file."""
        run = await self._ledger.run(request.run)

        def check(state: core.RunState) -> None:
            if not state.exists:
                raise core.run_not_found(request.run, ())
            if not request.force:
                _refuse_live(run, "delete")

        await self._ledger.delete(run, check)
        return pb.DeleteRunResponse()


def run_message(run: LiveRun) -> pb.Run:
    """Return a run as people see it."""
    state = run.state
    spec = state.spec
    rates, decays = state.values(state.progress)
    return pb.Run(
        name=state.name,
        state=_run_state(state),
        spec_document=dump_document(spec.to_mapping()),
        unit=spec.unit,
        total=spec.total,
        attempt=state.attempt,
        begin=state.begin,
        progress=state.progress,
        frontier=state.frontier,
        horizon=state.horizon,
        delay=state.delay,
        values=[
            pb.GroupValues(
                name=name,
                learning_rate=rates[index],
                weight_decay=None if decays is None else decays[index],
            )
            for index, name in enumerate(spec.group_names)
        ],
        loss=state.loss_values[-1] if state.loss_values else None,
        smoothed_loss=state.observers.smoothed_loss,
        losses=state.losses,
        nonfinite_losses=state.observers.nonfinite,
        waivers=state.waivers,
        late_losses=len(state.late),
        adjustments=_newest(adjustment_messages(state)),
        seq=state.seq,
        digest=state.digest,
        created_at=_timestamp(run.created_ns),
        updated_at=_timestamp(run.updated_ns),
    )


def adjustment_messages(state: core.RunState) -> list[pb.Adjustment]:
    """Return every adjustment and advice of a run in order of decision."""
    kept = [(item, False) for item in (*state.plan.adjustments, *state.advice)]
    gone = [(item, True) for item in state.forgotten]
    ordered = sorted(kept + gone, key=lambda pair: pair[0].decision)
    return [
        pb.Adjustment(
            effective=item.effective,
            decided_at=item.decided_at,
            source=item.source,
            action="multiply",
            factor=item.multiply.factor,
            reason=item.multiply.reason,
            before=item.before,
            after=item.after,
            mode=item.mode,
            seq=item.seq,
            forgotten=forgotten,
        )
        for item, forgotten in ordered
    ]


def _newest(adjustments: list[pb.Adjustment]) -> list[pb.Adjustment]:
    kept: list[pb.Adjustment] = []
    room = MAX_ADJUSTMENTS_BYTES
    for item in reversed(adjustments):
        room -= item.ByteSize()
        if room < 0:
            break
        kept.append(item)
    return kept[::-1]


def event_message(row: LogRow, late: Set[tuple[int, int]]) -> pb.Event:
    """Return one row of a log as people see it; `late` is that of LiveRun."""
    event = core.decode(row.payload)
    message = pb.Event(
        seq=row.seq,
        digest=row.digest,
        recorded_at=_timestamp(row.recorded_at_ns),
        kind=event.kind,
        attempt=getattr(event, "attempt", 0),
    )
    match event:
        case core.Created():
            message.summary = "created by a trainer" if event.by_trainer else "created"
        case core.Attached():
            message.summary = "a trainer gave the spec of the run"
        case core.Opened():
            message.progress = event.begin
            message.summary = f"attempt {event.attempt} opened at progress {event.begin}"
            if event.lost_seq:
                message.summary += (
                    f", restored from a state of a lost log (seq {event.lost_seq}, digest "
                    f"{event.lost_digest[:12]})"
                )
            elif event.fold is not None:
                message.summary += ", from a state whose past is not the log's"
        case core.Joined():
            message.summary = "the reporter joined"
        case core.Reported():
            message.progress = event.reports[0].progress
            message.losses.extend(
                pb.LossRecord(
                    progress=item.progress,
                    loss=item.loss,
                    weight=item.weight,
                    late=item.loss is not None and (row.seq, item.progress) in late,
                )
                for item in event.reports
            )
            first, last = event.reports[0], event.reports[-1]
            message.summary = (
                f"reported progress {first.progress}, moved to {last.moves_to}"
                if len(event.reports) == 1
                else f"reported {len(event.reports)} steps, progress {first.progress} to "
                f"{last.progress}, moved to {last.moves_to}"
            )
        case core.Recorded():
            message.progress = event.begin
            message.summary = (
                f"values recorded from progress {event.begin} on, stride {event.stride}"
            )
        case core.Waived():
            message.progress = event.until
            message.summary = f"missing losses below progress {event.until} waived"
        case core.Revised():
            if event.effective is None:
                message.summary = "new spec from where the next attempt opens"
            else:
                message.progress = event.effective
                message.summary = f"new spec from progress {event.effective} on"
        case core.Finished():
            message.summary = "finished"
    return message


def _run_state(state: core.RunState) -> pb.RunState.ValueType:
    if state.finished:
        return pb.RUN_STATE_FINISHED
    return pb.RUN_STATE_RUNNING if state.attempt else pb.RUN_STATE_CREATED


def _refuse_live(run: LiveRun, verb: str) -> None:
    state = run.state
    if not state.attempt or state.finished or state.frontier >= state.spec.total:
        return
    idle_s = time.time() - run.updated_ns / 1e9
    if run.seen_s is not None:
        idle_s = min(idle_s, time.monotonic() - run.seen_s)
    if idle_s < LIVE_S:
        raise core.RunLive(
            f"run {state.name!r} is live: attempt {state.attempt} is at progress "
            f"{state.frontier} of {state.spec.total} and its ranks asked for something "
            f"{idle_s:.0f} s ago; {verb} it with --force",
            run=state.name,
            attempt=state.attempt,
            frontier=state.frontier,
        )


def _page_size(wanted: int, default: int, most: int) -> int:
    if not 0 <= wanted <= most:
        raise core.InvalidRequest(
            "the page size is invalid",
            [core.Violation("page_size", str(wanted), f"1 to {most}, or 0 for {default}")],
        )
    return wanted or default


def _page_start(token: str) -> int:
    # No `seq` has more digits than 19, and Python refuses to read thousands.
    if token and not (token.isascii() and token.isdigit() and len(token) < 20):
        raise core.InvalidRequest(
            "the page token is invalid",
            [core.Violation("page_token", repr(token), "next_page_token of the page before")],
        )
    return int(token or 0)


def _timestamp(nanoseconds: int) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(nanoseconds)
    return stamp
