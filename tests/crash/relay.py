"""Connections that can go wrong: each passes through a port of ours on its way to a server.

What TCP promises still holds while bytes are held or delayed: they come later, in order. Where
bytes were swallowed it cannot, and the connection is reset once the fault ends.
"""

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Literal

Direction = Literal["to", "from"]
"""To the target, or from it."""

DEADLINE_S = 30.0

_CHUNK_BYTES = 65_536

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: a close sends RST, and what was not sent yet is dropped."""

FindsAnswer = Callable[[bytes], bool]
"""Reads what comes from a target, and says whether an answer ends in it."""


class Http2Answers:
    """Finds the ends of gRPC's answers: frames of headers that end their stream."""

    _HEADERS, _END_STREAM, _HEADER_BYTES = 1, 1, 9

    def __init__(self) -> None:
        self._rest = b""
        self._skip = 0

    def __call__(self, data: bytes) -> bool:
        """Take the next bytes; return whether an answer ends in them."""
        found = False
        data = self._rest + data
        while True:
            passed = min(self._skip, len(data))
            data, self._skip = data[passed:], self._skip - passed
            if len(data) < self._HEADER_BYTES:
                self._rest = data
                return found
            self._skip = self._HEADER_BYTES + int.from_bytes(data[:3], "big")
            found |= data[3] == self._HEADERS and bool(data[4] & self._END_STREAM)


def commits(data: bytes) -> bool:
    """Return whether PostgreSQL says in these bytes that it has committed."""
    return b"C\x00\x00\x00\x0bCOMMIT\x00" in data


class Network:
    """Runs relays on a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._relays: list[Relay] = []

    def relay(self, make_finder: Callable[[], FindsAnswer]) -> "Relay":
        """Return a relay that listens, and that has no target yet."""
        relay = Relay(self, make_finder)
        self._relays.append(relay)
        self.run(relay.listen())
        return relay

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Return what a coroutine returns that runs beside the relays."""
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(DEADLINE_S)

    def close(self) -> None:
        """End every connection."""

        async def cancel() -> None:
            for relay in self._relays:
                relay.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.run(cancel())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_S)
        self._loop.close()


class Relay:
    """One port, and what befalls the connections through it. Made by `Network.relay`.

    What a method asks for holds for the connections there are and for those to come, until `heal`.
    """

    def __init__(self, network: Network, make_finder: Callable[[], FindsAnswer]) -> None:
        self._network = network
        self._make_finder = make_finder
        self._target: tuple[str, int] | None = None
        self._connections: set[_Connection] = set()
        self.port = 0
        self.delay_s = 0.0
        self.swallows = False
        self.answers_to_lose = 0
        self.touched = 0
        """How many pieces of data and connections met the fault."""
        self.open: dict[Direction, asyncio.Event] = {
            "to": asyncio.Event(),
            "from": asyncio.Event(),
        }
        """Set: data passes in that direction."""

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    async def listen(self) -> None:
        """Begin to take connections."""
        for opened in self.open.values():
            opened.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def lead_to(self, address: str) -> None:
        """Pass connections on to HOST:PORT from now on."""
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))

    def close(self) -> None:
        """Take no more connections."""
        self._server.close()

    def hold(self, *directions: Direction) -> None:
        """Let nothing pass in some directions; it comes after `heal`."""

        async def hold() -> None:
            self.touched = 0
            for direction in directions:
                self.open[direction].clear()

        self._network.run(hold())

    def slow_down(self, delay_s: float) -> None:
        """Let each piece of data come later."""
        self.touched, self.delay_s = 0, delay_s

    def swallow(self) -> None:
        """Let what is sent vanish, both ways."""
        self.touched, self.swallows = 0, True

    def lose_answers(self, count: int) -> None:
        """Reset the connection in place of each of the next answers, so many of them."""
        self.touched, self.answers_to_lose = 0, count

    def reset(self) -> int:
        """Reset every connection; return how many."""

        async def reset() -> int:
            for connection in (gone := set(self._connections)):
                connection.reset()
            return len(gone)

        return int(self._network.run(reset()))

    def heal(self) -> None:
        """Let everything pass again."""

        async def heal() -> None:
            self.delay_s, self.answers_to_lose = 0.0, 0
            if self.swallows:
                self.swallows = False
                for connection in set(self._connections):
                    connection.reset()
            for opened in self.open.values():
                opened.set()

        self._network.run(heal())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self, self._make_finder(), writer)
        self._connections.add(connection)
        try:
            await connection.run(reader, self._target)
        except (OSError, asyncio.CancelledError):
            # Whoever connects to a server that is away is refused; so is this one.
            pass
        finally:
            self._connections.discard(connection)
            connection.reset()


class _Connection:
    def __init__(self, relay: Relay, finds_answer: FindsAnswer, near: asyncio.StreamWriter) -> None:
        self._relay = relay
        self._finds_answer = finds_answer
        self._writers = [near]

    async def run(self, reader: asyncio.StreamReader, target: tuple[str, int] | None) -> None:
        """Pass data on both ways until one side ends."""
        if target is None:
            return
        far_reader, far_writer = await asyncio.open_connection(*target)
        self._writers.append(far_writer)
        pumps = [
            asyncio.ensure_future(self._pump("to", reader, far_writer)),
            asyncio.ensure_future(self._pump("from", far_reader, self._writers[0])),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def reset(self) -> None:
        """End both sides at once."""
        for writer in self._writers:
            one = writer.get_extra_info("socket")
            if one is not None and one.fileno() >= 0:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    async def _pump(
        self, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        relay = self._relay
        while data := await reader.read(_CHUNK_BYTES):
            answers = direction == "from" and self._finds_answer(data)
            if not relay.open[direction].is_set():
                relay.touched += 1
                await relay.open[direction].wait()
            if relay.delay_s:
                relay.touched += 1
                await asyncio.sleep(relay.delay_s * random.uniform(0.5, 1.0))
            if relay.swallows:
                relay.touched += 1
                continue
            if answers and relay.answers_to_lose > 0:
                relay.answers_to_lose -= 1
                relay.touched += 1
                return
            writer.write(data)
            await writer.drain()
