"""What Prometheus sees: the live runs as they are at the moment of a scrape, and the server itself.

Series of runs come from a collector that reads the runs: nothing is kept for a run that is
finished or deleted, so that its series end by themselves. No series has a label per rank.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lrpilot import core
from lrpilot.server._ledger import Ledger

SNAPSHOT_TIMEOUT_S = 5.0
"""Longest that a scrape waits for the event loop; Prometheus itself gives up after 10 s."""

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


@dataclass(frozen=True, slots=True)
class RunSample:
    """One live run at the moment of a scrape."""

    name: str
    groups: tuple[str, ...]
    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...] | None
    loss: float | None
    smoothed_loss: float | None
    progress: int
    total: int
    frontier: int
    horizon: int
    attempt: int
    losses: int
    nonfinite_losses: int
    late_losses: int
    skipped_updates: int
    rollbacks: int
    adjustments: dict[str, int]
    """Source to number."""
    advice: dict[str, int]
    """Number of adjustments by who decided, those that an attempt forgot among them."""
    waivers: int
    declared_steps: int
    ranks_waiting: int
    updated_s: float
    """When the last event was recorded, Unix seconds."""


class Metrics:
    """The registry of one server, and what the other parts tell it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
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

    def watch(self, ledger: Ledger) -> None:
        """Show the live runs of a ledger. Call on its event loop."""
        self.registry.register(RunCollector(ledger, asyncio.get_running_loop()))

    def call_finished(self, method: str, code: str, seconds: float) -> None:
        """Count one finished call."""
        self._calls.labels(method, code).inc()
        self._call_seconds.labels(method).observe(seconds)

    def commit_finished(self, seconds: float, appends: int, rows: int, ok: bool) -> None:
        """Count one commit."""
        del appends  # The rows say how much was written, the histogram how often.
        self._commit_seconds.observe(seconds)
        if ok:
            self._committed_rows.inc(rows)
        else:
            self._failed_commits.inc()


class RunCollector(Collector):
    """Reads the live runs at each scrape: on the event loop, which alone may look at them.

    What it read is rendered on the thread of the scrape, so that ten thousand series do not
    keep a rank waiting.
    """

    def __init__(self, ledger: Ledger, loop: asyncio.AbstractEventLoop) -> None:
        self._ledger = ledger
        self._loop = loop

    def describe(self) -> Iterator[Metric]:
        """Return the families without samples: registering must not ask the event loop."""
        yield from _families([])

    def collect(self) -> Iterator[Metric]:
        """Return every family of the live runs."""
        future = asyncio.run_coroutine_threadsafe(self._read(), self._loop)
        try:
            runs = future.result(SNAPSHOT_TIMEOUT_S)
        except FutureTimeoutError:
            future.cancel()
            raise
        yield from _families(runs)

    async def _read(self) -> list[RunSample]:
        samples = []
        for run in self._ledger.live():
            state = run.state
            rates, decays = state.values(state.progress)
            samples.append(
                RunSample(
                    name=state.name,
                    groups=state.spec.group_names,
                    learning_rates=rates,
                    weight_decays=decays,
                    loss=state.loss,
                    smoothed_loss=state.observers.smoothed_loss,
                    progress=state.progress,
                    total=state.spec.total,
                    frontier=state.frontier,
                    horizon=state.horizon,
                    attempt=state.attempt,
                    losses=state.losses,
                    nonfinite_losses=state.observers.nonfinite,
                    late_losses=len(state.late),
                    skipped_updates=state.observers.skipped,
                    rollbacks=len(state.plan.rollbacks),
                    adjustments=_by_source((*state.plan.adjustments, *state.forgotten), "act"),
                    advice=_by_source((*state.advice, *state.forgotten), "advise"),
                    waivers=state.waivers,
                    declared_steps=sum(item.steps for item in state.declared),
                    ranks_waiting=run.ranks_waiting,
                    updated_s=run.updated_ns / 1e9,
                )
            )
        return samples


def _by_source(adjustments: Iterable[core.Adjustment], mode: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item in adjustments:
        if item.mode == mode:
            counts[item.source] = counts.get(item.source, 0) + 1
    return counts


def _families(runs: list[RunSample]) -> Iterator[Metric]:
    rates = GaugeMetricFamily(
        "lrpilot_run_learning_rate",
        "LR at the run's progress, adjustments included.",
        labels=("run", "group"),
    )
    decays = GaugeMetricFamily(
        "lrpilot_run_weight_decay", "WD at the run's progress.", labels=("run", "group")
    )
    adjustments = CounterMetricFamily(
        "lrpilot_run_adjustments",
        "Adjustments by who decided them, those that a later attempt forgot included.",
        labels=("run", "source"),
    )
    advice = CounterMetricFamily(
        "lrpilot_run_advice",
        "Pieces of advice by who gave them, those that a later attempt forgot included.",
        labels=("run", "source"),
    )
    waivers = CounterMetricFamily(
        "lrpilot_run_waivers", "Waivers of the attempt: losses that never came.", labels=("run",)
    )
    declared = CounterMetricFamily(
        "lrpilot_run_declared_steps",
        "Steps of the attempt that the job in leader mode went on without the server.",
        labels=("run",),
    )
    for run in runs:
        for index, group in enumerate(run.groups):
            rates.add_metric((run.name, group), run.learning_rates[index])
            if run.weight_decays is not None:
                decays.add_metric((run.name, group), run.weight_decays[index])
        for source, count in run.adjustments.items():
            adjustments.add_metric((run.name, source), count)
        for source, count in run.advice.items():
            advice.add_metric((run.name, source), count)
        waivers.add_metric((run.name,), run.waivers)
        declared.add_metric((run.name,), run.declared_steps)
    yield from (rates, decays, adjustments, advice, waivers, declared)
    for name, text, value in _GAUGES:
        family = GaugeMetricFamily(f"lrpilot_run_{name}", text, labels=("run",))
        for run in runs:
            got = value(run)
            if got is not None:
                family.add_metric((run.name,), got)
        yield family


_GAUGES: tuple[tuple[str, str, Callable[[RunSample], float | None]], ...] = (
    ("loss", "The last loss reported; it may be NaN or infinite.", lambda run: run.loss),
    (
        "smoothed_loss",
        "Exponential average of the finite losses, newest weight 0.02, bias corrected.",
        lambda run: run.smoothed_loss,
    ),
    (
        "progress",
        "Greatest progress known to be in use, in the run's unit.",
        lambda run: run.progress,
    ),
    ("total", "Planned length, in the run's unit.", lambda run: run.total),
    ("frontier", "Least progress whose loss is not final.", lambda run: run.frontier),
    ("horizon", "First progress whose values are not fixed yet.", lambda run: run.horizon),
    ("attempt", "Number of the current attempt.", lambda run: run.attempt),
    ("losses", "Losses in the log, without those that an attempt forgot.", lambda run: run.losses),
    (
        "nonfinite_losses",
        "Those of the losses that are NaN or infinite.",
        lambda run: run.nonfinite_losses,
    ),
    (
        "late_losses",
        "Losses that came after their step was final without one.",
        lambda run: run.late_losses,
    ),
    (
        "skipped_updates",
        "Updates that the optimizer refused, without those that an attempt forgot.",
        lambda run: run.skipped_updates,
    ),
    ("rollbacks", "Attempts that were opened to undo damage.", lambda run: run.rollbacks),
    (
        "ranks_waiting",
        "Requests of blocked training threads that wait now.",
        lambda run: run.ranks_waiting,
    ),
    (
        "updated_timestamp_seconds",
        "When the run's last event was recorded, Unix seconds.",
        lambda run: run.updated_s,
    ),
)
