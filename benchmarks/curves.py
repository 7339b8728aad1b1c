"""What it costs to draw a long run: its first picture after a restart, the next one, and a zoom.

A run is written as `history.py` does, and a server process is started on its store. It is asked
over gRPC for the curves of the whole run twice, of a hundredth in the middle, of the newest
hundredth as a page asks every second, and for the newest notable events. Beside it stands what it
takes to have the losses without GetCurves: to read the whole log with ListEvents, page by page; of
a longer log that is measured over its first `--peer` events and scaled up. Progress goes to
standard error.

    python benchmarks/curves.py --length 1000000 --batch 64
    python benchmarks/curves.py --length 100000 --batch 1
"""

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from history import DELAY, RUN, Job

from lrpilot.server._sql_store import open_store
from lrpilot.v1 import runs_pb2 as pb
from lrpilot.v1.runs_pb2_grpc import RunServiceStub

DEADLINE_S = 600.0


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return how long a call took in seconds, and its answer."""
    begun = time.perf_counter()
    answer = call()
    return time.perf_counter() - begun, answer


def measure(address: str, length: int, peer: int) -> None:
    """Ask a server for pictures, and print one line for each."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = RunServiceStub(channel)

        def curves(begin: int = 0, end: int = 0) -> pb.GetCurvesResponse:
            request = pb.GetCurvesRequest(run=RUN, begin=begin, end=end)
            answer: pb.GetCurvesResponse = stub.GetCurves(request, timeout=DEADLINE_S)
            return answer

        stub.GetRun(pb.GetRunRequest(run=RUN), timeout=DEADLINE_S)
        share = length // 100
        notable = pb.ListEventsRequest(run=RUN, newest_first=True, notable=True)
        asked: list[tuple[str, Callable[[], Any]]] = [
            ("the whole run, first", curves),
            ("the whole run, again", curves),
            ("1 % in the middle, first", lambda: curves(length // 2, length // 2 + share)),
            ("1 % in the middle, again", lambda: curves(length // 2, length // 2 + share)),
            ("the newest 1 %", lambda: curves(length - share, length)),
            ("newest notable events", lambda: stub.ListEvents(notable, timeout=DEADLINE_S)),
        ]
        done = []
        for name, call in asked:
            seconds, answer = timed(call)
            done.append((name, seconds, answer.ByteSize()))
        begun, token, events = time.perf_counter(), "", 0
        while events < peer:
            page = stub.ListEvents(
                pb.ListEventsRequest(run=RUN, page_size=1000, page_token=token),
                timeout=DEADLINE_S,
            )
            events, token = events + len(page.events), page.next_page_token
            if not token:
                break
        seconds = time.perf_counter() - begun
        whole = stub.GetRun(pb.GetRunRequest(run=RUN), timeout=DEADLINE_S).run.seq
        peer_s = seconds * whole / events
    out = sys.stdout.write
    out(f"{'':<28}{'seconds':>9}{'KiB':>8}{'of the peer':>14}\n")
    for name, seconds, size in done:
        out(f"{name:<28}{seconds:>9.3f}{size / 1024:>8.0f}{'1 /':>8} {peer_s / seconds:,.0f}\n")
    how = "" if events == whole else f", scaled up from {events:,}"
    out(f"{'peer: all with ListEvents':<28}{peer_s:>9.1f}   ({whole:,} events{how})\n")


def overview_bytes(folder: Path) -> int:
    """Return the bytes of all overviews of the run."""
    store = open_store(folder)
    try:
        return sum(len(one.overview or b"") for one in store.segments(RUN))
    finally:
        store.close()


def main() -> None:
    """Write a run, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=1_000_000, help="steps (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="steps per call (%(default)s)")
    parser.add_argument("--norms", action="store_true", help="report gradient norms as well")
    parser.add_argument("--peer", type=int, default=20_000, help="events (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where the database goes; it is removed")
    arguments = parser.parse_args()
    if not 1 <= arguments.batch <= DELAY:
        parser.error(f"--batch must be 1 to {DELAY}, the delay")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        data = Path(name) / "data"
        job = Job(data, arguments.batch, arguments.norms, plain=False)
        asyncio.run(job.train(arguments.length))
        per_step = job.bytes_on_disk() / arguments.length
        overviews = overview_bytes(data) / arguments.length
        sys.stdout.write(
            f"{arguments.length:,} steps, {arguments.batch} to a call: {per_step:.1f} bytes per "
            f"step, {overviews:.2f} of them overviews\n\n"
        )
        command = [sys.executable, "-m", "lrpilot.server.cli", "serve", "--data", str(data)]
        server = subprocess.Popen(  # noqa: S603
            [*command, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            ready = server.stdout.readline() if server.stdout else ""
            measure(ready.split("grpc=")[1].split()[0], arguments.length, arguments.peer)
        finally:
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    main()
