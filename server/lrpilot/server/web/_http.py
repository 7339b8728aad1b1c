"""HTTP on the server's event loop: one listening socket, begun and ended with the server."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from starlette.types import ASGIApp

BACKLOG = 128
"""Connections that may wait to be accepted."""

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
        http="h11",
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
