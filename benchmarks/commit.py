"""Durable rows per second: SQLite by hand beside the server's group commit.

Both write the same rows with `synchronous = FULL` into a new database in the same folder, in
turns. By hand, one thread writes N rows of N runs per commit through `sqlite3`: what the disk
and SQLite allow. The server's way, N coroutines append one row each to a run of their own and
wait until it is durable, as N busy runs would: asyncio, the writer's thread, the check of each
log's end and SQLAlchemy are included.

    python benchmarks/commit.py --rows 20000 --runs 1 100 1000 --repeat 5
"""

import argparse
import asyncio
import sqlite3
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from lrpilot.server._commit import GroupCommitter
from lrpilot.server._sql_store import open_store
from lrpilot.server._store import LogRow, Reason

DIGEST = "0" * 64


@dataclass(frozen=True, slots=True)
class Speed:
    """What one way of writing did."""

    rows_per_s: float
    commits_per_s: float


@dataclass(slots=True)
class CommitCounter:
    """Counts the commits of a committer."""

    commits: int = 0

    def commit_finished(
        self,
        seconds: float,  # noqa: ARG002
        appends: int,  # noqa: ARG002
        rows: int,  # noqa: ARG002
        failure: Reason | None,  # noqa: ARG002
    ) -> None:
        """Count one."""
        self.commits += 1


def by_hand(folder: Path, runs: int, rows: int, payload: bytes) -> Speed:
    """Write `rows` rows with sqlite3, one row of each run per commit."""
    connection = sqlite3.connect(folder / "hand.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(
        "CREATE TABLE events (run_id INTEGER, seq BIGINT, payload BLOB, digest TEXT,"
        " recorded_at_ns BIGINT, PRIMARY KEY (run_id, seq))"
    )
    commits = rows // runs
    started = time.perf_counter()
    for seq in range(1, commits + 1):
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(
            "INSERT INTO events VALUES (?, ?, ?, ?, ?)",
            [(run, seq, payload, DIGEST, seq) for run in range(runs)],
        )
        connection.execute("COMMIT")
    seconds = time.perf_counter() - started
    connection.close()
    return Speed(commits * runs / seconds, commits / seconds)


def by_committer(folder: Path, runs: int, rows: int, payload: bytes) -> Speed:
    """Write `rows` rows through the group commit, each run waiting for each of its own."""
    store = open_store(folder)
    counter = CommitCounter()

    async def write(committer: GroupCommitter, run: str) -> None:
        for seq in range(1, rows // runs + 1):
            row = LogRow(seq, payload, DIGEST, seq)
            await committer.append(run, [row], create=seq == 1)

    async def write_all() -> float:
        committer = GroupCommitter(store, counter)
        started = time.perf_counter()
        await asyncio.gather(*(write(committer, f"run-{number}") for number in range(runs)))
        seconds = time.perf_counter() - started
        await committer.close()
        return seconds

    seconds = asyncio.run(write_all())
    store.close()
    return Speed(rows // runs * runs / seconds, counter.commits / seconds)


def median(speeds: list[Speed]) -> Speed:
    """Return the median of each figure."""
    return Speed(
        statistics.median(speed.rows_per_s for speed in speeds),
        statistics.median(speed.commits_per_s for speed in speeds),
    )


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=5000, help="rows per measurement (%(default)s)")
    parser.add_argument(
        "--runs",
        type=int,
        nargs="+",
        default=[1, 100, 1000],
        help="runs that write at once; one line of the table each (1 100 1000)",
    )
    parser.add_argument("--repeat", type=int, default=3, help="measurements each (%(default)s)")
    parser.add_argument("--payload", type=int, default=200, help="bytes of a row (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where the databases go; they are removed")
    arguments = parser.parse_args()
    if min(arguments.runs) < 1 or arguments.rows < max(arguments.runs) or arguments.repeat < 1:
        parser.error("--runs and --repeat must be at least 1, --rows at least the most runs")

    out = sys.stdout.write
    out(
        f"SQLite {sqlite3.sqlite_version}, synchronous FULL; {arguments.rows} rows of "
        f"{arguments.payload} bytes, median of {arguments.repeat}\n\n"
        f"{'':>6}{'by hand':>20}{'group commit':>24}\n"
        f"{'runs':>6}{'rows/s':>10}{'commits/s':>10}{'rows/s':>12}{'commits/s':>12}{'ratio':>9}\n"
    )
    for runs in arguments.runs:
        hand: list[Speed] = []
        committer: list[Speed] = []
        for _ in range(arguments.repeat):
            for way, speeds in ((by_hand, hand), (by_committer, committer)):
                with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                    payload = bytes(arguments.payload)
                    speeds.append(way(Path(folder), runs, arguments.rows, payload))
        raw, ours = median(hand), median(committer)
        out(
            f"{runs:>6}{raw.rows_per_s:>10,.0f}{raw.commits_per_s:>10,.0f}"
            f"{ours.rows_per_s:>12,.0f}{ours.commits_per_s:>12,.0f}"
            f"{ours.rows_per_s / raw.rows_per_s:>8.2f}x\n"
        )


if __name__ == "__main__":
    main()
