"""A client for what the server answers over HTTP, and a server in this process to ask."""

import asyncio
import gzip
import http.client
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from lrpilot.server.web import Web, listen

DEADLINE_S = 60.0
"""Every request and every wait for an event ends by then."""

LARGEST_BYTES = 16 * 1024 * 1024
"""Largest event of a stream."""


@dataclass
class Answer:
    """What became of a request."""

    status: int
    headers: dict[str, str]
    """By name in lower case."""
    body: bytes

    @property
    def json(self) -> Any:
        """The content."""
        assert self.headers["content-type"] == "application/json"
        packed = self.headers.get("content-encoding") == "gzip"
        return json.loads(gzip.decompress(self.body) if packed else self.body)

    @property
    def error(self) -> Any:
        """Why it was refused."""
        assert self.status >= 400
        (name,) = self.json
        assert name == "error"
        assert self.json["error"].keys() == {"reason", "message", "fields"}
        return self.json["error"]

    @property
    def fields(self) -> dict[str, str]:
        """Field at fault to what was got and what is allowed."""
        return {item["field"]: item["text"] for item in self.error["fields"]}


class Http:
    """Asks the server at HOST:PORT."""

    def __init__(self, address: str) -> None:
        self.address = address

    async def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> Answer:
        """Send a request; in names of headers `_` stands for `-`."""
        return await asyncio.to_thread(self._ask, method, path, body, headers)

    def _ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> Answer:
        connection = http.client.HTTPConnection(self.address, timeout=DEADLINE_S)
        try:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            got = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, got, answer.read())
        finally:
            connection.close()

    async def get(self, path: str, **headers: str) -> Answer:
        """Get something."""
        return await self.ask("GET", path, None, **headers)

    async def read(self, path: str) -> Any:
        """Return the JSON that is there."""
        answer = await self.get(path)
        assert answer.status == 200, answer.body
        return answer.json

    async def post(self, path: str, content: Any, **headers: str) -> Answer:
        """Send JSON."""
        headers = {"Content_Type": "application/json"} | headers
        return await self.ask("POST", path, json.dumps(content).encode(), **headers)

    @asynccontextmanager
    async def stream(self, path: str) -> AsyncIterator["Stream"]:
        """Follow a stream, which must begin."""
        host, _, port = self.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=LARGEST_BYTES)
        try:
            # The older protocol sends what there is as it is.
            request = f"GET {path} HTTP/1.0\r\nHost: {self.address}\r\n\r\n"
            writer.write(request.encode())
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE_S)
            assert head.startswith(b"HTTP/1.1 200 "), head
            assert b"content-type: text/event-stream" in head
            yield Stream(reader)
        finally:
            writer.close()


class Stream:
    """The events of one stream."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader

    async def next(self) -> tuple[str, Any] | None:
        """Return the next event with its data; None: the stream ended."""
        return await asyncio.wait_for(self._next(), DEADLINE_S)

    async def _next(self) -> tuple[str, Any] | None:
        name, data = "", ""
        while line := (await self._reader.readline()).decode():
            field, _, value = line.rstrip("\n").partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                data = value
            elif not field and name:
                return name, json.loads(data)
        return None


@asynccontextmanager
async def serving(
    replica: Any,
    address: str = "127.0.0.1:0",
    not_ready: Callable[[], str | None] = lambda: None,
) -> AsyncIterator[Web]:
    """Serve what a replica of the tests has over HTTP, at HOST:PORT."""
    web = Web(
        listen(address),
        address.rpartition(":")[0],
        registry=replica.metrics.registry,
        ledger=replica.ledger,
        runs=replica.server.runs,
        not_ready=not_ready,
    )
    async with web.served():
        yield web
