"""The server, assembled: store, ledger, services, health, reflection, metrics, and its end."""

import asyncio
import gc
import ipaddress
import logging
import resource
import signal
import socket
from collections.abc import Collection, Coroutine, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lrpilot.server._commit import GroupCommitter
from lrpilot.server._history import History
from lrpilot.server._journal import about
from lrpilot.server._ledger import Ledger
from lrpilot.server._metrics import Metrics
from lrpilot.server._retention import Retention
from lrpilot.server._rpc import Service, handlers
from lrpilot.server._run_service import RunService
from lrpilot.server._sql_store import open_store
from lrpilot.server._store import Store, StoreError, StoreUnavailable
from lrpilot.server._tracing import NO_TRACING, Tracing
from lrpilot.server._trainer_service import TrainerService
from lrpilot.server.web import Web, listen
from lrpilot.v1 import runs_pb2, trainer_pb2

logger = logging.getLogger("lrpilot.server")

MESSAGE_BYTES = 1024 * 1024
"""Largest message taken or sent."""

DRAIN_S = 10.0
"""How long calls under way may take once the server is told to end."""

CHECK_S = 1.0
"""Time between two looks at whether the store can be read or, after a failure, written."""

MEASURE_S = 15.0
"""Time between two looks at how large the store is."""

LIVENESS = "live"
"""The name under which the health service says that the process lives, store or not."""

SERVER_OPTIONS = (
    # Otherwise a second server binds the same port, and each gets half of the calls.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.absolute_max_metadata_size", 16 * 1024),
    # By default gRPC drops calls beyond 1,000 pending ones: a large job opens with more.
    ("grpc.server.max_pending_requests", 100_000),
    ("grpc.server.max_pending_requests_hard_limit", 200_000),
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.max_connection_idle_ms", 10 * 60 * 1000),
    ("grpc.max_connection_age_ms", 60 * 60 * 1000),
    ("grpc.max_connection_age_grace_ms", 60 * 1000),
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How a server is started."""

    data: Path
    """Folder of the database and its lock."""
    store: str | None = None
    """Address of the event log, as `open_store` takes it; None: SQLite in `data`."""
    listen: str
    """HOST:PORT for gRPC; port 0: the kernel picks."""
    http: str | None
    """HOST:PORT for metrics, probes and the page; None: not served."""
    insecure: bool = False
    """Whether to listen beyond loopback although nothing is encrypted."""
    keep_finished_days: float | None = None
    """How long finished runs are kept after their last event; None: for ever."""
    traces: str | None = None
    """URL of the collector that gets traces, with or without the path; None: none does."""


class StartupError(Exception):
    """The server cannot start; the text is for people."""


async def serve(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain: what was begun is finished, and is durable.

    Prints one line to standard output once it serves. A second signal ends the process at once,
    which loses nothing that was acknowledged. Raises StartupError.
    """
    if not config.insecure:
        for option, address in (("listen", config.listen), ("http", config.http)):
            if address is not None:
                await _refuse_beyond_loopback(option, address)
    _raise_file_limit()
    stop = asyncio.Event()
    tracing = _tracing(config.traces)
    try:
        with _opened_store(config) as store, _signals(stop):
            metrics = Metrics()
            committer = GroupCommitter(store, metrics)
            try:
                server = Server(store, committer, metrics, tracing)
                await _serve(config, store, server, metrics, stop)
            finally:
                await committer.close()
    finally:
        await asyncio.to_thread(tracing.close)
    logger.info("stopped")


class Server:
    """The services of one replica on one gRPC server."""

    def __init__(
        self,
        store: Store,
        committer: GroupCommitter,
        metrics: Metrics,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self.ledger = Ledger(store, committer, History(store, metrics), tracing)
        self.grpc = grpc.aio.server(options=SERVER_OPTIONS)
        self._store = store
        self._committer = committer
        self._metrics = metrics
        self._tasks: list[asyncio.Task[None]] = []
        self._trainer_service = TrainerService(self.ledger, tracing)
        self.runs = RunService(self.ledger)
        services: dict[ServiceDescriptor, Service] = {
            trainer_pb2.DESCRIPTOR.services_by_name["TrainerService"]: self._trainer_service,
            runs_pb2.DESCRIPTOR.services_by_name["RunService"]: self.runs,
        }
        self._names = [descriptor.full_name for descriptor in services]
        self._health = _Health(("", *self._names))
        self.not_ready: str | None = "starting"
        """Why no calls are wanted here, for people; None: it takes calls, and the store reads
        and writes."""
        self.grpc.add_generic_rpc_handlers(
            tuple(
                handlers(descriptor, service, metrics, tracing)
                for descriptor, service in services.items()
            )
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        reflection.enable_server_reflection(
            (*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME), self.grpc
        )
        metrics.watch(self.ledger, committer)
        if store.folder is not None:
            metrics.watch_folder(store.folder)

    @property
    def is_ready(self) -> bool:
        """Whether it takes calls, and the store reads and writes."""
        return self.not_ready is None

    def bind(self, address: str) -> str:
        """Return the address with the port that was bound. Raises StartupError."""
        try:
            port = self.grpc.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if not port:
            raise StartupError(
                f"cannot listen on {address} for gRPC: {_why_not(address)}; "
                "stop what listens there or choose another address with --listen"
            )
        return f"{address.rpartition(':')[0]}:{port}"

    async def start(self) -> None:
        """Take calls, and say so."""
        await self.grpc.start()
        await self._health.live()
        await self._say_ready(None)
        self._tasks = [
            asyncio.create_task(self.ledger.follow()),
            asyncio.create_task(self._check_store()),
            asyncio.create_task(self._measure_store()),
        ]

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something in the background until the server drains."""
        self._tasks.append(asyncio.create_task(work))

    async def _check_store(self) -> None:
        """Say who may send calls here: those that need the store find another replica.

        A write that fails is enough to say no. To say yes again takes one that succeeds: a store
        that can be read says nothing of whether it can be written.
        """
        said = None
        while True:
            failure = await self._failure()
            if failure is None and said is not None:
                logger.info("ready again")
                self.ledger.resume()
            elif failure is not None:
                self.ledger.suspend()
                if said != failure.reason:
                    trace = failure.__cause__ if failure.reason == "other" else None
                    logger.error(
                        "not ready: %s",
                        failure,
                        exc_info=trace,
                        extra=about(None, reason=failure.reason),
                    )
            said = None if failure is None else failure.reason
            self._metrics.store_writable(failure is None)
            await self._say_ready(None if failure is None else str(failure))

    async def _failure(self) -> StoreUnavailable | None:
        """Return why the store fails, at once where a write does, or None after a moment."""
        try:
            if self.is_ready:
                await self._committer.wait_for_failure(CHECK_S)
                if self._committer.failure is not None:
                    # It is counted already.
                    return self._committer.failure
                await asyncio.to_thread(self._store.check)
            else:
                await asyncio.sleep(CHECK_S)
                await self._committer.probe()
        except StoreUnavailable as error:
            failure = error
        except Exception as error:
            # Nobody foresaw it; but readiness must not stay as it was for ever.
            failure = StoreUnavailable(f"the store: {type(error).__name__}: {error}", "other")
            failure.__cause__ = error
        else:
            return None
        self._metrics.store_failed(failure.reason)
        return failure

    async def _say_ready(self, not_ready: str | None) -> None:
        self.not_ready = not_ready
        await self._health.ready(not_ready is None)

    async def _measure_store(self) -> None:
        """Say how large the store is: a scrape must not wait for a database."""
        while True:
            # Readiness tells where it cannot be read.
            with suppress(StoreUnavailable):
                self._metrics.store_measured(await asyncio.to_thread(self._store.size))
            await asyncio.sleep(MEASURE_S)

    async def drain(self) -> None:
        """Take no more calls; return once those under way are done, or their time is up."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.not_ready = "draining"
        await self._health.enter_graceful_shutdown()
        self._health.end_watches()
        self._trainer_service.drain()
        self.ledger.hurry()
        await self.grpc.stop(DRAIN_S)
        await self.ledger.settle()


class _Health(health.aio.HealthServicer):  # type: ignore[misc]
    """The standard health service, whose watches do not hold up the end of the server.

    Every client that was given several addresses watches it, for as long as it is connected.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self._names = names
        self._is_ready = self._is_ending = False
        self._changed = asyncio.Event()

    async def live(self) -> None:
        """Say that the process lives; that stays so."""
        await self.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)

    async def ready(self, is_ready: bool) -> None:
        """Say whether calls are wanted here, also to everyone who watches."""
        status = health_pb2.HealthCheckResponse
        for name in self._names:
            await self.set(name, status.SERVING if is_ready else status.NOT_SERVING)
        self._is_ready = is_ready
        self._wake()

    def end_watches(self) -> None:
        """Say the end to everyone who watches, and end the watches: they ask elsewhere now."""
        self._is_ready, self._is_ending = False, True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        """Send the status of a service, and again whenever it changes."""
        answer = health_pb2.HealthCheckResponse
        if request.service not in self._names:
            await context.write(answer(status=answer.SERVICE_UNKNOWN))
        said: bool | None = None
        while True:
            changed = self._changed
            if request.service in self._names and said != self._is_ready:
                said = self._is_ready
                await context.write(answer(status=answer.SERVING if said else answer.NOT_SERVING))
            if self._is_ending and said in {False, None}:
                return
            if changed is self._changed:
                await changed.wait()


async def _serve(
    config: ServerConfig,
    store: Store,
    server: Server,
    metrics: Metrics,
    stop: asyncio.Event,
) -> None:
    grpc_address = server.bind(config.listen)
    web = None
    if config.http is not None:
        host = config.http.rpartition(":")[0]
        listener = _listen_http(config.http)
        web = Web(
            listener,
            host,
            registry=metrics.registry,
            ledger=server.ledger,
            runs=server.runs,
            not_ready=lambda: server.not_ready,
        )
    async with nullcontext() if web is None else web.served():
        await server.start()
        # What was loaded until now stays to the end. A full collection of garbage need not look
        # through it each time, in which nobody is served.
        gc.freeze()
        http_address = "off" if web is None else web.address
        print(f"lrpilot ready grpc={grpc_address} http={http_address}", flush=True)  # noqa: T201
        warming = asyncio.create_task(server.ledger.warm_up())
        if config.keep_finished_days is not None:
            keep_s = config.keep_finished_days * 86400.0
            server.begin(Retention(store, server.ledger, keep_s, metrics).run())
        await stop.wait()
        logger.info("draining: calls under way have %g s to end", DRAIN_S)
        warming.cancel()
        if web is not None:
            web.drain()
        await server.drain()
    # A change that was asked for over HTTP may have begun meanwhile.
    await server.ledger.settle()


def _tracing(url: str | None) -> Tracing:
    """Return what traces for the collector at `url`. Raises StartupError."""
    if url is None:
        return NO_TRACING
    try:
        from lrpilot.server._telemetry import Telemetry  # noqa: PLC0415
    except ImportError as error:
        raise StartupError(
            f"--traces needs OpenTelemetry: {error}; pip install 'lrpilot[telemetry]'"
        ) from error
    try:
        return Telemetry(url)
    except Exception as error:
        # What the variables of the environment say may be of any kind.
        raise StartupError(
            f"traces cannot be sent: {type(error).__name__}: {error}; look at --traces and the "
            "variables OTEL_…"
        ) from error


@contextmanager
def _opened_store(config: ServerConfig) -> Iterator[Store]:
    try:
        store = open_store(config.store if config.store is not None else config.data)
    except (StoreError, ValueError) as error:
        raise StartupError(str(error)) from error
    try:
        try:
            # Otherwise a server on a full disk would say that it is ready, until asked to write.
            store.probe()
        except StoreError as error:
            raise StartupError(str(error)) from error
        yield store
    finally:
        store.close()


@contextmanager
def _signals(stop: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)

    def begin_to_stop() -> None:
        stop.set()
        for number in signals:
            loop.remove_signal_handler(number)

    for number in signals:
        loop.add_signal_handler(number, begin_to_stop)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _listen_http(address: str) -> socket.socket:
    try:
        return listen(address)
    except OSError as error:
        raise StartupError(
            f"cannot listen on {address} for HTTP: {error.strerror or error}; "
            "stop what listens there or choose another address with --http"
        ) from error


def _why_not(address: str) -> str:
    """Return why an address cannot be bound: gRPC does not say."""
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, where = _resolve(host.strip("[]"), int(port))[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen()
    except OSError as error:
        return error.strerror or str(error)
    return "the address is in use"


async def _refuse_beyond_loopback(option: str, address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        found = await asyncio.to_thread(_resolve, host.strip("[]"), int(port))
    except OSError as error:
        raise StartupError(
            f"cannot listen on {address}: {error.strerror or error}; choose another address "
            f"with --{option}"
        ) from error
    if not all(ipaddress.ip_address(str(item[4][0])).is_loopback for item in found):
        what = "can change runs" if option == "listen" else "sees every run"
        raise StartupError(
            f"--{option} {address} reaches beyond this machine, and nothing is encrypted: whoever "
            f"reaches the port {what}; give --insecure if that is meant"
        )


def _resolve(host: str, port: int) -> list[tuple[int, int, int, str, tuple[object, ...]]]:
    return socket.getaddrinfo(  # type: ignore[return-value]
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )


def _raise_file_limit() -> None:
    """Let every rank of a large job connect: the soft limit of many systems is 1,024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
