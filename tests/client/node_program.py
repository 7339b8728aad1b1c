"""One of several ranks on a node that share values; run by test_node.py.

Reads one JSON object of options from its argument, prints one of what it met.
"""

import json
import logging
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lrpilot.client as lrpilot
from lrpilot.client import _node, _timing
from lrpilot.v1 import trainer_pb2 as pb

OPTIONS: dict[str, Any] = json.loads(sys.argv[1])
RANK: int = OPTIONS["rank"]

messages: list[str] = []
tries: list[int] = []
"""First progress of each call for values that the training thread made, answered or not."""


class Keep(logging.Handler):
    """Keeps what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        messages.append(record.getMessage())


def announce(link: Any) -> None:
    """Let a file exist for as long as this rank asks the server on its training thread."""
    ask: Callable[..., Any] = link.stub.GetValues
    asking = Path(OPTIONS["told"]) / f"{RANK}-asks"

    def announced(request: pb.GetValuesRequest, timeout: float) -> Any:
        if not request.blocked:
            return ask(request, timeout=timeout)
        tries.append(request.begin)
        (Path(OPTIONS["told"]) / f"{RANK}-tried-{len(tries)}").write_text("")
        asking.write_text(str(request.begin))
        try:
            return ask(request, timeout=timeout)
        finally:
            asking.unlink()

    link.stub.GetValues = announced


def meet_ranks(at: int) -> None:
    """Wait for the other ranks, as the collectives of a training do."""
    told = Path(OPTIONS["told"])
    (told / f"{RANK}-stands-at-{at}").write_text("")
    while len(list(told.glob(f"*-stands-at-{at}"))) < OPTIONS["ranks"]:
        time.sleep(0.001)


def main() -> None:
    logger = logging.getLogger("lrpilot.client")
    logger.addHandler(Keep())
    logger.setLevel(logging.INFO)
    _node.ROOT = Path(OPTIONS["root"])
    for name, value in OPTIONS.get("timing", {}).items():
        setattr(_timing, name, value)
    if OPTIONS.get("no_space"):
        # Python ignores the signal, so that writing fails as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    rates: list[str] = []
    met: list[list[Any]] = []
    at, stride = 0, OPTIONS.get("stride", 1)

    def meet(directive: lrpilot.Directive) -> None:
        met.append([directive.id, at])

    with lrpilot.connect(
        OPTIONS["address"], run="small", key="start", rank=RANK, world_size=OPTIONS["ranks"]
    ) as pilot:
        pilot.on_directive("evaluate", meet)
        if "no_space" not in OPTIONS:
            announce(pilot._session.link)
        for at in range(0, OPTIONS["steps"] * stride, stride):
            if at == OPTIONS.get("tell"):
                (Path(OPTIONS["told"]) / f"{RANK}-arrives").write_text("")
            if OPTIONS.get("together") and at % 20 == 0:
                meet_ranks(at)
            rates.append(pilot.values(at)[0][0].hex())
            pilot.report(at, 1.0)
            time.sleep(OPTIONS.get("step_s", 0.0))
    said = {"rates": rates, "met": met, "messages": messages, "tries": tries}
    sys.stdout.write(json.dumps(said))


main()
