"""Several servers, and the ways to write where they are."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from concurrent import futures
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import lrpilot.client as lrpilot
from lrpilot.client._address import ALLOWED, Target, read_target
from tests.side_by_side import finish, in_thread

if TYPE_CHECKING:
    from tests.client.conftest import FakeOptimizer, FakeTrainer

SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"
"""Answers of the health service, as protobuf writes them."""

HOSTS = {
    "one": [(socket.AF_INET, "10.0.0.1")],
    "two": [(socket.AF_INET, "10.0.0.2"), (socket.AF_INET6, "fd00::2")],
    "again": [(socket.AF_INET, "10.0.0.2")],
    "new": [(socket.AF_INET6, "fd00::3")],
}


@pytest.fixture
def _names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Know the hosts above by name, and no others."""

    def look_up(host: str, port: int, **_: object) -> list[Any]:
        if host not in HOSTS:
            raise socket.gaierror(socket.EAI_NONAME, "not known")
        return [(family, 1, 6, "", (address, port)) for family, address in HOSTS[host]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


@pytest.mark.usefixtures("_names")
@pytest.mark.parametrize(
    ("address", "name", "has_several"),
    [
        ("10.0.0.1:50051", "ipv4:10.0.0.1:50051", False),
        (" 10.0.0.1:1 ", "ipv4:10.0.0.1:1", False),
        ("[::1]:65535", "ipv6:[::1]:65535", False),
        ("10.0.0.1:1,10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2", True),
        ("[::1]:1, [fd00::2]:2", "ipv6:[::1]:1,[fd00::2]:2", True),
        # A name alone is gRPC's to look up, again and again.
        ("lrpilot.train.svc:50051", "dns:///lrpilot.train.svc:50051", True),
        ("one:1,10.0.0.9:2", "ipv4:10.0.0.1:1,10.0.0.9:2", True),
        ("one:1,two:1,again:1", "ipv4:10.0.0.1:1,10.0.0.2:1", True),
        ("two:1,new:1", "ipv6:[fd00::2]:1,[fd00::3]:1", True),
        ("one:1,gone:1", "ipv4:10.0.0.1:1", False),
        ("dns:///lrpilot:50051", "dns:///lrpilot:50051", True),
        ("dns://8.8.8.8/lrpilot:50051", "dns://8.8.8.8/lrpilot:50051", True),
        ("dns:lrpilot:50051", "dns:lrpilot:50051", True),
        ("dns:///10.0.0.1:50051", "dns:///10.0.0.1:50051", False),
        ("ipv4:10.0.0.1:1,10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2", True),
        ("ipv6:[::1]:1", "ipv6:[::1]:1", False),
        ("unix:run/lrpilot.sock", "unix:run/lrpilot.sock", False),
        ("unix:///run/lrpilot.sock", "unix:///run/lrpilot.sock", False),
    ],
)
def test_what_an_address_stands_for(address: str, name: str, has_several: bool) -> None:
    assert read_target(address) == Target(name, has_several=has_several)


@pytest.mark.usefixtures("_names")
@pytest.mark.parametrize(
    ("address", "detail"),
    [
        ("10.0.0.1", "a port from 1 to 65535 behind '10.0.0.1'"),
        ("lrpilot", "a port from 1 to 65535 behind 'lrpilot'"),
        ("10.0.0.1:0", "a port from 1 to 65535"),
        ("10.0.0.1:65536", "a port from 1 to 65535"),
        ("10.0.0.1:x", "a port from 1 to 65535"),
        ("10.0.0.1:-1", "a port from 1 to 65535"),
        ("10.0.0.1:1,", "a port from 1 to 65535 behind ''"),
        ("10.0.0.1:1,10.0.0.2", "a port from 1 to 65535 behind '10.0.0.2'"),
        ("::1:50051", ALLOWED),
        ("[10.0.0.1]:1", ALLOWED),
        ("[one]:1", ALLOWED),
        ("http://lrpilot:50051", ALLOWED),
        ("lrpilot:50051/path", "a port"),
        ("a b:1", ALLOWED),
        ("10.0.0.1:1,[::1]:1", ALLOWED),
        ("one:1,new:1", ALLOWED),
        ("gone:1,lost:1", "at least one host that can be found"),
        ("dns:///lrpilot", "a port"),
        ("ipv4:lrpilot:1", ALLOWED),
        ("ipv4:[::1]:1", ALLOWED),
        ("unix:", ALLOWED),
        ("unix:///", ALLOWED),
    ],
)
def test_an_address_that_cannot_be_is_refused(address: str, detail: str) -> None:
    with pytest.raises(lrpilot.InvalidArgument) as caught:
        read_target(address)
    assert str(caught.value).startswith(f"address: got {address!r}; allowed: {ALLOWED}")
    assert detail in str(caught.value)


@pytest.mark.usefixtures("_names")
def test_a_host_that_cannot_be_found_is_left_out_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "lrpilot.client"):
        read_target("one:1,gone:1")
    assert caplog.messages == ["the host 'gone' of the address 'one:1,gone:1' cannot be found"]


class Health:
    """A server that says of itself whether it serves, and counts what else it is asked."""

    def __init__(self, status: bytes) -> None:
        self.watched = threading.Event()
        self.asked: list[str] = []
        self.ended = threading.Event()

        def watch(_: bytes, __: grpc.ServicerContext) -> Iterator[bytes]:
            self.watched.set()
            yield status
            self.ended.wait(60)

        def refuse(_: bytes, context: grpc.ServicerContext) -> bytes:
            self.asked.append("a call")
            context.abort(grpc.StatusCode.UNAVAILABLE, "it said that it does not serve")
            raise AssertionError

        serves = grpc.method_handlers_generic_handler
        watched = grpc.unary_stream_rpc_method_handler(watch)
        refused = grpc.unary_unary_rpc_method_handler(refuse)
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        self._server.add_generic_rpc_handlers(
            (
                serves("grpc.health.v1.Health", {"Watch": watched}),
                serves("lrpilot.v1.TrainerService", {"AttachRun": refused}),
            )
        )
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def stop(self) -> None:
        self.ended.set()
        self._server.stop(0).wait()


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def train(trainer: FakeTrainer, address: str, steps: int) -> lrpilot.Pilot:
    """Train some steps, and hold every value against the server's formula."""
    pilot = lrpilot.connect(address, run="small")
    for at in range(steps):
        assert pilot.values(at) == ((trainer.rate(at), trainer.decay(at)),)
        pilot.report(at, 1.0)
    return pilot


@pytest.mark.parametrize("order", ["dead first", "dead last"])
def test_an_address_that_is_dead_from_the_start_is_passed_over(
    trainer: FakeTrainer, order: str
) -> None:
    both = [f"127.0.0.1:{free_port()}", trainer.address]
    address = ",".join(both if order == "dead first" else reversed(both))
    train(trainer, address, 30).close()
    assert set(trainer.losses) == set(range(30))


def test_a_name_and_a_target_are_taken(trainer: FakeTrainer) -> None:
    for address in (f"localhost:{trainer.port}", f"dns:///localhost:{trainer.port}"):
        lrpilot.connect(address, run="small").close()
    assert len(trainer.calls["AttachRun"]) == 2


def test_a_server_that_says_that_it_does_not_serve_is_not_asked(trainer: FakeTrainer) -> None:
    other = Health(NOT_SERVING)
    try:
        pilot = train(trainer, f"127.0.0.1:{other.port},{trainer.address}", 30)
        assert other.watched.wait(60)
        pilot.close()
    finally:
        other.stop()
    assert other.asked == []
    assert set(trainer.losses) == set(range(30))


def test_one_address_is_not_watched() -> None:
    """A watch is one call more at each connection: not for nothing in a storm of thousands."""
    other = Health(SERVING)
    try:
        with pytest.raises(lrpilot.ServerUnavailable, match="does not serve"):
            lrpilot.connect(f"127.0.0.1:{other.port}", run="small", outage_timeout_s=0.5)
    finally:
        other.stop()
    assert other.asked
    assert not other.watched.is_set()


def test_a_server_that_comes_up_at_the_other_address_takes_over(
    trainer: FakeTrainer, optimizer: FakeOptimizer
) -> None:
    other = free_port()
    address = f"{trainer.address},127.0.0.1:{other}"
    with lrpilot.connect(address, run="small") as pilot:
        scheduler = pilot.scheduler(optimizer)
        trainer.stop()
        for _ in range(7):
            scheduler.step(loss=1.0)
        thread, got = in_thread(lambda: scheduler.step(loss=1.0))
        trainer.port = other
        trainer.start()
        finish(thread)
        assert got == [None]
        assert optimizer.rates == [trainer.rate(8)]
    assert set(trainer.losses) == set(range(8))
