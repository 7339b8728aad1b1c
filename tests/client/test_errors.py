"""Errors of the server become those of the client by their names."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import pytest

import lrpilot.client as lrpilot
from lrpilot import core
from lrpilot.client import _errors

if TYPE_CHECKING:
    from tests.client.conftest import FakeTrainer, Fault

    Connect = Callable[..., lrpilot.Pilot]
    Refuse = Callable[..., Fault]

OURS = [
    kind
    for name in lrpilot.__all__
    if isinstance(kind := getattr(lrpilot, name), type) and issubclass(kind, lrpilot.LrpilotError)
]


def test_every_error_of_the_server_has_a_class_here() -> None:
    theirs = {
        name
        for name in core.__all__
        if isinstance(kind := getattr(core, name), type) and issubclass(kind, core.LrpilotError)
    }
    assert theirs
    assert theirs <= {kind.__name__ for kind in OURS}


def test_every_error_class_is_public() -> None:
    defined = {
        kind
        for kind in vars(_errors).values()
        if isinstance(kind, type) and issubclass(kind, lrpilot.LrpilotError)
    }
    assert defined == set(OURS)


@pytest.mark.parametrize("kind", OURS)
def test_an_error_travels_between_ranks(kind: type[lrpilot.LrpilotError]) -> None:
    error = kind("text", facts={"n": 7}, violations=[lrpilot.Violation("a.b", "got 1")])
    for copy in (pickle.loads(pickle.dumps(error)), error.again()):
        assert type(copy) is kind
        assert (str(copy), copy.facts, copy.violations) == ("text", {"n": "7"}, error.violations)
    noted = error.again(" (note)", m=1)
    assert (str(noted), noted.facts) == ("text (note)", {"n": "7", "m": "1"})


def test_an_invalid_argument_is_a_value_error() -> None:
    assert issubclass(lrpilot.InvalidArgument, ValueError)


def test_facts_arrive(trainer: FakeTrainer, connect: Connect, refuse: Refuse) -> None:
    trainer.fail("AttachRun", refuse("RunNotFound", "no run is named 'small'", near="smaller"))
    with pytest.raises(lrpilot.RunNotFound) as caught:
        connect()
    assert caught.value.facts == {"near": "smaller"}
    assert str(caught.value) == caught.value.message == "no run is named 'small'"


def test_a_reason_of_a_newer_server_arrives_by_name(
    trainer: FakeTrainer, connect: Connect, refuse: Refuse
) -> None:
    trainer.fail("AttachRun", refuse("TooModern", "the text", when="now"))
    with pytest.raises(lrpilot.ServerError, match="TooModern: the text") as caught:
        connect()
    assert caught.value.facts == {
        "when": "now",
        "reason": "TooModern",
        "code": "FAILED_PRECONDITION",
    }


@pytest.mark.parametrize("reason", ["LrpilotError", "Mapping", "error_class", "_make", "Violation"])
def test_a_reason_cannot_name_what_is_no_error(
    trainer: FakeTrainer, connect: Connect, refuse: Refuse, reason: str
) -> None:
    trainer.fail("AttachRun", refuse(reason))
    with pytest.raises(lrpilot.LrpilotError) as caught:
        connect()
    assert type(caught.value) in (lrpilot.ServerError, lrpilot.LrpilotError)


@pytest.mark.parametrize("packed", [b"", b"\xff\xff\xff", b"\x1a\x05ab", None])
def test_damaged_details_leave_the_status_and_its_text(
    trainer: FakeTrainer, connect: Connect, fault: type[Fault], packed: bytes | None
) -> None:
    trainer.fail("AttachRun", fault(grpc.StatusCode.FAILED_PRECONDITION, "the text", packed))
    with pytest.raises(lrpilot.ServerError, match="answered FAILED_PRECONDITION: the text"):
        connect()


def test_another_service_at_the_address_is_said_at_once() -> None:
    server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(lrpilot.ServerError, match="UNIMPLEMENTED"):
            lrpilot.connect(f"127.0.0.1:{port}", run="small")
    finally:
        server.stop(0).wait()


def test_a_message_over_the_limit_is_not_repeated(
    trainer: FakeTrainer, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    trainer.state = b"0" * (2 * 1024 * 1024)
    pilot = connect()
    pilot.values(0)
    assert pilot._session.save(0) == b""
    assert any("larger than max" in text for text in caplog.messages)
    assert len(trainer.calls["SaveState"]) == 1
