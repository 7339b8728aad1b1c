"""`make torture`: many rounds in several laboratories, and a table of what came of them.

    python -m tests.crash.torture --faults 1000 --store both --seed 1 --jobs 2

Every kind of fault that can happen here comes as often as every other. Rounds whose fault did not
take hold are played, and judged, but not counted. Ends with 1 where a round broke the promise.
"""

import argparse
import json
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.crash.cluster import StoreKind
from tests.crash.faults import BOTH, FAULTS, kinds, missing
from tests.crash.laboratory import KEPT, Laboratory, has_namespaces
from tests.crash.rounds import RoundResult

WIDTH = 100
"""Columns of the table, whatever it is written to."""

console = Console(highlight=False, soft_wrap=True, width=WIDTH)

MOST_MISSES = 3
"""A kind that did not take hold in so many times as many rounds as asked for is given up."""


SHOWN = 5
"""Violations of a round that are shown."""


@dataclass
class Row:
    """What came of one kind of fault on one store."""

    fault: str
    store: StoreKind
    count: int = 0
    recoveries: int = 0
    longest_stall_s: float = 0.0
    violations: int = 0
    missed: int = 0
    """Rounds whose fault did not take hold."""

    def add(self, result: RoundResult) -> None:
        """Count a round."""
        self.violations += len(result.violations)
        if not result.hit:
            self.missed += 1
            return
        self.count += 1
        self.recoveries += result.recovered
        self.longest_stall_s = max(self.longest_stall_s, result.stall_s)


class Torture:
    """The rounds of one store, handed out to laboratories as these become free."""

    def __init__(self, store: StoreKind, names: Sequence[str], faults: int, seed: int) -> None:
        self.store = store
        share, rest = divmod(faults, len(names))
        self._wanted = {name: share + (index < rest) for index, name in enumerate(names)}
        self.rows = {name: Row(name, store) for name in names}
        self.results: list[RoundResult] = []
        self._lock = threading.Lock()
        self._under_way = dict.fromkeys(names, 0)
        self._rounds = self._plan(names, seed)

    @property
    def counted(self) -> int:
        """How many faults took hold so far."""
        return sum(row.count for row in self.rows.values())

    def next(self) -> tuple[int, str] | None:
        """Return seed and kind of the next round; None: no more are needed."""
        with self._lock:
            return next(self._rounds, None)

    def stop(self) -> None:
        """Begin no more rounds."""
        with self._lock:
            self._rounds = iter(())

    def add(self, result: RoundResult) -> None:
        """Take what came of a round."""
        with self._lock:
            self._under_way[result.fault] -= 1
            self.rows[result.fault].add(result)
            self.results.append(result)

    def _plan(self, names: Sequence[str], seed: int) -> Iterator[tuple[int, str]]:
        for number in count(seed):
            left = [name for name in names if self._is_wanted(name)]
            if not left:
                return
            name = left[number % len(left)]
            self._under_way[name] += 1
            yield number, name

    def _is_wanted(self, name: str) -> bool:
        row, wanted = self.rows[name], self._wanted[name]
        return row.count + self._under_way[name] < wanted and row.missed < MOST_MISSES * wanted


def main() -> int:
    """Run the program; return the exit code."""
    options = _options()
    begun_s = time.monotonic()
    stores: list[StoreKind] = list(BOTH) if options.store == "both" else [options.store]
    namespaces = has_namespaces()
    tortures = []
    for index, store in enumerate(stores):
        names = []
        for name in options.kind or kinds(store):
            why = missing(FAULTS[name], has_namespaces=namespaces)
            if store not in FAULTS[name].stores:
                continue
            if why:
                console.print(f"left out on {store}: {name} ({why})")
            else:
                names.append(name)
        faults = options.faults // len(stores) + (index < options.faults % len(stores))
        if names and faults:
            tortures.append(Torture(store, names, faults, options.seed))
    for torture in tortures:
        _play(torture, options.jobs, namespaces, options.bug)
    rows = [row for torture in tortures for row in torture.rows.values()]
    results = [result for torture in tortures for result in torture.results]
    _show(rows)
    minutes = (time.monotonic() - begun_s) / 60
    violations = sum(row.violations for row in rows)
    counted = sum(row.count for row in rows)
    events = sum((Counter(result.events) for result in results), Counter[str]())
    said = ", ".join(f"{number:,} {kind}" for kind, number in events.most_common())
    console.print(
        f"{counted:,} faults in {len(results):,} rounds, {violations} violations, "
        f"{minutes:.0f} minutes\n"
        f"{sum(result.steps for result in results):,} steps of ranks; events in the logs: {said}"
    )
    options.report.mkdir(parents=True, exist_ok=True)
    (options.report / "torture.md").write_text(markdown(rows))
    document = {
        "rows": [asdict(row) for row in rows],
        "rounds": [asdict(result) for result in results],
        "minutes": minutes,
    }
    (options.report / "torture.json").write_text(json.dumps(document, indent=1))
    return 1 if violations or not counted else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.crash.torture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--faults", type=int, default=1000, help="faults that must take hold")
    parser.add_argument("--store", choices=[*BOTH, "both"], default="both")
    parser.add_argument("--kind", choices=list(FAULTS), action="append", help="may be repeated")
    parser.add_argument("--seed", type=int, default=1, help="of the first round of each store")
    parser.add_argument("--jobs", type=int, default=2, help="laboratories at a time")
    parser.add_argument("--bug", default="", help="plant a bug; see server_program.py")
    parser.add_argument("--report", type=Path, default=KEPT, help="folder for table and results")
    return parser.parse_args()


def _play(torture: Torture, jobs: int, namespaces: bool, bug: str) -> None:
    done: queue.SimpleQueue[RoundResult | BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            with Laboratory(torture.store, namespaces=namespaces, bug=bug) as laboratory:
                while (next_round := torture.next()) is not None:
                    result = laboratory.play(*next_round)
                    torture.add(result)
                    done.put(result)
        except BaseException as error:
            done.put(error)
        else:
            done.put(None)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    left = jobs
    while left:
        try:
            result = done.get()
        except KeyboardInterrupt:
            console.print("no more rounds; those under way come to their end")
            torture.stop()
            continue
        if isinstance(result, BaseException):
            raise result
        if result is None:
            left -= 1
        else:
            _say(torture, result)


def _say(torture: Torture, result: RoundResult) -> None:
    console.print(
        f"{torture.counted:5} {result.store:10} {result.fault:24} seed {result.seed:<6} "
        f"{result.seconds:5.1f} s  {result.steps:4} steps  stall {result.stall_s:4.1f} s"
        + ("" if result.hit else "  (did not take hold)")
    )
    for violation in result.violations[:SHOWN]:
        console.print(f"  violation: {violation.splitlines()[0]}", markup=False)
    if result.violations:
        left = len(result.violations) - SHOWN
        more = f"  {left} more stand in result.json there\n" if left > 0 else ""
        console.print(f"{more}  evidence: {result.folder}\n  again: {result.command}")


def _show(rows: Sequence[Row]) -> None:
    table = Table("fault", "store")
    for title in ("count", "recoveries", "longest stall", "violations"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)


def markdown(rows: Sequence[Row]) -> str:
    """Return the table as the docs have it."""
    lines = [
        "| fault | store | count | recoveries | longest stall | violations |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        *(f"| {' | '.join(_cells(row))} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    stall = f"{row.longest_stall_s:.1f} s"
    return [
        *(row.fault, row.store, str(row.count), str(row.recoveries), stall, str(row.violations))
    ]


if __name__ == "__main__":
    sys.exit(main())
