"""Calls a second after a server comes back, with thousands of ranks: what spreads them.

Real clients, held by eight processes as the ranks of nodes with eight each, train without work at a
fixed step time against a real server. It is killed and started again, and each call for values is
counted from the moment at which it serves. Four ways are compared: with and without jitter (each
rank renews at a random point of its window, and repeats after random pauses), and with and without
sharing on the node. Without jitter every rank asks in the middle of the window, and repeats after
the longest pauses.

    python benchmarks/storm.py --ranks 800 --step 0.25 --delay 32

The clients cost as much of the machine as the server does, so that with two cores the figures are
those of a smaller cluster: the ratios are what counts.
"""

import argparse
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lrpilot.client as lrpilot
from lrpilot.client import _call, _lease, _node

NODE = 8
"""Ranks of a node, each in a process of its own, as in a real job."""

BEFORE_S, AWAY_S, AFTER_S = 2.0, 1.0, 4.0
"""Training before the server is killed, until it is started again, and after it serves."""

BIN_S = 0.25
"""Length of a row of the table."""

PEAK_S = 0.05
"""Length of time over which the peak is measured."""


@dataclass(frozen=True)
class Way:
    """What is compared."""

    jitter: bool
    sharing: bool

    def __str__(self) -> str:
        words = ["jitter"] * self.jitter + ["sharing"] * self.sharing
        return " + ".join(words) or "neither"


WAYS = [Way(jitter, sharing) for sharing in (False, True) for jitter in (False, True)]


class InStep:
    """The random source of clients that all do the same at the same time."""

    def random(self) -> float:
        """Return the middle."""
        return 0.5

    def uniform(self, _: float, bound: float) -> float:
        """Return the bound."""
        return bound


# One process with one rank of every node.


def work(place: int, pipe: Connection) -> None:
    """Serve commands of the parent: hold clients, train, say when calls were made."""
    logging.disable(logging.CRITICAL)
    calls: list[float] = []
    once, sources = _call.Link.once, (_call._random, _lease._random)

    def counted(link: Any, method: Any, request: Any, timeout_s: float) -> Any:
        if type(request).__name__ == "GetValuesRequest":
            calls.append(time.monotonic())
        return once(link, method, request, timeout_s)

    link: Any = _call.Link
    link.once = counted
    node: Any = _node.Node
    draw = node.draw
    while (job := pipe.recv()) is not None:
        way: Way = job["way"]
        in_step: Any = InStep()
        _call._random, _lease._random = sources if way.jitter else (in_step, in_step)
        node.draw = draw if way.jitter else _middle
        os.environ["LOCAL_WORLD_SIZE"] = str(NODE if way.sharing else 1)
        pilots = [
            _connect(job, rank, Path(job["folder"]) / f"node-{rank // NODE}")
            for rank in range(place, job["ranks"], NODE)
        ]
        pipe.send("ready")
        ends = threading.Event()
        thread = threading.Thread(target=_train, args=(pilots, pipe.recv(), job["step_s"], ends))
        thread.start()
        pipe.recv()
        ends.set()
        thread.join()
        pipe.send(list(calls))
        for pilot in pilots:
            pilot._end(0.0)
        calls.clear()


def _middle(_: _node.Node, __: int) -> float:
    return 0.5


def _connect(job: dict[str, Any], rank: int, node: Path) -> lrpilot.Pilot:
    node.mkdir(exist_ok=True)
    _node.ROOT = node
    pilot = lrpilot.connect(
        job["address"],
        run=job["spec"]["name"],
        spec=job["spec"],
        key="storm",
        rank=rank,
        world_size=job["ranks"],
    )
    pilot.values(0)
    return pilot


def _train(
    pilots: Sequence[lrpilot.Pilot], start_s: float, step_s: float, ends: threading.Event
) -> None:
    """Stand at the same step in every process."""
    while not ends.is_set():
        at = int((time.monotonic() - start_s) / step_s)
        for pilot in pilots:
            pilot.values(max(at, 0))
        time.sleep(max(start_s + (at + 1) * step_s - time.monotonic(), 0.0))


# The parent.


class Server:
    """`lrpilot serve`, again and again at one address."""

    def __init__(self, folder: Path) -> None:
        self._data = folder / "data"
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{bound.getsockname()[1]}"

    def start(self) -> None:
        """Start it, and return once it serves."""
        command = [sys.executable, "-m", "lrpilot.server.cli", "serve", "--data", str(self._data)]
        self._process = subprocess.Popen(  # noqa: S603
            [*command, "--listen", self.address, "--http", "127.0.0.1:0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if self._process.stdout is None or not self._process.stdout.readline():
            raise SystemExit("the server did not start")

    def kill(self) -> None:
        """End it at once."""
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()


@contextmanager
def workers() -> Iterator[list[Connection]]:
    """Start the processes that hold the clients."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for place in range(NODE):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(place, theirs), daemon=True))
        processes[-1].start()
        pipes.append(ours)
    try:
        yield pipes
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()


def storm(server: Server, pipes: list[Connection], job: dict[str, Any]) -> list[float]:
    """Let the server die and come back; return when calls were made after that, in seconds."""
    for pipe in pipes:
        pipe.send(job)
    for pipe in pipes:
        pipe.recv()
    start_s = time.monotonic() + 0.2
    for pipe in pipes:
        pipe.send(start_s)
    time.sleep(BEFORE_S)
    server.kill()
    time.sleep(AWAY_S)
    server.start()
    serves_s = time.monotonic()
    time.sleep(AFTER_S)
    for pipe in pipes:
        pipe.send("end")
    return sorted(at - serves_s for pipe in pipes for at in pipe.recv() if at >= serves_s)


def peak(calls: Sequence[float]) -> float:
    """Return the most calls a second, over the shortest time that is looked at."""
    return max(Counter(int(at / PEAK_S) for at in calls).values(), default=0) / PEAK_S


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=800, help="clients, in eights (%(default)s)")
    parser.add_argument("--step", type=float, default=0.25, help="step time, s (%(default)s)")
    parser.add_argument("--delay", type=int, default=32, help="feedback.delay (%(default)s)")
    chosen = parser.parse_args()
    if chosen.ranks < NODE or chosen.step <= 0 or chosen.delay < 2:
        parser.error("--ranks must be at least 8, --step above 0, --delay at least 2")
    found: list[list[float]] = []
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, workers() as pipes:
        server = Server(Path(folder))
        server.start()
        for number, way in enumerate(WAYS, 1):
            _show(f"[{number}/{len(WAYS)}] {way} …")
            job = {
                "way": way,
                "address": server.address,
                "folder": folder,
                "ranks": chosen.ranks // NODE * NODE,
                "step_s": chosen.step,
                "spec": {
                    "name": f"storm-{number}",
                    "total": 100_000,
                    "learning_rate": {"peak": 1e-3, "warmup": 1000},
                    "feedback": {"delay": chosen.delay},
                },
            }
            found.append(storm(server, pipes, job))
            _show(f" {time.monotonic() - began_s:.0f} s\n")
        server.kill()
    print(_table(found, job), flush=True)  # noqa: T201


def _show(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _table(found: list[list[float]], job: dict[str, Any]) -> str:
    delay = job["spec"]["feedback"]["delay"]
    lines = [
        f"{job['ranks']} ranks on {job['ranks'] // NODE} nodes, steps of {job['step_s']:g} s, "
        f"D = {delay}; calls a second for values, by the time since the server serves again",
        "",
        f"{'s':>14}" + "".join(f"{way!s:>20}" for way in WAYS),
    ]
    for row in range(int(AFTER_S / BIN_S)):
        rates = [sum(row == int(at / BIN_S) for at in calls) / BIN_S for calls in found]
        lines.append(f"{row * BIN_S:>14.2f}" + "".join(f"{rate:>20,.0f}" for rate in rates))
    peaks, first = [peak(calls) for calls in found], max(peak(found[0]), 1.0)
    lines += [
        "",
        f"{'calls':>14}" + "".join(f"{len(calls):>20,}" for calls in found),
        f"{'of neither':>14}" + "".join(f"{len(c) / max(len(found[0]), 1):>20.2f}" for c in found),
        f"{f'peak, {PEAK_S:g} s':>14}" + "".join(f"{item:>20,.0f}" for item in peaks),
        f"{'of neither':>14}" + "".join(f"{item / first:>20.2f}" for item in peaks),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
