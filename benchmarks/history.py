"""What a long run costs: bytes per step on disk, the start of a server, a resume far back.

A job of one reporter trains with 3 groups, LR and WD, and D = 128, through the server's own
ledger, committer and SQLite store, in this process: it takes a block of values and reports the
losses of as many steps in one call, `--batch` steps at a time. At each length a fresh process
finds the run as a starting server does, and then with what lies at a tenth of its length.

Two stores are written: one as a server keeps it, with snapshots and packed rows, and one that is
left as it was written, up to `--plain` steps. Progress goes to standard error.

    python benchmarks/history.py --lengths 10000 100000 1000000 --batch 16
"""

import argparse
import asyncio
import json
import math
import random
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lrpilot import core
from lrpilot.server._commit import GroupCommitter
from lrpilot.server._history import History
from lrpilot.server._ledger import Ledger
from lrpilot.server._sql_store import open_store

RUN = "long"
DELAY = 128
SPEC = {
    "name": RUN,
    "total": 1_000_000,
    "learning_rate": {"peak": 3e-4, "warmup": 2000, "decay": {"style": "cosine"}},
    "weight_decay": {"start": 0.01, "end": 0.1, "style": "linear"},
    "groups": [
        {"name": "decayed"},
        {"name": "embedding", "peak": 1e-4},
        {"name": "router", "peak": 3e-5},
    ],
    "policies": [{"kind": "plateau", "patience": 20_000}],
    "feedback": {"delay": DELAY},
}
NEVER = 2**62

OPEN_SCRIPT = """
import json, resource, sys, time
from lrpilot.server._history import History
from lrpilot.server._sql_store import open_store

folder, floor = sys.argv[1], None if sys.argv[2] == "-" else int(sys.argv[2])
store = open_store(folder)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begun = time.perf_counter()
run = History(store).load("long", floor)
seconds = time.perf_counter() - begun
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, before / 1024, peak / 1024, run.state.seq, run.state.floor]))
"""


class Job:
    """A job that trains on a store, further and further."""

    def __init__(self, folder: Path, batch: int, norms: bool, *, plain: bool) -> None:
        self.folder = folder
        self._batch, self._norms, self._plain = batch, norms, plain
        self._at = 0
        self._noise = random.Random(7)  # noqa: S311

    async def train(self, until: int) -> float:
        """Go on until there; return the steps per second."""
        store = open_store(self.folder)
        committer = GroupCommitter(store)
        history = History(store, snapshot_every=NEVER) if self._plain else History(store)
        ledger = Ledger(store, committer, history)
        run = await ledger.find(RUN)
        if not self._at:
            await ledger.transact(
                run, lambda state: (core.create_run(state, core.parse_spec(SPEC), "create"), None)
            )
            request = core.OpenRequest(request_id="open", token="0" * 32, incarnation="one")
            await ledger.transact(run, lambda state: (core.open_attempt(state, request), None))
        begun, first, told_s = time.perf_counter(), self._at, time.perf_counter()
        while self._at < until:
            count = min(self._batch, until - self._at)
            wanted = core.ValuesRequest(begin=self._at, count=count, in_use=self._at)

            def take(
                state: core.RunState, wanted: core.ValuesRequest = wanted
            ) -> tuple[list[core.Event], None]:
                found = core.get_values(state, wanted)
                return ([found] if isinstance(found, core.Recorded) else []), None

            await ledger.transact(run, take)
            said = [self._report(at) for at in range(self._at, self._at + count)]

            def report(
                state: core.RunState, said: list[core.Report] = said
            ) -> tuple[list[core.Event], None]:
                return core.report_losses(state, said, rank=0, incarnation="one")[0], None

            await ledger.transact(run, report)
            self._at += count
            if time.perf_counter() - told_s > 10.0:
                told_s = time.perf_counter()
                rate = (self._at - first) / (told_s - begun)
                sys.stderr.write(f"  {self._at:,} of {until:,} steps, {rate:,.0f} steps/s\n")
        seconds = time.perf_counter() - begun
        await ledger.settle()
        await committer.close()
        store.close()
        return (until - first) / seconds

    def _report(self, at: int) -> core.Report:
        loss = 2.0 + 8.0 * math.exp(-at / 2e5) + self._noise.gauss(0.0, 0.05)
        norm = abs(self._noise.gauss(1.0, 0.2)) if self._norms else None
        # float32, as a trainer has them.
        return core.Report(at, _single(loss), 1.0, at + 1, gradient_norm=norm and _single(norm))

    def bytes_on_disk(self) -> int:
        """Return the size of the store, with the snapshots."""
        store = open_store(self.folder)
        try:
            return store.size()
        finally:
            store.close()

    def opened(self, floor: int | None = None) -> list[float]:
        """Return what a fresh process needs to find the run: seconds, MiB before and after."""
        script = [sys.executable, "-c", OPEN_SCRIPT, str(self.folder)]
        answer = subprocess.run(  # noqa: S603
            [*script, "-" if floor is None else str(floor)],
            check=True,
            capture_output=True,
            text=True,
        )
        found: list[float] = json.loads(answer.stdout)
        return found


def _single(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def main() -> None:
    """Measure, and print one line per length."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--batch", type=int, default=16, help="steps per call (%(default)s)")
    parser.add_argument("--norms", action="store_true", help="report gradient norms as well")
    parser.add_argument("--plain", type=int, default=100_000, help="(%(default)s)")
    parser.add_argument("--folder", type=Path, help="where the databases go; they are removed")
    arguments = parser.parse_args()
    if not 1 <= arguments.batch <= DELAY:
        parser.error(f"--batch must be 1 to {DELAY}, the delay")

    out = sys.stdout.write
    out(
        f"{arguments.batch} steps per call, gradient norms "
        f"{'reported' if arguments.norms else 'not reported'}\n\n"
        f"{'':>10}{'bytes per step':>18}{'start':>26}{'at a tenth':>20}\n"
        f"{'steps':>10}{'plain':>9}{'packed':>9}{'rows':>9}{'seconds':>9}{'MiB':>8}"
        f"{'seconds':>12}{'MiB':>8}{'steps/s':>10}\n"
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        kept = Job(Path(name) / "kept", arguments.batch, arguments.norms, plain=False)
        plain = Job(Path(name) / "plain", arguments.batch, arguments.norms, plain=True)
        for length in sorted(arguments.lengths):
            rate = asyncio.run(kept.train(length))
            before = "-"
            if length <= arguments.plain:
                asyncio.run(plain.train(length))
                before = f"{plain.bytes_on_disk() / length:.1f}"
            seconds, _, memory, rows, _ = kept.opened()
            far_s, _, far_memory, _, _ = kept.opened(length // 10)
            out(
                f"{length:>10,}{before:>9}{kept.bytes_on_disk() / length:>9.1f}{rows:>9,.0f}"
                f"{seconds:>9.2f}{memory:>8.0f}{far_s:>12.2f}{far_memory:>8.0f}{rate:>10,.0f}\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
