"""The service for people: create, look at, adjust, revise and end runs."""

import asyncio
import logging
import time
from bisect import bisect_left, bisect_right
from collections.abc import AsyncIterator, Callable, Mapping

from google.protobuf.message import Message

from lrpilot import core
from lrpilot.server._changes import Change, read_action, repeated_change, shown_change
from lrpilot.server._curves import Rates, draw_losses, read_wanted
from lrpilot.server._documents import read_spec
from lrpilot.server._journal import about
from lrpilot.server._ledger import Ledger
from lrpilot.server._live_run import LiveRun
from lrpilot.server._messages import adjustment_messages, event_message, run_message, run_summary
from lrpilot.server._rpc import Behaviour, require
from lrpilot.server._run_file import LogChanged, RunFileReader, RunFileWriter
from lrpilot.server._store import MAX_SEQ, LogRow, StoreUnavailable
from lrpilot.v1 import runs_pb2 as pb

logger = logging.getLogger("lrpilot.server")

LIVE_S = 120.0
"""A run whose ranks asked for something within this time is live: ending it needs force."""

PAGE_OF_RUNS, MAX_PAGE_OF_RUNS = 50, 500
PAGE_OF_EVENTS, MAX_PAGE_OF_EVENTS = 200, 1000
MAX_PAGE_BYTES = 512 * 1024
"""A page ends early rather than exceed this: messages are bounded at 1 MiB."""

MOST_DRAWN = 2
"""Pictures that are made at a time: many at once would take every thread that reads need."""

EVENTS_PER_READ = 500
"""Events that an export reads from the store at once."""
PART_BYTES = 256 * 1024
"""Most bytes of a file in one message."""


class RunService:
    """Behaviour of `lrpilot.v1.RunService`."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._importing = asyncio.Lock()
        """Held while a file is read: it takes a core, and the state of its run memory."""
        self._drawing = asyncio.Semaphore(MOST_DRAWN)
        """Held while a picture is made, or looked for what it is made of."""

    @property
    def behaviours(self) -> Mapping[str, Behaviour]:
        """Method name to behaviour."""
        return {
            "CreateRun": self.create_run,
            "GetRun": self.get_run,
            "ListRuns": self.list_runs,
            "ReviseRun": self.revise_run,
            "AdjustRun": self.adjust_run,
            "ApproveAdvice": self.approve_advice,
            "GetCurves": self.get_curves,
            "ListEvents": self.list_events,
            "FinishRun": self.finish_run,
            "DeleteRun": self.delete_run,
            "ExportRun": self.export_run,
            "ImportRun": self.import_run,
        }

    @property
    def requests(self) -> Mapping[str, type[Message]]:
        """Name of each request message to its class."""
        return {
            "CreateRunRequest": pb.CreateRunRequest,
            "GetRunRequest": pb.GetRunRequest,
            "ListRunsRequest": pb.ListRunsRequest,
            "ReviseRunRequest": pb.ReviseRunRequest,
            "AdjustRunRequest": pb.AdjustRunRequest,
            "ApproveAdviceRequest": pb.ApproveAdviceRequest,
            "GetCurvesRequest": pb.GetCurvesRequest,
            "ListEventsRequest": pb.ListEventsRequest,
            "FinishRunRequest": pb.FinishRunRequest,
            "DeleteRunRequest": pb.DeleteRunRequest,
            "ExportRunRequest": pb.ExportRunRequest,
            "ImportRunRequest": pb.ImportRunRequest,
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
            message = await self.listed(name)
            if message is not None:
                room -= message.ByteSize()
                if room < 0 and answer.runs:
                    break
                answer.runs.append(message)
            done += 1
            # Others have their turn.
            await asyncio.sleep(0)
        if done < len(names):
            answer.next_page_token = names[done - 1]
        return answer

    async def listed(self, name: str) -> pb.Run | None:
        """Return a run as a list shows it; None: it does not exist.

        One that cannot be read must not hide the others: it is UNREADABLE. Raises StoreUnavailable.
        """
        try:
            run = await self._ledger.find(name)
            return run_summary(run) if run.state.exists else None
        except StoreUnavailable:
            raise
        except Exception:
            logger.exception("cannot be read", extra=about(name))
            return pb.Run(name=name, state=pb.RUN_STATE_UNREADABLE)

    async def revise_run(self, request: pb.ReviseRunRequest) -> pb.ReviseRunResponse:
        """See the proto file."""
        spec = read_spec(request.spec_document)
        if spec.name != request.run:
            raise core.InvalidSpec(
                "a revision cannot rename a run",
                [core.Violation("name", repr(spec.name), repr(request.run))],
            )

        def evaluate(state: core.RunState) -> list[core.Event]:
            return core.revise_run(
                state,
                spec,
                request.request_id,
                author=request.author,
                reason=request.reason,
                etag=request.etag,
            )

        done = await self._change(request.run, request.request_id, evaluate, dry=request.dry_run)
        return pb.ReviseRunResponse(
            effective=done.effective,
            run=run_message(done.run),
            unchanged=done.unchanged,
            preview=done.preview,
            changes=done.changes,
            pending=done.pending,
        )

    async def adjust_run(self, request: pb.AdjustRunRequest) -> pb.AdjustRunResponse:
        """See the proto file."""
        action = read_action(request)

        def evaluate(state: core.RunState) -> list[core.Event]:
            return core.adjust_run(
                state,
                action,
                reason=request.reason,
                author=request.author,
                request_id=request.request_id,
                etag=request.etag,
            )

        done = await self._change(request.run, request.request_id, evaluate, dry=request.dry_run)
        return pb.AdjustRunResponse(
            effective=done.effective,
            adjustment=done.adjustment,
            run=run_message(done.run),
            preview=done.preview,
            changes=done.changes,
            unchanged=done.unchanged,
            pending=done.pending,
        )

    async def approve_advice(self, request: pb.ApproveAdviceRequest) -> pb.ApproveAdviceResponse:
        """See the proto file."""
        require("advice", request.advice)

        def evaluate(state: core.RunState) -> list[core.Event]:
            return core.approve_advice(
                state,
                request.advice,
                reason=request.reason,
                author=request.author,
                request_id=request.request_id,
                etag=request.etag,
            )

        done = await self._change(request.run, request.request_id, evaluate, dry=request.dry_run)
        return pb.ApproveAdviceResponse(
            effective=done.effective,
            adjustment=done.adjustment,
            run=run_message(done.run),
            preview=done.preview,
            pending=done.pending,
        )

    async def _change(
        self,
        name: str,
        request_id: str,
        evaluate: Callable[[core.RunState], list[core.Event]],
        *,
        dry: bool,
    ) -> Change:
        """Carry out, or only show, what an operator asks for."""
        require("run", name)
        if not dry:
            require("request_id", request_id)
        run = await self._ledger.run(name)
        if dry:
            # What is shown must be what would be done now.
            await self._ledger.refresh(run)
            return await self._ledger.look(
                run, lambda state: shown_change(run, state, evaluate(state))
            )

        def carry_out(state: core.RunState) -> tuple[list[core.Event], Change]:
            events = evaluate(state)
            done = state.answers.get(request_id)
            if done is not None:
                return events, repeated_change(run, state, request_id, done[1])
            return events, shown_change(run, state, events)

        return await self._ledger.transact(run, carry_out)

    async def get_curves(self, request: pb.GetCurvesRequest) -> pb.GetCurvesResponse:
        """See the proto file."""
        run = await self._ledger.run(request.run)
        state = run.state
        wanted = read_wanted(request, state)
        answer = pb.GetCurvesResponse(
            seq=state.seq,
            begin=wanted.begin,
            end=wanted.end,
            progress=state.progress,
            horizon=state.horizon,
        )
        rates, decided = Rates(state), run.decided()

        def draw() -> None:
            attempts = self._ledger.losses.between(
                request.run,
                answer.seq,
                decided,
                begin=wanted.begin,
                end=wanted.end,
                points=wanted.points,
            )
            draw_losses(attempts, wanted, answer)
            rates.draw(wanted, answer)

        async with self._drawing:
            await asyncio.to_thread(draw)
        return answer

    async def list_events(self, request: pb.ListEventsRequest) -> pb.ListEventsResponse:
        """See the proto file."""
        run = await self._ledger.run(request.run)
        size = _page_size(request.page_size, PAGE_OF_EVENTS, MAX_PAGE_OF_EVENTS)
        start = _page_start(request.page_token)
        decided: dict[int, list[pb.Adjustment]] = {}
        for item in adjustment_messages(run.state):
            decided.setdefault(item.seq, []).append(item)
        if request.notable:
            rows = await self._notable(run, start, size + 1, newest_first=request.newest_first)
        elif request.newest_first:
            # Those before the one that the page before ended with.
            end = min((start or MAX_SEQ) - 1, run.state.seq)
            after = max(0, end - size - 1)
            rows = (await self._ledger.history(request.run, after, end - after))[::-1]
        else:
            rows = await self._ledger.history(request.run, start, size + 1)
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

    async def _notable(
        self, run: LiveRun, start: int, count: int, *, newest_first: bool
    ) -> list[LogRow]:
        """Return the first notable rows of a log behind `start`, 0: its begin or its end."""
        name, seq, decided = run.state.name, run.state.seq, run.decided()

        def read() -> list[LogRow]:
            found = self._ledger.losses.notable(name, seq, decided)
            if newest_first:
                found = found[: bisect_left(found, start or MAX_SEQ)][::-1]
            else:
                found = found[bisect_right(found, start) :]
            return self._ledger.losses.rows(name, found[:count])

        async with self._drawing:
            return await asyncio.to_thread(read)

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

        seq, digest = run.state.seq, run.state.digest
        await self._ledger.delete(run, check)
        logger.warning(
            "deleted for good, as somebody asked; its log ended at seq %d with digest %s",
            seq,
            digest,
            extra=about(request.run, seq=seq),
        )
        return pb.DeleteRunResponse()

    async def export_run(self, request: pb.ExportRunRequest) -> AsyncIterator[pb.ExportRunResponse]:
        """See the proto file."""
        run = await self._ledger.run(request.run)
        await self._ledger.refresh(run)
        if not run.state.exists:
            raise core.run_not_found(request.run, ())
        if not request.force:
            _refuse_live(run, "export")
        end = run.state.seq
        begun = pb.ExportRunResponse(
            total_events=end, digest=run.state.digest, active=_idle_s(run) is not None
        )
        yield begun
        writer = RunFileWriter(request.run, time.time_ns())
        try:
            while writer.events < end:
                wanted = min(EVENTS_PER_READ, end - writer.events)
                rows = await self._ledger.history(request.run, writer.events, wanted)
                data = await asyncio.to_thread(writer.write, rows)
                for part in _parts(data):
                    yield pb.ExportRunResponse(data=part, events=writer.events)
            last = writer.end(begun.digest)
        except LogChanged:
            raise core.RunNotFound(
                f"run {request.run!r} was deleted while it was exported", run=request.run
            ) from None
        for part in _parts(last):
            yield pb.ExportRunResponse(data=part, events=writer.events)

    async def import_run(self, parts: AsyncIterator[pb.ImportRunRequest]) -> pb.ImportRunResponse:
        """See the proto file."""
        async with self._importing:
            first: pb.ImportRunRequest | None = None
            reader = RunFileReader(self._ledger.trim)
            async for part in parts:
                if first is None:
                    first = part
                    require("request_id", part.request_id)
                await asyncio.to_thread(reader.feed, part.data)
            read = await asyncio.to_thread(reader.end)
            if first is None:
                raise AssertionError  # Nothing is no whole file.
            name, log = read.run.state.name, read.run.state
            request_id, author, reason = first.request_id, first.author, first.reason
            events = log.seq

            def evaluate(
                state: core.RunState, digest_there: str | None
            ) -> tuple[list[core.Event], bool]:
                request = core.ImportRequest(
                    origin=read.origin,
                    exported_at_ns=read.exported_at_ns,
                    request_id=request_id,
                    author=author,
                    reason=reason,
                    digest_there=digest_there,
                )
                made = core.import_run(state, log, request)
                return made, not made and request_id not in state.answers

            run = await self._ledger.find(name)
            unchanged = await self._ledger.take_over(run, read.run, read.log, evaluate)
        if not unchanged:
            logger.info(
                "imported from %s, %d events, by %s: %s",
                read.origin,
                events,
                author or "somebody",
                reason or "no reason given",
                extra=about(
                    run.state,
                    seq=events,
                    origin=read.origin,
                    author=author or None,
                    reason=reason or None,
                ),
            )
        return pb.ImportRunResponse(run=run_message(run), events=events, unchanged=unchanged)


def _parts(data: bytes) -> list[bytes]:
    return [data[at : at + PART_BYTES] for at in range(0, len(data), PART_BYTES)]


def _idle_s(run: LiveRun) -> float | None:
    """Return for how long the ranks of a live run asked for nothing; None: it is not live."""
    state = run.state
    if not state.token or state.finished or state.frontier >= state.spec.total:
        return None
    idle_s = time.time() - run.updated_ns / 1e9
    if run.seen_s is not None:
        idle_s = min(idle_s, time.monotonic() - run.seen_s)
    return idle_s if idle_s < LIVE_S else None


def _refuse_live(run: LiveRun, verb: str) -> None:
    state = run.state
    idle_s = _idle_s(run)
    if idle_s is not None:
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
