"""Servers to test against: the services over a store in memory, and the program as it is run.

Both are called through the generated stubs. Other test files name the classes here in
annotations alone, since a conftest cannot be imported.
"""

import asyncio
import itertools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import grpc
import grpc.aio
import pytest

from lrpilot.server._app import Server
from lrpilot.server._commit import GroupCommitter
from lrpilot.server._ledger import Ledger
from lrpilot.server._live_run import LiveRun
from lrpilot.server._memory_store import MemoryStore
from lrpilot.server._metrics import Metrics
from lrpilot.server._store import LogRow
from lrpilot.v1 import errors_pb2, runs_pb2, runs_pb2_grpc, trainer_pb2, trainer_pb2_grpc

if TYPE_CHECKING:
    # Which has Program from here.
    from tests.e2e.harness import Rank

DEADLINE_S = 60.0
"""Every call and every wait in these tests ends by then."""

METADATA_BYTES = 8 * 1024
"""What a client takes by default; gRPC counts 32 bytes beside name and value of an entry."""

LOCAL_POOL = ("grpc.use_local_subchannel_pool", 1)
"""Otherwise channels of one process share a connection, also with a server that is gone."""


_NUMBERS = itertools.count(1)


@dataclass
class Refusal:
    """How a call was refused."""

    code: str
    """Name of the gRPC status code."""
    text: str
    """The text for people."""
    reason: str = ""
    """Name of the error; empty: the answer has no details."""
    facts: dict[str, str] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)
    """Violated field to its description."""
    metadata_bytes: int = 0

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError) -> "Refusal":
        """Read a refusal, and check what holds for each of them."""
        trailing = dict(error.trailing_metadata() or ())
        refusal = cls(error.code().name, error.details() or "")
        packed = trailing.get("grpc-status-details-bin")
        if packed is None:
            return refusal
        # Base64 and percent encoding on the wire, and some 300 for what else is there.
        refusal.metadata_bytes = len(b64encode(packed)) + len(quote(refusal.text, " ")) + 300
        status = errors_pb2.Status.FromString(packed)
        assert status.code == error.code().value[0]
        assert status.message.removesuffix(" …") in refusal.text
        for detail in status.details:
            if detail.type_url == "type.googleapis.com/google.rpc.ErrorInfo":
                info = errors_pb2.ErrorInfo.FromString(detail.value)
                assert info.domain == "lrpilot"
                refusal.reason, refusal.facts = info.reason, dict(info.metadata)
            else:
                assert detail.type_url == "type.googleapis.com/google.rpc.BadRequest"
                for item in errors_pb2.BadRequest.FromString(detail.value).field_violations:
                    assert item.field not in refusal.fields
                    refusal.fields[item.field] = item.description
        assert refusal.reason
        return refusal


class Client:
    """Calls both services by the names of their methods."""

    def __init__(self, address: str = "") -> None:
        self.address = address
        self._channel: Any = None

    def connect(self, address: str) -> None:
        """Call the server at `address` from now on."""
        self.address = address
        self._channel = grpc.aio.insecure_channel(address, options=[LOCAL_POOL])
        trainer: Any = trainer_pb2_grpc.TrainerServiceStub(self._channel)
        runs: Any = runs_pb2_grpc.RunServiceStub(self._channel)
        self._methods: dict[str, tuple[Any, Any]] = {}
        for module, stub, name in (
            (trainer_pb2, trainer, "TrainerService"),
            (runs_pb2, runs, "RunService"),
        ):
            for method in module.DESCRIPTOR.services_by_name[name].methods:
                request = getattr(module, method.input_type.name)
                self._methods[method.name] = (getattr(stub, method.name), request)

    async def disconnect(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def call(self, method: str, /, **fields: Any) -> Any:
        """Call a method; `fields` are those of its request."""
        stub, request = self._methods[method]
        return await stub(request(**fields), timeout=DEADLINE_S)

    async def call_refused(self, method: str, /, **fields: Any) -> Refusal:
        """Call a method that must be refused."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.call(method, **fields)
        return Refusal.of(caught.value)

    def stream(self, method: str, /, **fields: Any) -> AsyncIterator[Any]:
        """Call a method whose answer has parts; `fields` are those of its request."""
        stub, request = self._methods[method]
        parts: AsyncIterator[Any] = aiter(stub(request(**fields), timeout=DEADLINE_S))
        return parts

    @staticmethod
    def request(method: str) -> Any:
        """Return the class of a method's requests."""
        return getattr(runs_pb2, f"{method}Request")

    async def send(self, method: str, parts: Iterable[Any] | AsyncIterable[Any]) -> Any:
        """Call a method whose request has parts."""
        stub, _ = self._methods[method]
        return await stub(parts, timeout=DEADLINE_S)

    async def refused_call(self, call: Awaitable[Any]) -> Refusal:
        """Return how a call was refused."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        return Refusal.of(caught.value)

    async def refused(self, method: str, /, **fields: Any) -> Refusal:
        """Call a method that must be refused; a replica checks that nothing changed."""
        return await self.call_refused(method, **fields)

    def fresh(self, what: str) -> str:
        """Return an id that was not used yet."""
        return f"{what}-{next(_NUMBERS)}"

    @staticmethod
    def document(name: str = "small", **fields: Any) -> str:
        """Return a spec on a constant LR of 1e-3 without feedback, plus `fields`."""
        base: dict[str, Any] = {"name": name, "total": 1000, "learning_rate": {"peak": 1e-3}}
        return json.dumps(base | {"weight_decay": 0.1} | fields)

    @staticmethod
    def feedback(delay: int = 2, timeout: str = "60s", **plateau: Any) -> dict[str, Any]:
        """Return fields of a spec whose LR halves on each loss that is no improvement."""
        policy = {"kind": "plateau", "patience": 0, **plateau}
        return {"policies": [policy], "feedback": {"delay": delay, "timeout": timeout}}

    async def attach(self, name: str = "small", **fields: Any) -> Any:
        """Create a run as a trainer does, or attach to it."""
        return await self.call(
            "AttachRun",
            run=name,
            spec_document=self.document(name, **fields),
            request_id=self.fresh("attach"),
        )

    async def open(self, run: str = "small", **fields: Any) -> "Job":
        """Open an attempt, or join one; `fields` are those of OpenAttempt."""
        wanted = {
            "run": run,
            "request_id": self.fresh("open"),
            "incarnation": self.fresh("process"),
        } | fields
        answer = await self.call("OpenAttempt", **wanted)
        return Job(self, run, answer, wanted.get("rank", 0), wanted["incarnation"])

    async def start_job(self, name: str = "small", **fields: Any) -> "Job":
        """Create a run and open its first attempt."""
        await self.attach(name, **fields)
        return await self.open(name)


@dataclass
class Job:
    """One rank of an attempt."""

    client: Client
    run: str
    opened: Any
    """The answer of OpenAttempt."""
    rank: int
    incarnation: str

    @property
    def identity(self) -> dict[str, Any]:
        """Fields that every request of the attempt carries."""
        return {"run": self.run, "attempt": self.opened.attempt}

    def values_fields(self, begin: int, **fields: Any) -> dict[str, Any]:
        """Return the fields of a request for values."""
        return self.identity | {"begin": begin, "stride": 1, "count": 128} | fields

    def report_fields(self, *reports: Sequence[Any], **fields: Any) -> dict[str, Any]:
        """Return the fields of a report; each is (progress, loss[, moves_to])."""
        items = [
            trainer_pb2.LossReport(progress=at, loss=loss, moves_to=rest[0] if rest else at + 1)
            for at, loss, *rest in reports
        ]
        mine = {"rank": self.rank, "incarnation": self.incarnation, "reports": items}
        return self.identity | mine | fields

    async def values(self, begin: int, **fields: Any) -> Any:
        """Ask for values."""
        return await self.client.call("GetValues", **self.values_fields(begin, **fields))

    async def rates(self, begin: int, **fields: Any) -> list[float]:
        """Return the learning rates from `begin` on that are fixed."""
        return list((await self.values(begin, **fields)).block.learning_rates)

    async def report(self, *reports: Sequence[Any], **fields: Any) -> Any:
        """Report losses."""
        return await self.client.call("ReportLosses", **self.report_fields(*reports, **fields))

    async def save(self, progress: int, wait_ms: int = 0) -> bytes:
        """Return the state from which training resumes at `progress`."""
        answer = await self.client.call(
            "SaveState", **self.identity, progress=progress, wait_ms=wait_ms
        )
        state: bytes = answer.state
        return state

    async def refused_values(self, begin: int, **fields: Any) -> Refusal:
        """Ask for values that must be refused."""
        return await self.client.refused("GetValues", **self.values_fields(begin, **fields))

    async def refused_report(self, *reports: Sequence[Any], **fields: Any) -> Refusal:
        """Report what must be refused."""
        return await self.client.refused("ReportLosses", **self.report_fields(*reports, **fields))

    async def shown(self) -> Any:
        """Return the run as people see it."""
        return (await self.client.call("GetRun", run=self.run)).run


class Replica(Client):
    """The services on a real gRPC server in this process, over a store that may be shared."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__()
        self.store = store
        self.server: Any = None

    @property
    def ledger(self) -> Ledger:
        """The runs of the server."""
        ledger: Ledger = self.server.ledger
        return ledger

    async def start(self) -> None:
        """Begin to serve."""
        self.metrics = Metrics()
        self.committer = GroupCommitter(self.store, self.metrics)
        self.server = Server(self.store, self.committer, self.metrics)
        address = self.server.bind("127.0.0.1:0")
        await self.server.start()
        self.connect(address)

    async def stop(self) -> None:
        """End as the program does."""
        await self.server.drain()
        await self.committer.close()
        await self.disconnect()

    async def restart(self) -> None:
        """Let a new server take over the store."""
        await self.stop()
        await self.start()

    def logs(self) -> dict[str, list[LogRow]]:
        """Return everything in the store."""
        return {name: self.store.read(name) for name in self.store.runs()}

    def live(self, name: str = "small") -> LiveRun:
        """Return a run as the server holds it."""
        return self.ledger._runs[name]

    async def refused_stream(self, method: str, parts: Iterable[Any]) -> Refusal:
        """Call a method with parts that must be refused, and change nothing in the store."""
        before = self.logs()
        refusal = await self.refused_call(self.send(method, parts))
        assert self.logs() == before
        assert refusal.metadata_bytes < METADATA_BYTES
        return refusal

    async def refused(self, method: str, /, **fields: Any) -> Refusal:
        """Call a method that must be refused, and change nothing in the store."""
        before = self.logs()
        refusal = await self.call_refused(method, **fields)
        assert self.logs() == before
        assert refusal.metadata_bytes < METADATA_BYTES
        return refusal


class Program(Client):
    """`lrpilot serve` as a process of its own, on ports that the kernel picks."""

    def __init__(self, data: Path, *options: str) -> None:
        super().__init__()
        self.data = data
        self._log = data.parent / f"{next(_NUMBERS)}.log"
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        chosen = [*options]
        for option in ("--listen", "--http"):
            if option not in options and "--config" not in options:
                chosen += [option, "127.0.0.1:0"]
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lrpilot.server.cli", "serve", "--data", data, *chosen],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "COLUMNS": "200"},
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)

    def wait_ready(self) -> "Program":
        """Read the line that says where it serves."""
        try:
            line = self._lines.get(timeout=DEADLINE_S)
        except queue.Empty:
            self.dispose()
            raise AssertionError(f"the server did not start:\n{self.log()}") from None
        found = re.fullmatch(r"lrpilot ready grpc=(\S+:\d+) http=(\S+)\n", line)
        assert found, line
        self.grpc, self.http = found.groups()
        return self

    def log(self) -> str:
        """Return what it wrote to standard error."""
        return self._log.read_text()

    @asynccontextmanager
    async def connected(self) -> AsyncIterator["Program"]:
        """Call it within one event loop."""
        self.connect(self.grpc)
        try:
            yield self
        finally:
            await self.disconnect()

    def dispose(self) -> None:
        """Leave nothing of it behind."""
        if self.process.poll() is None:
            self.process.kill()
        self.ended()

    def end(self, number: int = signal.SIGKILL) -> int:
        """Send a signal; return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        """Return the exit code once it ends."""
        code = self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def further_output(self) -> list[str]:
        """Return the lines on standard output that nobody read yet; it must have ended."""
        lines = []
        while not self._lines.empty():
            lines.append(self._lines.get())
        return lines


@pytest.fixture
async def server() -> AsyncIterator[Replica]:
    """The services over a store in memory."""
    replica = Replica(MemoryStore())
    await replica.start()
    yield replica
    await replica.stop()


Programs = Callable[..., Program]


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    """Start servers as processes of their own; the arguments are options of `serve`."""
    started: list[Program] = []

    def start(*options: str, data: Path = tmp_path / "data") -> Program:
        program = Program(data, *options)
        started.append(program)
        return program

    yield start
    for program in started:
        program.dispose()


@pytest.fixture
async def program(programs: Programs) -> AsyncIterator[Program]:
    """The program, ready, for a test that ends it."""
    async with programs().wait_ready().connected() as connected:
        yield connected


@pytest.fixture(scope="module")
def shared_program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """The program, ready, for tests that take care of their own runs and leave it as it is."""
    program = Program(tmp_path_factory.mktemp("shared") / "data")
    yield program.wait_ready()
    program.dispose()


@pytest.fixture
async def shared(shared_program: Program) -> AsyncIterator[Program]:
    """The shared program, connected."""
    async with shared_program.connected() as connected:
        yield connected


Until = Callable[[Callable[[], Any]], Awaitable[None]]


@pytest.fixture
def until() -> Until:
    """Wait, bounded, until a condition holds; it may be a coroutine function."""

    async def wait(condition: Callable[[], Any]) -> None:
        end_s = time.monotonic() + DEADLINE_S
        while True:
            held = condition()
            if asyncio.iscoroutine(held):
                held = await held
            if held:
                return
            assert time.monotonic() < end_s, "the condition never held"
            await asyncio.sleep(0.01)

    return wait


@pytest.fixture
def ranks() -> Iterator[list["Rank"]]:
    """Processes that are gone at the end."""
    started: list[Rank] = []
    yield started
    for rank in started:
        rank.dispose()
