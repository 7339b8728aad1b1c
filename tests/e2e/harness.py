"""The real program, real clients in processes of their own, and what they leave to compare.

Nothing here knows how values come about: that is `tests.rules.reference`.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc

from lrpilot.v1 import runs_pb2 as pb
from lrpilot.v1.runs_pb2_grpc import RunServiceStub
from tests.e2e.training import loss_at
from tests.rules.reference import Decided, Hex, Reference, Version
from tests.server.conftest import Program

ROOT = Path(__file__).resolve().parents[2]

DEADLINE_S = 60.0
"""Every wait in these tests ends by then."""

LEADER_TIMING = {"LEADER_PATIENCE_S": 1.0, "HOLDER_WAIT_S": 0.2, "BACKOFF_CAP_S": 0.2}
"""A job that loses patience soon meets more of it; how it goes on is the same."""

LAST_BYTES = 4096
"""More than a line of any rank."""

Spec = dict[str, Any]


def make_spec(name: str, *, delay: int = 8, **fields: Any) -> Spec:
    """Return a spec whose LR and WD differ at every progress, with a plateau that fires."""
    return {
        "name": name,
        "total": 1_000_000,
        "learning_rate": {"init": 1e-3, "peak": 1e-2, "warmup": 500_000},
        "weight_decay": {"start": 0.01, "end": 0.1, "style": "cosine", "over": 1_000_000},
        "policies": [{"kind": "plateau", "patience": 2, "factor": 0.99}],
        "feedback": {"delay": delay, "timeout": "60s"},
    } | fields


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait, bounded, until a condition holds."""
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, f"never: {what}"
        time.sleep(0.005)


def without_ids(text: str) -> str:
    """Return a text without ids of adjustments: they go by how the reports came in batches."""
    return re.sub(r"\b\d+-\d+-\d+(-\d+)?\b", "ID", text)


class Expected(Reference):
    """The reference of one run; once it is asked, nothing more may happen to it."""

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> "Expected":
        return cls(spec["feedback"]["delay"], [Version(0, 0, spec)])

    def feed(self, losses: Mapping[int, float | None]) -> "Expected":
        """Take losses with the distance to the next as the increment; None: there is none."""
        at = sorted(losses)
        for here, there in zip(at, [*at[1:], at[-1] + 1], strict=True):
            self.report(here, losses[here], there)
        return self

    @cached_property
    def _all(self) -> Decided:
        return super().decided()

    def decided(self, until: float = float("inf")) -> Decided:
        return self._all if until == float("inf") else super().decided(until)


# The server.


def serve(data: Path, address: str = "127.0.0.1:0", *options: str) -> Program:
    """Start `lrpilot serve` and wait until it serves."""
    program: Program = Program(data, "--listen", address, *options)
    return program.wait_ready()


class Nursery:
    """Starts servers that have their imports behind them; see nursery_program.py."""

    def __init__(self, data: Path, address: str) -> None:
        self._data, self._address = data, address
        self._log = data.parent / f"{data.name}.log"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.nursery_program"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._said: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._pid = 0

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self._said.append(line)
                self._changed.notify_all()

    def _hear(self, start: str) -> str:
        """Wait for a line that begins so, and return the rest of it."""

        def found() -> list[str]:
            return [line for line in self._said if line.startswith(start)]

        with self._changed:
            assert self._changed.wait_for(found, DEADLINE_S), f"no {start!r} in {self._said}"
            return found()[0].removeprefix(start).strip()

    def start(self) -> None:
        """Start a server, at the same address and on the same data as every one before."""
        assert self._process.stdin is not None
        with self._changed:
            self._said.clear()
        options = ["--data", str(self._data), "--listen", self._address, "--http", "127.0.0.1:0"]
        self._process.stdin.write(json.dumps([str(self._log), "serve", *options]) + "\n")
        self._process.stdin.flush()
        self._pid = int(self._hear("pid "))

    def wait_ready(self) -> None:
        """Wait until it serves."""
        self._hear("lrpilot ready ")

    def end(self, number: int) -> None:
        """Send a signal; it must be the signal that ends it."""
        os.kill(self._pid, number)
        code = int(self._hear("ended "))
        self._pid = 0
        assert code == (0 if number == signal.SIGTERM else -number), self._log.read_text()

    def close(self) -> None:
        """Leave nothing of it behind."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        assert self._process.stdout is not None
        self._process.stdout.close()


class Runs:
    """What people see of the runs of a server."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self._stub: Any = RunServiceStub(self._channel)

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def run(self, name: str) -> Any:
        """Return a run."""
        return self._stub.GetRun(pb.GetRunRequest(run=name), timeout=DEADLINE_S).run

    def change(self, request: Any) -> Any:
        """Send a request of an operator."""
        approves = isinstance(request, pb.ApproveAdviceRequest)
        method = self._stub.ApproveAdvice if approves else self._stub.AdjustRun
        return method(request, timeout=DEADLINE_S)

    def events(self, name: str) -> Iterator[Any]:
        """Return the log of a run."""
        token = ""
        while True:
            request = pb.ListEventsRequest(run=name, page_size=1000, page_token=token)
            page = self._stub.ListEvents(request, timeout=DEADLINE_S)
            yield from page.events
            token = page.next_page_token
            if not token:
                return

    def losses(self, name: str) -> dict[int, dict[int, float | None]]:
        """Return attempt to progress to the loss in the log, or None: said to have none.

        Without those of skipped updates.
        """
        found: dict[int, dict[int, float | None]] = {}
        for event in self.events(name):
            for item in event.losses:
                assert not item.late
                if item.skipped:
                    continue
                loss = item.loss if item.HasField("loss") else None
                attempt = found.setdefault(event.attempt, {})
                assert item.progress not in attempt, f"two reports for {item.progress}"
                attempt[item.progress] = loss
        return found


# The ranks.


@dataclass(frozen=True)
class Used:
    """What one rank used at one step."""

    attempt: int
    progress: int
    values: Hex
    """LR and WD, as `float.hex`."""


class Rank:
    """One training process; see its program, rank_program.py or another, for the options."""

    def __init__(
        self,
        folder: Path,
        address: str,
        spec: Spec,
        rank: int,
        *,
        program: str = "rank_program",
        **options: Any,
    ) -> None:
        self.rank = rank
        self._folder = folder / f"rank{rank}-{options['key']}"
        self._folder.mkdir()
        plan = {
            "address": address,
            "spec": spec,
            "rank": rank,
            "folder": str(self._folder),
            "end_file": str(folder / f"end-{options['key']}"),
            **options,
        }
        with (self._folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"tests.e2e.{program}", json.dumps(plan)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def lines(self, name: str) -> list[Any]:
        """Return what it wrote line by line into a file of its folder."""
        path = self._folder / name
        if not path.exists():
            return []
        lines = path.read_text().splitlines(keepends=True)
        # SIGKILL may have cut the last one short.
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def last(self, name: str) -> Any:
        """Return what it wrote last, or None; quickly, for whoever looks again and again."""
        path = self._folder / name
        if not path.exists():
            return None
        with path.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - LAST_BYTES, 0))
            whole = file.read().rpartition(b"\n")[0]
        return json.loads(whole.rpartition(b"\n")[2]) if whole else None

    @property
    def log(self) -> str:
        """What it wrote to its standard streams."""
        return (self._folder / "log").read_text()

    def size(self) -> int:
        """Return a number that grows with each step."""
        path = self._folder / "used"
        return path.stat().st_size if path.exists() else 0

    def used(self) -> list[Used]:
        """Return what it used, in order."""
        return [Used(a, n, tuple(values)) for a, n, values in self.lines("used")]

    def acknowledged(self) -> dict[int, str]:
        """Return progress to loss, in hexadecimal, of what the server said is durable."""
        return {n: loss for n, loss, _ in self.lines("acknowledged")}

    def repeated(self) -> int:
        """Return how many reports were durable before: their first answer was lost."""
        return sum(outcome == "REPEATED" for _, _, outcome in self.lines("acknowledged"))

    def lost(self) -> list[tuple[str, str]]:
        """Return method and status of each call that found no answer."""
        return [(method, code) for method, code in self.lines("lost")]

    def outcome(self) -> list[str]:
        """Return the names of the errors that ended it; empty: it came to its end."""
        (outcome,) = self.lines("outcome")
        return [str(name) for name in outcome]

    def reached(self, progress: int) -> bool:
        """Return whether it has used the values at a progress."""
        assert self.process.poll() is None, self.log
        used = self.last("used")
        return used is not None and bool(used[1] >= progress)

    def send(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Return the exit code once it ends."""
        return self.process.wait(DEADLINE_S)

    def dispose(self) -> None:
        """Leave nothing of it behind."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(DEADLINE_S)


def ask_to_end(folder: Path, key: str) -> None:
    """Let the ranks of a job agree where to end, and end there."""
    partial = folder / f"ask-{key}"
    partial.write_text("ask")
    partial.replace(folder / f"end-{key}")


def one_value(ranks: Sequence[Rank]) -> dict[tuple[int, int], Hex]:
    """Return what was used at each (attempt, progress): the same on every rank."""
    values: dict[tuple[int, int], Hex] = {}
    for rank in ranks:
        for used in rank.used():
            known = values.setdefault((used.attempt, used.progress), used.values)
            assert known == used.values, f"rank {rank.rank} differs: {used}, not {known}"
    return values


def hold_to_the_promise(
    spec: Spec, salt: str, addresses: Sequence[str], ranks: Sequence[Rank], steps: int
) -> None:
    """Hold a job that came to its end in one attempt, rank 0 reporting, against the promise.

    Every server at `addresses` is asked; the job made at least so many steps.
    """
    # One value for each progress, on every rank, and no gap.
    values = one_value(ranks)
    for rank in ranks:
        used = [(used.attempt, used.progress) for used in rank.used()]
        assert used == [(1, n) for n in range(len(used))]
    made = len(ranks[0].used())
    assert made >= steps
    for address in addresses:
        with Runs(address) as runs:
            run, log = runs.run(spec["name"]), runs.losses(spec["name"])
        assert (run.attempt, run.waivers, run.late_losses) == (1, 0, 0)
        # Every acknowledged loss is in the log, once, and every loss was acknowledged in the end.
        logged = {n: "none" if loss is None else loss.hex() for n, loss in log[1].items()}
        assert logged == {n: loss_at(n, salt).hex() for n in range(made)}
        assert ranks[0].acknowledged() == logged
    # The values are what the losses in the log say.
    reference = Expected.of(spec)
    reference.open(0)
    reference.feed(log[1])
    assert values == {(1, n): reference.expected(n) for n in range(len(values))}
