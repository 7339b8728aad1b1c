"""HTTP on the server's event loop: one listening socket, begun and ended with the server."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

BACKLOG = 128
"""Connections that may wait to be accepted."""

HEAD_S = 10.0
"""A connection on which the head of a request is not there after this time is closed."""

GRACE_S = 2
"""How long answers under way may take once all else has ended."""

UNREAD_MS = 30_000
"""A connection whose peer takes nothing of what is sent to it for so long is closed."""


def listen(address: str) -> socket.socket:
    """Return a socket that listens on HOST:PORT; port 0: the kernel picks. Raises OSError."""
    host, _, port = address.rpartition(":")
    family, kind, protocol, _, where = socket.getaddrinfo(
        host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit both: a peer that vanished, or reads no more, costs nothing for long.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_MS)
        listener.bind(where)
        # Of two that bind one port, the second is told only here.
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


@asynccontextmanager
async def serving(app: ASGIApp, listener: socket.socket) -> AsyncIterator[None]:
    """Serve an application on a listening socket within the block, on the running event loop."""
    config = uvicorn.Config(
        app,
        # What uvicorn would choose depends on what else is installed.
        http=_Protocol,
        ws="none",
        lifespan="off",
        # Nobody who sends a header is believed to be somebody else.
        proxy_headers=False,
        server_header=False,
        access_log=False,
        # Its lines go where ours go; those below warnings say nothing of lrpilot.
        log_config=None,
        log_level="warning",
        timeout_graceful_shutdown=GRACE_S,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await task


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: the server that this is a part of takes them."""
        yield


class _Protocol(H11Protocol):
    """HTTP/1.1 on one connection, which does not wait for ever for the head of a request."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()

    def _await_head(self) -> None:
        """Begin to wait where a head is to come; more of it makes the time no longer."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
