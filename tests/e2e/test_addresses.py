"""Two addresses for one run: where a server ends, the next one may come up at the other."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.e2e.harness import make_spec

if TYPE_CHECKING:
    from lrpilot.client import Pilot
    from tests.server.conftest import Program

STEPS = 60


def free_address() -> str:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{bound.getsockname()[1]}"


def train(pilot: Pilot, midway: Callable[[], object]) -> list[str]:
    """Train, do something in the middle, and return the LR of each step."""
    rates = []
    for at in range(STEPS):
        rates.append(pilot.values(at)[0][0].hex())
        pilot.report(at, 1.0 + at % 3)
        if at == STEPS // 3:
            midway()
    return rates


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_at_the_other_address_goes_on(
    servers: Callable[..., Program], connect: Callable[..., Pilot], number: signal.Signals
) -> None:
    """One folder, hence one server at a time: the second starts when the first has ended."""
    first, there = servers(), free_address()
    address = f"{first.grpc},{there}"
    pilot = connect(address, "moved", spec=make_spec("moved"))
    ended: list[int] = []

    def move() -> None:
        ended.append(first.end(number))
        servers(there)

    rates = train(pilot, move)
    assert ended == [0 if number == signal.SIGTERM else -signal.SIGKILL]
    # Once more, the same losses and a server that stays.
    stayed = connect(address, "stayed", spec=make_spec("stayed"))
    assert rates == train(stayed, lambda: None)
