"""The paths of the server over HTTP."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

from prometheus_client import CollectorRegistry, make_wsgi_app
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from lrpilot.server._ledger import Ledger
from lrpilot.server._run_service import RunService
from lrpilot.server.web._access import Access, Guarded
from lrpilot.server.web._answers import Refused, error_answer
from lrpilot.server.web._api import Api
from lrpilot.server.web._files import read_files
from lrpilot.server.web._http import serving

THREADS = 4
"""Threads for scrapes and for large answers: they must not take those that reads of the store
need."""


class Web:
    """What one server answers over HTTP. Use it on the server's event loop."""

    def __init__(
        self,
        listener: socket.socket,
        host: str,
        *,
        registry: CollectorRegistry,
        ledger: Ledger,
        runs: RunService,
        not_ready: Callable[[], str | None],
    ) -> None:
        """Prepare to serve.

        Args:
            listener: where; the one of `listen`.
            host: the host by which that was named.
            registry: of the metrics.
            ledger: holds the runs.
            runs: what is asked for by gRPC.
            not_ready: tells why no calls are wanted here, for people; None: they are.
        """
        self._listener = listener
        self.address = f"{host}:{listener.getsockname()[1]}"
        """HOST:PORT that is served."""
        self._access = Access(host, listener)
        self._not_ready = not_ready
        self._metrics: Any = make_wsgi_app(registry)
        self._files = read_files()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="http")
        self._api = Api(ledger, runs, self._access, not_ready, self._threads)
        app = Starlette(
            routes=[
                Route("/", self._page),
                Route("/runs/{name}", self._page),
                # What becomes of an address that somebody shortens or writes down.
                Route("/runs", self._to_page),
                Route("/runs/", self._to_page),
                Route("/runs/{name}/", self._to_page),
                Route("/static/{path:path}", self._file),
                Route("/metrics", self._scrape),
                Route("/live", self._live),
                Route("/ready", self._ready),
                *self._api.routes,
            ],
            exception_handlers={HTTPException: _no_such},
        )
        # Any other address is right or wrong.
        app.router.redirect_slashes = False
        self._app = Guarded(app)

    @asynccontextmanager
    async def served(self) -> AsyncIterator[None]:
        """Answer requests within the block."""
        try:
            async with serving(self._app, self._listener):
                yield
        finally:
            self.drain()
            self._threads.shutdown(wait=False, cancel_futures=True)

    def drain(self) -> None:
        """End what lasts, and take no more that would: the server is about to end."""
        self._api.drain()

    async def _live(self, request: Request) -> Response:
        del request
        return PlainTextResponse("live\n")

    async def _ready(self, request: Request) -> Response:
        del request
        why = self._not_ready()
        if why is None:
            return PlainTextResponse("ready\n")
        return PlainTextResponse(f"not ready: {why}\n", 503)

    async def _scrape(self, request: Request) -> Response:
        self._refuse_misdirected(request)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._scraped, request)

    def _scraped(self, request: Request) -> Response:
        """Return the metrics in the form asked for; on a thread, for they ask the event loop."""
        headers: dict[str, str] = {}

        def start(status: str, fields: list[tuple[str, str]]) -> None:
            # What is asked for here has no other status than 200.
            del status
            headers.update(fields)

        environment = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": request.scope["path"],
            "QUERY_STRING": request.scope["query_string"].decode("latin-1"),
            "HTTP_ACCEPT": ",".join(request.headers.getlist("Accept")),
            "HTTP_ACCEPT_ENCODING": ",".join(request.headers.getlist("Accept-Encoding")),
        }
        [body] = self._metrics(environment, start)
        return Response(body, headers=headers)

    async def _page(self, request: Request) -> Response:
        return self._found(request, "index.html")

    async def _to_page(self, request: Request) -> Response:
        self._refuse_misdirected(request)
        name = request.path_params.get("name")
        address = "/" if name is None else f"/runs/{quote(name, safe='')}"
        query: str = request.url.query
        return RedirectResponse(f"{address}?{query}" if query else address)

    async def _file(self, request: Request) -> Response:
        return self._found(request, request.path_params["path"])

    def _found(self, request: Request, path: str) -> Response:
        self._refuse_misdirected(request)
        file = self._files.get(path)
        if file is None:
            raise HTTPException(404)
        return file.answer(request)

    def _refuse_misdirected(self, request: Request) -> None:
        if self._access.is_misdirected(request.headers):
            raise HTTPException(421, self._access.MISDIRECTED)


async def _no_such(request: Request, error: Any) -> Response:
    """Say that a path or a method is none, or what else is wrong with it."""
    path: str = request.scope["path"]
    if not path.startswith("/api/"):
        return PlainTextResponse(f"{error.detail}\n", error.status_code, error.headers)
    reason = "MethodNotAllowed" if error.status_code == 405 else "PathNotFound"
    text = f"{request.method} {path}: {error.detail}; docs/http.md lists the paths"
    return error_answer(path, Refused(error.status_code, reason, text, error.headers))
