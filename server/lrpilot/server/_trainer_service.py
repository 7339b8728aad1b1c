"""The service for ranks: decode, evaluate on the core, append, encode."""

import asyncio
import secrets
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

from google.protobuf.message import Message

from lrpilot import core
from lrpilot.server._documents import read_spec
from lrpilot.server._ledger import Ledger
from lrpilot.server._live_run import LiveRun
from lrpilot.server._recent import Asked
from lrpilot.server._rpc import Behaviour, require
from lrpilot.server._tracing import NO_TRACING, Tracing
from lrpilot.server._trainer_messages import (
    block_message,
    change_messages,
    read_blocks,
    read_held,
)
from lrpilot.v1 import trainer_pb2 as pb

MAX_WAIT_S = 30.0
"""Longest that one call waits; a client asks again."""

MAX_REPORTS = 4096
"""Most reports in one call."""

MAX_DIRECTIVES = 16
"""Most directives in one answer, the newest."""

MAX_CACHED_BLOCKS = 4096
"""Serialized blocks kept per run; dropped all at once, since they are cheap to make again."""

LOG_NAME_BYTES = 16
"""Bytes of the digest that names a log, as clients hand it back."""

_OUTCOMES = {
    core.Outcome.RECORDED: pb.REPORT_OUTCOME_RECORDED,
    core.Outcome.REPEATED: pb.REPORT_OUTCOME_REPEATED,
    core.Outcome.LATE: pb.REPORT_OUTCOME_LATE,
}

_DIRECTIVE_KINDS = {
    "rollback": pb.DIRECTIVE_KIND_ROLLBACK,
    "skip": pb.DIRECTIVE_KIND_SKIP,
    "evaluate": pb.DIRECTIVE_KIND_EVALUATE,
    "stop": pb.DIRECTIVE_KIND_STOP,
}

_DIRECTIVE_OUTCOMES: Mapping[int, str] = {
    pb.DIRECTIVE_OUTCOME_DONE: "done",
    pb.DIRECTIVE_OUTCOME_FAILED: "failed",
    pb.DIRECTIVE_OUTCOME_UNHANDLED: "unhandled",
}


class TrainerService:
    """Behaviour of `lrpilot.v1.TrainerService`."""

    def __init__(self, ledger: Ledger, tracing: Tracing = NO_TRACING) -> None:
        self._ledger = ledger
        self._tracing = tracing
        self._draining = asyncio.Event()

    @property
    def behaviours(self) -> Mapping[str, Behaviour]:
        """Method name to behaviour."""
        return {
            "AttachRun": self.attach_run,
            "OpenAttempt": self.open_attempt,
            "GetValues": self.get_values,
            "ReportLosses": self.report_losses,
            "SaveState": self.save_state,
            "AcknowledgeDirective": self.acknowledge_directive,
            "OfferValues": self.offer_values,
            "DeclareValues": self.declare_values,
        }

    @property
    def requests(self) -> Mapping[str, type[Message]]:
        """Name of each request message to its class."""
        return {
            "AttachRunRequest": pb.AttachRunRequest,
            "OpenAttemptRequest": pb.OpenAttemptRequest,
            "GetValuesRequest": pb.GetValuesRequest,
            "ReportLossesRequest": pb.ReportLossesRequest,
            "SaveStateRequest": pb.SaveStateRequest,
            "AcknowledgeDirectiveRequest": pb.AcknowledgeDirectiveRequest,
            "OfferValuesRequest": pb.OfferValuesRequest,
            "DeclareValuesRequest": pb.DeclareValuesRequest,
        }

    def drain(self) -> None:
        """Answer everyone who waits, now: their next call finds the next server."""
        self._draining.set()
        self._ledger.wake()

    async def attach_run(self, request: pb.AttachRunRequest) -> pb.AttachRunResponse:
        """See the proto file."""
        require("run", request.run)
        require("request_id", request.request_id)
        spec = read_spec(request.spec_document) if request.spec_document else None
        if spec is not None and spec.name != request.run:
            raise core.InvalidSpec(
                "the spec is of another run",
                [core.Violation("name", repr(spec.name), f"the run's name, {request.run!r}")],
            )
        run = await (self._ledger.run if spec is None else self._ledger.find)(request.run)
        revise = request.on_change == pb.ON_CHANGE_REVISE

        def evaluate(state: core.RunState) -> tuple[list[core.Event], tuple[bool, bool]]:
            events = core.attach_run(state, spec, revise=revise, request_id=request.request_id)
            # A retry finds the answer that the first call left in the log.
            kind = events[0].kind if events else state.answers.get(request.request_id, ("", 0))[0]
            return events, (kind == "created", kind == "revised")

        def answer(state: core.RunState, done: tuple[bool, bool]) -> pb.AttachRunResponse:
            created, revised = done
            return pb.AttachRunResponse(
                run=request.run, created=created, revised=revised, has_losses=state.has_losses
            )

        attached = await self._ledger.respond(run, evaluate, answer)
        _seen(run)
        return attached

    async def open_attempt(self, request: pb.OpenAttemptRequest) -> pb.OpenAttemptResponse:
        """See the proto file."""
        require("run", request.run)
        require("request_id", request.request_id)
        require("incarnation", request.incarnation)
        saved = core.read_state(request.state, request.run) if request.state else None
        run = await (self._ledger.run if saved is None else self._ledger.find)(request.run)
        wanted = core.OpenRequest(
            request_id=request.request_id,
            key=request.key,
            progress=request.progress if request.HasField("progress") else None,
            saved=saved,
            rank=request.rank,
            reporters=_reporters(request),
            incarnation=request.incarnation,
            token=secrets.token_hex(16),
            holder=secrets.token_hex(16) if request.leader else "",
            directive=request.directive,
            met_in=(
                (request.met_in.number, request.met_in.token.hex())
                if request.HasField("met_in")
                else None
            ),
        )
        if saved is not None:
            digest = await self._ledger.digest_at(request.run, saved.seq)
            wanted = replace(wanted, digest_at_saved=digest)

        def evaluate(
            state: core.RunState,
        ) -> tuple[list[core.Event], core.Opened | None]:
            events = core.open_attempt(state, wanted)
            return events, next((item for item in events if isinstance(item, core.Opened)), None)

        def answer(state: core.RunState, opened: core.Opened | None) -> pb.OpenAttemptResponse:
            restored = opened is not None and opened.lost_seq > 0
            repeated = state.answers.get(request.request_id) == ("opened", state.attempt)
            return pb.OpenAttemptResponse(
                attempt=pb.Attempt(number=state.attempt, token=bytes.fromhex(state.token)),
                begin=state.begin,
                delay=state.delay,
                horizon=state.horizon,
                unit=state.spec.unit,
                groups=state.spec.group_names,
                has_weight_decay=state.spec.has_weight_decay,
                feedback=state.spec.has_feedback,
                joined=not repeated,
                restored=restored,
                holder=bytes.fromhex(state.holder) if repeated else b"",
                log=bytes.fromhex(state.log)[:LOG_NAME_BYTES],
            )

        attempt = await self._ledger.respond(run, evaluate, answer)
        _seen(run)
        return attempt

    async def get_values(self, request: pb.GetValuesRequest) -> bytes:
        """See the proto file."""
        run = await self._ledger.run(request.run)
        wanted = core.ValuesRequest(
            begin=request.begin,
            stride=request.stride,
            count=request.count,
            in_use=request.in_use,
        )
        end_s = time.monotonic() + min(request.wait_ms / 1000.0, MAX_WAIT_S)
        await self._compare(run, request.attempt, read_held(request.held))
        if run.state.holder:
            # What is recorded here may be undone by a declaration that another replica took.
            await self._ledger.refresh(run)
        asker = _Asker(request.attempt, request.holder.hex())
        block = await self._block(run, asker, wanted)
        # Also before a wait, which may be long: its ranks are there.
        _seen(run)
        lag, now_s = max(0, run.state.progress - request.in_use), time.monotonic()
        run.lag.add(lag, now_s)
        if request.HasField("held"):
            run.ranks.add(Asked(request.held.rank, request.in_use, lag, now_s))
        if block is None:
            async with run.blocked() if request.blocked else nullcontext():
                with self._tracing.waiting():
                    block = await self._wait(run, asker, wanted, end_s, blocked=request.blocked)
        _seen(run)
        state = run.state
        rest = pb.GetValuesResponse(
            horizon=state.horizon,
            frontier=state.frontier,
            directives=[] if block is None else _directives(state, block),
            plan=state.etag,
        )
        if block is not None and request.explain:
            changes = state.plan.changes(block.begin - block.stride + 1, block.last)
            rest.changes.extend(change_messages(changes))
        # Serialized messages that follow each other are merged when they are read.
        return (b"" if block is None else _block_bytes(run, block)) + rest.SerializeToString()

    async def report_losses(self, request: pb.ReportLossesRequest) -> pb.ReportLossesResponse:
        """See the proto file."""
        run = await self._ledger.run(request.run)
        if len(request.reports) > MAX_REPORTS:
            raise core.InvalidRequest(
                "too many reports in one call",
                [core.Violation("reports", str(len(request.reports)), f"at most {MAX_REPORTS}")],
            )
        require("incarnation", request.incarnation)
        await self._compare(run, request.attempt, read_held(request.held))
        reports = [_report(item) for item in request.reports]

        def evaluate(state: core.RunState) -> tuple[list[core.Event], list[core.Outcome]]:
            _check(state, request.attempt)
            return core.report_losses(
                state, reports, rank=request.rank, incarnation=request.incarnation
            )

        def answer(state: core.RunState, outcomes: list[core.Outcome]) -> pb.ReportLossesResponse:
            return pb.ReportLossesResponse(
                outcomes=[_OUTCOMES[outcome] for outcome in outcomes],
                frontier=state.frontier,
                horizon=state.horizon,
            )

        reported = await self._ledger.respond(run, evaluate, answer)
        _seen(run)
        return reported

    async def save_state(self, request: pb.SaveStateRequest) -> pb.SaveStateResponse:
        """See the proto file."""
        run = await self._ledger.run(request.run)
        await self._compare(run, request.attempt, read_held(request.held))
        # A checkpoint holds all that was acknowledged, by whichever replica.
        await self._ledger.refresh(run)
        end_s = time.monotonic() + min(request.wait_ms / 1000.0, MAX_WAIT_S)

        def save(state: core.RunState) -> pb.SaveStateResponse:
            _check(state, request.attempt)
            # Every rank may ask for the same one.
            key = (state.digest, request.progress)
            if run.saved is None or run.saved[0] != key:
                answer = pb.SaveStateResponse(
                    state=core.save_state(state, request.progress),
                    in_force=change_messages(state.plan.departures(request.progress)),
                )
                run.saved = (key, answer)
            return run.saved[1]

        while True:
            left_s = end_s - time.monotonic()
            try:
                saved = await self._ledger.look(run, save)
            except core.LossesPending:
                if left_s <= 0 or self._draining.is_set():
                    raise
                _seen(run)
                with self._tracing.waiting():
                    await run.wait_for_change(left_s)
                run = await self._ledger.run(request.run)
            else:
                _seen(run)
                return saved

    async def acknowledge_directive(
        self, request: pb.AcknowledgeDirectiveRequest
    ) -> pb.AcknowledgeDirectiveResponse:
        """See the proto file."""
        require("run", request.run)
        require("directive", request.directive)
        run = await self._ledger.run(request.run)
        outcome = _DIRECTIVE_OUTCOMES.get(request.outcome)
        if outcome is None:
            raise core.InvalidRequest(
                "the outcome is invalid",
                [core.Violation("outcome", str(request.outcome), "done, failed or unhandled")],
            )

        def evaluate(state: core.RunState) -> tuple[list[core.Event], None]:
            _check(state, request.attempt)
            events = core.acknowledge_directive(
                state,
                rank=request.rank,
                directive=request.directive,
                outcome=outcome,
                progress=request.progress,
                detail=request.detail,
            )
            return events, None

        await self._ledger.transact(run, evaluate)
        _seen(run)
        return pb.AcknowledgeDirectiveResponse()

    async def offer_values(self, request: pb.OfferValuesRequest) -> pb.OfferValuesResponse:
        """See the proto file."""
        run = await self._ledger.run(request.run)
        await self._compare(run, request.attempt, read_held(request.held))
        asker = _Asker(request.attempt, request.holder.hex())
        wanted = core.OfferRequest(begin=request.begin, stride=request.stride, count=request.count)

        def permit(state: core.RunState) -> tuple[list[core.Event], None]:
            _check(state, asker.attempt)
            return core.offer_values(state, wanted, holder=asker.holder), None

        await self._ledger.transact(run, permit)

        def offered(state: core.RunState) -> core.Offer:
            asker.check(state)
            return core.offered(state, wanted)

        offer = await self._ledger.look(run, offered)
        _seen(run)
        # Some tenths of a second with many steps and groups, in which others must not wait.
        block = await asyncio.to_thread(offer.block)
        return pb.OfferValuesResponse(
            block=block_message(block),
            plan=offer.etag,
            permitted=offer.permitted,
            offer=offer.permit.seq,
        )

    async def declare_values(self, request: pb.DeclareValuesRequest) -> pb.DeclareValuesResponse:
        """See the proto file."""
        run = await self._ledger.run(request.run)
        await self._compare(run, request.attempt, read_held(request.held, request.offer))

        def evaluate(state: core.RunState) -> tuple[list[core.Event], None]:
            _check(state, request.attempt)
            events = core.declare_values(
                state,
                read_blocks(request.blocks, len(state.spec.group_names)),
                holder=request.holder.hex(),
                offer=request.offer,
            )
            return events, None

        def answer(state: core.RunState, _: None) -> pb.DeclareValuesResponse:
            return pb.DeclareValuesResponse(horizon=state.horizon, frontier=state.frontier)

        declared = await self._ledger.respond(run, evaluate, answer)
        _seen(run)
        return declared

    async def _compare(self, run: LiveRun, attempt: pb.Attempt, held: core.Held) -> None:
        """Let the log say what it has forgotten, where a client holds what it has not.

        Whatever belongs to that attempt is refused then. It is said with an append, which fails
        where this replica has not read all of the log: one that lags accuses nobody.
        """
        number, token = attempt.number, attempt.token.hex()

        def compare(state: core.RunState) -> core.Forgot | None:
            return core.missing(state, number, token, held, run.digest)

        if await self._ledger.look(run, compare) is None:
            return

        def say(state: core.RunState) -> tuple[list[core.Event], None]:
            forgot = core.missing(state, number, token, held)
            return [forgot] if forgot else [], None

        await self._ledger.transact(run, say)

    async def _block(
        self, run: LiveRun, asker: "_Asker", wanted: core.ValuesRequest
    ) -> core.Block | None:
        """Return recorded values, recording them first where they are fixed; None: not yet."""

        def find(state: core.RunState) -> core.Block | core.Recorded | None:
            asker.check(state)
            return core.get_values(state, wanted)

        def record(state: core.RunState) -> tuple[list[core.Event], None]:
            found = find(state)
            return ([found] if isinstance(found, core.Recorded) else []), None

        found = await self._ledger.look(run, find)
        if isinstance(found, core.Recorded):
            await self._ledger.transact(run, record)
            found = await self._ledger.look(run, find)
        return found if isinstance(found, core.Block) else None

    async def _wait(
        self,
        run: LiveRun,
        asker: "_Asker",
        wanted: core.ValuesRequest,
        end_s: float,
        *,
        blocked: bool,
    ) -> core.Block | None:
        """Wait for values beyond the horizon until `end_s`; blocked waits end in a waiver."""
        while True:
            left_s = end_s - time.monotonic()
            if left_s <= 0 or self._draining.is_set():
                return None
            patience_s = left_s
            if blocked and run.state.spec.has_feedback and not run.state.holder:
                patience_s = run.state.spec.feedback.timeout_s - run.blocked_s()
            if patience_s <= 0:
                await self._waive(run, asker.attempt, wanted)
            else:
                await run.wait_for_change(min(left_s, patience_s))
            run = await self._ledger.run(run.state.name)
            block = await self._block(run, asker, wanted)
            if block is not None:
                return block

    async def _waive(self, run: LiveRun, attempt: pb.Attempt, wanted: core.ValuesRequest) -> None:
        if self._ledger.is_suspended:
            run.excuse()
            return
        # A replica that lags may only believe that nobody reports.
        await self._ledger.refresh(run)

        def evaluate(state: core.RunState) -> tuple[list[core.Event], None]:
            _check(state, attempt)
            if run.blocked_s() < state.spec.feedback.timeout_s:
                return [], None
            return core.waive(state, wanted.begin), None

        await self._ledger.transact(run, evaluate)


@dataclass(frozen=True, slots=True)
class _Asker:
    """Who asks for values."""

    attempt: pb.Attempt
    holder: str

    def check(self, state: core.RunState) -> None:
        """Raise AttemptSuperseded or NotHolder."""
        _check(state, self.attempt)
        core.check_holder(state, self.holder)


def _reporters(request: pb.OpenAttemptRequest) -> tuple[int, ...]:
    reporters = tuple(request.reporters) or (request.reporter,)
    if request.reporters and request.reporter not in (0, reporters[0]):
        raise core.InvalidRequest(
            "the reporters are invalid",
            [
                core.Violation(
                    "reporter", str(request.reporter), f"the first of reporters, {reporters[0]}"
                )
            ],
        )
    return reporters


def _report(item: pb.LossReport) -> core.Report:
    return core.Report(
        progress=item.progress,
        loss=item.loss if item.HasField("loss") else None,
        weight=item.weight or 1.0,
        moves_to=item.moves_to,
        skipped=item.skipped,
        tries=getattr(item, "try"),
        validation=dict(item.validation_losses),
        gradient_norm=item.gradient_norm if item.HasField("gradient_norm") else None,
        batch=item.batch or None,
    )


def _directives(state: core.RunState, block: core.Block) -> list[pb.Directive]:
    """Return the newest directives of the attempt that the values of a block reach.

    They are known by then: whatever decides one moves the horizon past it only afterwards.
    """
    return [
        _directive(item, item.change)
        for item in state.plan.directives(state.begin, block.last)[-MAX_DIRECTIVES:]
        if isinstance(item.change, core.Direct)
    ]


def _directive(adjustment: core.Adjustment, change: core.Direct) -> pb.Directive:
    return pb.Directive(
        id=adjustment.id,
        kind=_DIRECTIVE_KINDS[change.directive],
        progress=adjustment.effective,
        reason=change.reason,
        before=change.before or 0,
        until=change.until or 0,
        factor=change.factor or 0.0,
    )


def _check(state: core.RunState, attempt: pb.Attempt) -> None:
    if attempt.number < 1:
        # A run that was only created is at attempt 0, without a token.
        raise core.InvalidRequest(
            "the request is incomplete",
            [core.Violation("attempt", f"number {attempt.number}", "what OpenAttempt answered")],
        )
    core.check_attempt(state, attempt.number, attempt.token.hex())


def _seen(run: LiveRun) -> None:
    run.seen_s = time.monotonic()


def _block_bytes(run: LiveRun, block: core.Block) -> bytes:
    key = (run.state.attempt, block.begin, block.stride, block.steps)
    data = run.blocks.get(key)
    if data is None:
        data = pb.GetValuesResponse(block=block_message(block)).SerializeToString()
        if len(run.blocks) >= MAX_CACHED_BLOCKS:
            run.blocks.clear()
        run.blocks[key] = data
    return data
