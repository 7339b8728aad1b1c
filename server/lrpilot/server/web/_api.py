"""The runs as JSON: what there is to see of them, and the changes that operators make."""

import asyncio
import importlib.metadata
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from lrpilot import core
from lrpilot.server._author import caller
from lrpilot.server._json import fields_of, json_line
from lrpilot.server._ledger import Ledger
from lrpilot.server._live_run import LiveRun
from lrpilot.server._messages import put_adjustments, run_message, run_summary, timestamp
from lrpilot.server._run_service import RunService
from lrpilot.server._store import StoreUnavailable
from lrpilot.server.web._access import Access, is_foreign
from lrpilot.server.web._answers import Refused, error_answer, json_answer
from lrpilot.server.web._requests import Query, read_body
from lrpilot.server.web._rows import Rows
from lrpilot.server.web._specs import MAX_SPECS, spec_fields
from lrpilot.server.web._streams import (
    BEGIN,
    EVENT_S,
    QUIET,
    QUIET_S,
    Events,
    EventStream,
    Streams,
    event,
    pause_s,
)
from lrpilot.v1 import runs_pb2 as pb

logger = logging.getLogger("lrpilot.server")

T = TypeVar("T")

ANSWER_S = 30.0
"""Deadline of a request, from its head to its answer."""

ROWS = 100
"""Most runs in one event."""

LOOK_S = 5.0
"""Time after which a run is shown again although its log did not grow: how its ranks keep up."""

_INT32 = 2**31 - 1
_INT64 = 2**63 - 1

Handler = Callable[[Request], Awaitable[Any]]
"""Returns what is to be the JSON of the answer, or the answer."""


class Api:
    """Everything below `/api`."""

    def __init__(
        self,
        ledger: Ledger,
        runs: RunService,
        access: Access,
        not_ready: Callable[[], str | None],
        threads: Executor,
    ) -> None:
        """`threads` are for what takes long; for the rest see Web."""
        self._ledger = ledger
        self._runs = runs
        self._access = access
        self._not_ready = not_ready
        self._threads = threads
        self._rows = Rows(ledger, runs)
        self._streams = Streams()
        self._texts: WeakKeyDictionary[LiveRun, tuple[asyncio.Event, float, str]] = (
            WeakKeyDictionary()
        )
        """Run to how it was last shown: as of which change, and when."""
        self._author = caller()
        self._version = importlib.metadata.version("lrpilot")
        run = "/api/runs/{name}"
        self.routes = [
            self._route("/api/server", self._server),
            self._route("/api/runs", self._list),
            self._route("/api/stream", self._follow_all),
            self._route(run, self._run),
            self._route(f"{run}/curves", self._curves),
            self._route(f"{run}/events", self._events),
            self._route(f"{run}/specs", self._specs),
            self._route(f"{run}/stream", self._follow_one),
            self._route(f"{run}/adjust", self._adjust, "POST"),
            self._route(f"{run}/approve", self._approve, "POST"),
        ]

    def drain(self) -> None:
        """Take no more requests, and end the streams: the server is about to end."""
        self._streams.ending.set()
        self._rows.end()

    def _route(self, path: str, handler: Handler, method: str = "GET") -> Route:
        async def answer(request: Request) -> Response:
            asked: str = request.scope["path"]
            try:
                self._refuse_strangers(request)
                found = await asyncio.wait_for(handler(request), ANSWER_S)
                if isinstance(found, Response):
                    return found
                return await self._on_thread(json_answer, request, found)
            except ClientDisconnect:
                # There is nobody to read it.
                return Response(status_code=400)
            except asyncio.TimeoutError:
                text = f"there was no answer within {ANSWER_S:g} s"
                if method == "POST":
                    text += "; it may be done all the same: repeat it with the same request_id"
                return error_answer(asked, Refused(504, "DeadlineExceeded", text))
            except Exception as error:
                return error_answer(asked, error)

        return Route(path, answer, methods=[method])

    def _refuse_strangers(self, request: Request) -> None:
        if self._access.is_misdirected(request.headers):
            raise Refused(421, "Misdirected", self._access.MISDIRECTED)
        if is_foreign(request.headers):
            raise Refused(403, "Foreign", "a page of another site must not ask here")
        self._refuse_draining()

    def _refuse_draining(self) -> None:
        if self._streams.ending.is_set():
            raise Refused(503, "Draining", "the server is about to end")

    # What there is to see.

    async def _server(self, request: Request) -> Any:
        Query(request).end()
        why = self._access.why_read_only(request.headers)
        return {
            "version": self._version,
            "read_only": why is not None,
            "why_read_only": why,
            "author": self._author,
            "ready": self._not_ready(),
            "time": timestamp(time.time_ns()).ToJsonString(),
        }

    async def _list(self, request: Request) -> Any:
        query = Query(request)
        page = pb.ListRunsRequest(
            page_size=query.number("page_size", _INT32), page_token=query.text("page_token")
        )
        query.end()
        return await self._rows.page(page)

    async def _run(self, request: Request) -> Any:
        Query(request).end()
        return run_message(await self._viewed(request))

    async def _curves(self, request: Request) -> Any:
        query = Query(request)
        wanted = pb.GetCurvesRequest(
            run=request.path_params["name"],
            begin=query.number("begin", _INT64),
            end=query.number("end", _INT64),
            points=query.number("points", _INT32),
            groups=query.texts("group"),
        )
        query.end()
        await self._viewed(request)
        return await self._runs.get_curves(wanted)

    async def _events(self, request: Request) -> Any:
        query = Query(request)
        wanted = pb.ListEventsRequest(
            run=request.path_params["name"],
            page_size=query.number("page_size", _INT32),
            page_token=query.text("page_token"),
            newest_first=query.flag("newest_first"),
            notable=query.flag("notable"),
        )
        query.end()
        await self._viewed(request)
        return await self._runs.list_events(wanted)

    async def _specs(self, request: Request) -> Any:
        Query(request).end()
        state = (await self._viewed(request)).state
        revisions, pending = state.plan.revisions, state.pending_spec
        rows = []
        for item in revisions[-MAX_SPECS:]:
            # What the run was created with has no number.
            seq = item.seq or 1
            found = await self._ledger.history(state.name, seq - 1, 1)
            rows.append(found[0] if found and found[0].seq == seq else None)
        return await self._on_thread(spec_fields, revisions, rows, pending)

    async def _viewed(self, request: Request) -> LiveRun:
        """Return the run that is asked for, which is looked after from now on."""
        name = request.path_params["name"]
        try:
            run = await self._ledger.run(name)
        except (core.LrpilotError, StoreUnavailable):
            raise
        except Exception as error:
            logger.exception("run %s cannot be read", name)
            text = f"run {name!r} cannot be read; the server's log says why"
            raise Refused(500, "RunUnreadable", text) from error
        run.viewed_s = time.monotonic()
        return run

    # What operators do.

    async def _adjust(self, request: Request) -> Any:
        wanted = await read_body(request, pb.AdjustRunRequest)
        self._sign(request, wanted)
        return await self._runs.adjust_run(wanted)

    async def _approve(self, request: Request) -> Any:
        wanted = await read_body(request, pb.ApproveAdviceRequest)
        self._sign(request, wanted)
        return await self._runs.approve_advice(wanted)

    def _sign(
        self, request: Request, wanted: pb.AdjustRunRequest | pb.ApproveAdviceRequest
    ) -> None:
        """Fill in who asks for what run. Raises Refused where that may only be looked at."""
        Query(request).end()
        # The body may have taken its time.
        self._refuse_draining()
        why = self._access.why_read_only(request.headers)
        if why is not None and not wanted.dry_run:
            raise Refused(403, "ReadOnly", why)
        wanted.run = request.path_params["name"]
        wanted.author = wanted.author or self._author

    # What changes.

    async def _follow_all(self, request: Request) -> Any:
        Query(request).end()
        return EventStream(self._streams, self._all_changes())

    async def _all_changes(self) -> Events:
        with self._ledger.touched.followed() as follower:
            yield BEGIN
            while True:
                if not await follower.wait(QUIET_S):
                    yield QUIET
                    continue
                began_s = time.monotonic()
                names = follower.take()
                for begin in range(0, len(names), ROWS):
                    yield event("runs", await self._rows_of(names[begin : begin + ROWS]))
                await asyncio.sleep(pause_s(time.monotonic() - began_s))

    async def _rows_of(self, names: Sequence[str]) -> str:
        changed, deleted = [], []
        for name in names:
            row = await self._rows.row(name)
            if row is None:
                deleted.append(name)
            else:
                changed.append(row)
            # Others have their turn.
            await asyncio.sleep(0)
        return await self._on_thread(json_line, {"runs": changed, "deleted": deleted})

    async def _follow_one(self, request: Request) -> Any:
        Query(request).end()
        return EventStream(self._streams, self._changes(await self._viewed(request)))

    async def _changes(self, run: LiveRun) -> Events:
        yield BEGIN
        said, said_s = "", time.monotonic()
        while True:
            began_s = run.viewed_s = time.monotonic()
            changed = run.changed
            if not run.state.exists:
                # It may be gone, or only be read again.
                found = await self._ledger.find(run.state.name)
                if not found.state.exists:
                    yield event("gone", json_line({"name": run.state.name}))
                    return
                run = found
                continue
            text = await self._shown(run)
            if text != said:
                yield event("run", text)
                said, said_s = text, time.monotonic()
            elif time.monotonic() - said_s > QUIET_S:
                yield QUIET
                said_s = time.monotonic()
            await asyncio.sleep(pause_s(time.monotonic() - began_s))
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), LOOK_S)

    async def _shown(self, run: LiveRun) -> str:
        """Return a run as its streams show it, prepared once for all of them."""
        known = self._texts.get(run)
        if known is not None and known[0] is run.changed and time.monotonic() - known[1] < EVENT_S:
            return known[2]
        changed, now_s = run.changed, time.monotonic()
        message = run_summary(run)
        put_adjustments(message, run.state)
        text = await self._on_thread(_shown_text, message)
        self._texts[run] = (changed, now_s, text)
        return text

    async def _on_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do what may take long where it keeps no rank waiting."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, work, *arguments)


def _shown_text(message: pb.Run) -> str:
    fields = fields_of(message)
    del fields["spec_document"]
    return json_line(fields)
