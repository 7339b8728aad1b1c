"""Server-sent events: what changed, as it changes, to as many as look.

A stream waits for changes rather than looking for them, tells of many at once, and prepares the
next event only once the one before was taken: a slow reader gets fewer, newer ones.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lrpilot.server.web._answers import Refused, error_answer

logger = logging.getLogger("lrpilot.server")

MAX_STREAMS = 200
"""Most streams at once; each holds a connection and a few buffers."""

RETRY_S = 5
"""When who was refused for that may come again."""

EVENT_S = 0.5
"""Least time between two events of a stream."""

BUSY = 0.1
"""Largest share of the event loop that preparing the events of one stream may take."""

END_S = 1.0
"""Longest that the end of a stream waits for its reader to take what came before."""

QUIET_S = 15.0
"""A stream on which nothing happens says so after this time, lest something cuts it off."""

Events = AsyncGenerator[bytes, None]
"""The events of one stream, as they are sent."""

BEGIN = b"retry: 2000\n\n"
"""How a stream begins: a browser that lost it comes back after 2 s."""

QUIET = b": nothing new\n\n"


def event(name: str, data: str) -> bytes:
    """Return one event; `data` is one line."""
    return f"event: {name}\ndata: {data}\n\n".encode()


def pause_s(spent_s: float) -> float:
    """Return how long to wait after an event whose preparation took `spent_s`."""
    return max(EVENT_S, spent_s / BUSY)


class Streams:
    """How many streams there are, and their end."""

    def __init__(self) -> None:
        self.open = 0
        """Number of streams."""
        self.ending = asyncio.Event()
        """Set once every stream is to end, and no other to begin."""


class EventStream(StreamingResponse):
    """The answer that sends events until they end, their reader goes or all streams end."""

    media_type = "text/event-stream"

    def __init__(self, streams: Streams, events: Events) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers)
        self._streams = streams
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        refused = self._refused()
        if refused is not None:
            await error_answer(scope["path"], refused)(scope, receive, send)
            return
        self._streams.open += 1
        try:
            begin = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(begin)
            if scope["method"] != "HEAD":
                await self._until_over(receive, send)
            end = {"type": "http.response.body", "body": b"", "more_body": False}
            # Somebody who reads nothing is left alone.
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(send(end), END_S)
        finally:
            self._streams.open -= 1

    def _refused(self) -> Refused | None:
        retry = {"Retry-After": str(RETRY_S)}
        if self._streams.ending.is_set():
            return Refused(503, "Draining", "the server is about to end", retry)
        if self._streams.open >= MAX_STREAMS:
            text = f"there are {MAX_STREAMS} streams already; close some pages"
            return Refused(503, "TooManyStreams", text, retry)
        return None

    async def _until_over(self, receive: Receive, send: Send) -> None:
        tasks = [
            asyncio.ensure_future(work)
            for work in (self._send(send), _gone(receive), self._streams.ending.wait())
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            sent, *_ = await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(sent, Exception):
            # Who reads comes back, and is told then what is wrong.
            logger.warning("a stream ends early", exc_info=sent)

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for part in events:
                await send({"type": "http.response.body", "body": part, "more_body": True})


async def _gone(receive: Receive) -> None:
    """Return when the reader is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
