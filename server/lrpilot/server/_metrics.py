"""What Prometheus sees of the server itself; what it sees of the runs is in `_run_metrics`."""

import asyncio
import importlib.metadata
import math
import platform
import shutil
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from lrpilot.server._commit import GroupCommitter
from lrpilot.server._ledger import Ledger
from lrpilot.server._run_metrics import RunCollector
from lrpilot.server._store import REASONS, Reason

_SECONDS = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
)
"""Bounds of the histograms, in seconds; long polls last up to 30."""


class Metrics:
    """The registry of one server, and what the other parts tell it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        build = Info("lrpilot_build", "Versions that the server runs on.", registry=self.registry)
        build.info(
            {
                "version": importlib.metadata.version("lrpilot"),
                "python": platform.python_version(),
                "grpc": importlib.metadata.version("grpcio"),
            }
        )
        self._calls = Counter(
            "lrpilot_rpc_calls",
            "Finished calls by method and gRPC status code.",
            ("method", "code"),
            registry=self.registry,
        )
        self._call_seconds = Histogram(
            "lrpilot_rpc_duration_seconds",
            "Time from the request to the answer; GetValues and SaveState may wait in it.",
            ("method",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._commit_seconds = Histogram(
            "lrpilot_commit_duration_seconds",
            "Time of one commit to stable storage.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._committed_rows = Counter(
            "lrpilot_committed_events", "Events that were committed.", registry=self.registry
        )
        self._failed_commits = Counter(
            "lrpilot_failed_commits", "Commits that the store failed.", registry=self.registry
        )
        self._expired_runs = Counter(
            "lrpilot_expired_runs",
            "Finished runs that were deleted for their age.",
            registry=self.registry,
        )
        self._writable = Gauge(
            "lrpilot_store_writable",
            "1 while writes to the store succeed, 0 from one that failed to one that succeeds.",
            registry=self.registry,
        )
        self._writable.set(1)
        self._failures = Counter(
            "lrpilot_store_failures",
            "Commits, probes and checks that the store failed, by reason.",
            ("reason",),
            registry=self.registry,
        )
        for reason in REASONS:
            self._failures.labels(reason)
        self._free_bytes = Gauge(
            "lrpilot_store_free_bytes",
            "Bytes left on the disk of the data folder; absent where the store has none.",
            ("folder",),
            registry=self.registry,
        )

        self._compacted_rows = Counter(
            "lrpilot_compacted_events",
            "Events whose rows this server packed.",
            registry=self.registry,
        )
        self._snapshot_failures = Counter(
            "lrpilot_snapshot_failures",
            "Snapshots of runs that could not be written, or rows that could not be packed.",
            registry=self.registry,
        )
        self._queue_depth = Gauge(
            "lrpilot_commit_queue_depth",
            "Appends and deletes that wait for the next commit.",
            registry=self.registry,
        )

        self._store_bytes = Gauge(
            "lrpilot_store_size_bytes",
            "What the store takes on disk, with what is free there for more events.",
            registry=self.registry,
        )

    def watch(self, ledger: Ledger, committer: GroupCommitter) -> None:
        """Show the live runs of a ledger, and what waits to be written. Call on its event loop."""
        self._queue_depth.set_function(lambda: committer.waiting)
        self.registry.register(RunCollector(ledger, asyncio.get_running_loop()))

    def watch_folder(self, folder: Path) -> None:
        """Show how much room there is for a store."""
        self._free_bytes.labels(str(folder)).set_function(lambda: _free_bytes(folder))

    def store_writable(self, is_writable: bool) -> None:
        """Show whether writes to the store succeed."""
        self._writable.set(is_writable)

    def store_failed(self, reason: Reason) -> None:
        """Count one failure of the store."""
        self._failures.labels(reason).inc()

    def run_expired(self) -> None:
        """Count one finished run that was deleted for its age."""
        self._expired_runs.inc()

    def rows_compacted(self, rows: int) -> None:
        """Count rows that were packed."""
        self._compacted_rows.inc(rows)

    def snapshot_failed(self) -> None:
        """Count a snapshot that could not be written, or rows that could not be packed."""
        self._snapshot_failures.inc()

    def call_finished(self, method: str, code: str, seconds: float) -> None:
        """Count one finished call."""
        self._calls.labels(method, code).inc()
        self._call_seconds.labels(method).observe(seconds)

    def store_measured(self, size: int) -> None:
        """Take the size of the store, in bytes."""
        self._store_bytes.set(size)

    def commit_finished(
        self, seconds: float, appends: int, rows: int, failure: Reason | None
    ) -> None:
        """Count one commit."""
        del appends  # The rows say how much was written, the histogram how often.
        self._commit_seconds.observe(seconds)
        if failure is None:
            self._committed_rows.inc(rows)
        else:
            self._failed_commits.inc()
            self.store_failed(failure)


def _free_bytes(folder: Path) -> float:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return math.nan
