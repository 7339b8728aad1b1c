"""What Prometheus sees of the runs: the live ones, as they are at the moment of a scrape.

Nothing is kept for a run that is finished or deleted, so that its series end by themselves. No
series has a label per rank.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Literal, NamedTuple

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from lrpilot import core
from lrpilot.server._ledger import Ledger
from lrpilot.server._live_run import LiveRun
from lrpilot.server._messages import pending_advice

PREFIX = "lrpilot_run"

MAX_RUNS = 1000
"""Most runs in one scrape, the newest. Which they are changes only when a run begins or ends."""

MAX_SERIES = 100_000
"""Once a scrape has so many series of runs, it takes no further run: one may have thousands of
parameter groups."""

READ_TIMEOUT_S = 5.0
"""Longest that a scrape waits for the event loop; Prometheus itself gives up after 10 s."""

SLICE_S = 0.005
"""Longest that reading the runs keeps the event loop, save for one run; then others have a turn."""


class Family(NamedTuple):
    """The series of one name."""

    kind: Literal["gauge", "counter", "info"]
    text: str
    labels: tuple[str, ...] = ()
    """Those besides `run`."""


class Reading(NamedTuple):
    """One series at the moment of a scrape."""

    family: str
    value: float
    labels: tuple[str, ...] = ()


FAMILIES: Mapping[str, Family] = {
    "": Family("info", "What does not change within an attempt.", ("unit", "mode", "feedback")),
    "stage": Family("info", "Stage and phase of the base schedule.", ("stage", "phase")),
    "learning_rate": Family("gauge", "LR at the progress, adjustments included.", ("group",)),
    "weight_decay": Family("gauge", "WD at the progress, adjustments included.", ("group",)),
    "learning_rate_multiplier": Family(
        "gauge", "LR at the progress over that of the base schedule.", ("group",)
    ),
    "horizon_learning_rate": Family(
        "gauge", "LR planned at the horizon: what comes next, unless a loss changes it.", ("group",)
    ),
    "loss": Family("gauge", "The last loss reported; it may be NaN or infinite."),
    "smoothed_loss": Family(
        "gauge", "Exponential average of the finite losses, newest weight 0.02, bias corrected."
    ),
    "gradient_norm": Family("gauge", "The last gradient norm reported."),
    "progress": Family("gauge", "Greatest progress known to be in use, in the run's unit."),
    "length": Family("gauge", "Planned length, in the run's unit."),
    "frontier": Family("gauge", "Least progress whose loss is not final."),
    "horizon": Family("gauge", "First progress whose values are not fixed yet."),
    "delay": Family("gauge", "The delay D, in the run's unit."),
    "slowest_rank_lag": Family(
        "gauge",
        "The farthest that a rank was behind the progress when it asked, within the last one to "
        "two minutes, in the run's unit.",
    ),
    "ranks_waiting": Family("gauge", "Calls of blocked training threads that wait now."),
    "blocked_seconds": Family(
        "gauge", "For how long a training thread was blocked since the horizon last moved."
    ),
    "attempt": Family("gauge", "Number of the current attempt."),
    "forgotten": Family(
        "gauge",
        "1 where the log has forgotten something of the current attempt, or a newer attempt since "
        "which nobody went on, else 0.",
    ),
    "held": Family("gauge", "1 while LR and WD are held, else 0."),
    "policy_bad_reports": Family(
        "gauge",
        "What speaks for a decision, in a row: reports without improvement, means that are too "
        "high, outliers, non-finite losses.",
        ("source",),
    ),
    "policy_cooldown_reports": Family(
        "gauge", "Reports that a policy will still pass over after a cut.", ("source",)
    ),
    "adjustments": Family(
        "counter",
        "Adjustments by who decided them, those that a later attempt forgot included.",
        ("source", "kind"),
    ),
    "advice": Family(
        "counter",
        "Pieces of advice by who gave them, those that a later attempt forgot included.",
        ("source", "kind"),
    ),
    "pending_advice": Family("gauge", "Advice that can be approved now."),
    "planned_adjustments": Family("gauge", "Adjustments that are decided and not in effect yet."),
    "losses": Family("gauge", "Losses in the log, without those that an attempt forgot."),
    "nonfinite_losses": Family("gauge", "Those of the losses that are NaN or infinite."),
    "late_losses": Family("gauge", "Losses that came after their step was final without one."),
    "skipped_updates": Family(
        "gauge", "Updates that the optimizer refused, without those that an attempt forgot."
    ),
    "rollbacks": Family("gauge", "Attempts that were opened to undo damage."),
    "waivers": Family("counter", "Waivers of the attempt: losses that did not come in time."),
    "declared_steps": Family(
        "counter", "Steps of the attempt that the job in leader mode went on without the server."
    ),
    "superseded_calls": Family(
        "counter", "Calls of an older attempt that this server refused: its processes live on."
    ),
    "last_report_timestamp_seconds": Family(
        "gauge", "When the last report was recorded, Unix seconds."
    ),
    "updated_timestamp_seconds": Family(
        "gauge", "When the run's last event was recorded, Unix seconds."
    ),
    "snapshot_timestamp_seconds": Family(
        "gauge", "When the last event in the run's newest snapshot was recorded, Unix seconds."
    ),
}
"""Every name after the prefix, in the order of a scrape."""


def full_name(name: str) -> str:
    """Return the name of a family as Prometheus has it, without what its type adds."""
    return f"{PREFIX}_{name}" if name else PREFIX


class RunCollector(Collector):
    """Reads the live runs at each scrape: on the event loop, which alone may look at them.

    It lets others have their turn in between, and what it read is rendered on the thread of the
    scrape: ten thousand series must not keep a rank waiting.
    """

    def __init__(self, ledger: Ledger, loop: asyncio.AbstractEventLoop) -> None:
        self._ledger = ledger
        self._loop = loop
        self._left_out = 0

    def describe(self) -> Iterator[Metric]:
        """Return the families without samples: registering must not ask the event loop."""
        yield from _families({})
        yield from self._counts(0)

    def collect(self) -> Iterator[Metric]:
        """Return every family of the live runs."""
        future = asyncio.run_coroutine_threadsafe(self._read(), self._loop)
        try:
            live, runs = future.result(READ_TIMEOUT_S)
        except FutureTimeoutError:
            future.cancel()
            raise
        self._left_out += live - len(runs)
        yield from _families(runs)
        yield from self._counts(live)

    def _counts(self, live: int) -> Iterator[Metric]:
        yield GaugeMetricFamily("lrpilot_live_runs", "Runs that are shown or left out.", live)
        yield CounterMetricFamily(
            "lrpilot_left_out_runs",
            "Live runs that a scrape left out, added up over scrapes: it shows the newest "
            f"{MAX_RUNS:,}, and begins none past {MAX_SERIES:,} series.",
            self._left_out,
        )

    async def _read(self) -> tuple[int, dict[str, list[Reading]]]:
        """Return the number of live runs, and what is shown of each."""
        live = self._ledger.live()
        newest = sorted(live, key=lambda run: run.created_ns, reverse=True)[:MAX_RUNS]
        readings: dict[str, list[Reading]] = {}
        series = 0
        began_s = time.monotonic()
        for run in newest:
            if series >= MAX_SERIES:
                break
            if time.monotonic() - began_s > SLICE_S:
                await asyncio.sleep(0)
                began_s = time.monotonic()
            # It may have ended meanwhile.
            if run.state.exists:
                readings[run.state.name] = list(_readings(run))
                series += len(readings[run.state.name])
        return len(live), readings


def _families(runs: Mapping[str, Sequence[Reading]]) -> Iterator[Metric]:
    families = {name: _family(name, family) for name, family in FAMILIES.items()}
    for run, readings in runs.items():
        for reading in readings:
            family = families[reading.family]
            labels = (run, *reading.labels)
            if isinstance(family, InfoMetricFamily):
                names = ("run", *FAMILIES[reading.family].labels)
                family.add_metric((), dict(zip(names, labels, strict=True)))
            else:
                family.add_metric(labels, reading.value)
    yield from families.values()


def _family(
    name: str, family: Family
) -> GaugeMetricFamily | CounterMetricFamily | InfoMetricFamily:
    if family.kind == "info":
        return InfoMetricFamily(full_name(name), family.text)
    labels = ("run", *family.labels)
    if family.kind == "counter":
        return CounterMetricFamily(full_name(name), family.text, labels=labels)
    return GaugeMetricFamily(full_name(name), family.text, labels=labels)


def _readings(run: LiveRun) -> Iterator[Reading]:
    """Yield the series of one run; what is not known has none."""
    state = run.state
    spec, plan, observers = state.spec, state.plan, state.observers
    progress = state.progress
    mode = "leader" if state.holder else "independent"
    yield Reading("", 1, (spec.unit, mode, "on" if spec.has_feedback else "off"))
    phase = plan.phase(progress)
    yield Reading("stage", 1, (phase.stage, phase.name))
    yield from _values(state)
    known = {
        "loss": state.loss,
        "smoothed_loss": observers.smoothed_loss,
        "gradient_norm": run.gradient_norm,
        "slowest_rank_lag": run.lag.greatest(time.monotonic()),
        "last_report_timestamp_seconds": run.reported_ns and run.reported_ns / 1e9,
        "snapshot_timestamp_seconds": run.snapshot_ns and run.snapshot_ns / 1e9,
    }
    yield from (Reading(name, value) for name, value in known.items() if value is not None)
    yield Reading("progress", progress)
    yield Reading("length", spec.total)
    yield Reading("frontier", state.frontier)
    yield Reading("horizon", state.horizon)
    yield Reading("delay", spec.delay)
    yield Reading("ranks_waiting", run.ranks_waiting)
    yield Reading("blocked_seconds", run.blocked_s())
    yield Reading("attempt", state.attempt)
    yield Reading("forgotten", state.alarm is not None)
    yield Reading("held", "hold" in plan.quiet(progress))
    yield from _decisions(state)
    yield Reading("losses", state.losses)
    yield Reading("nonfinite_losses", observers.nonfinite)
    yield Reading("late_losses", state.late_losses)
    yield Reading("skipped_updates", observers.skipped)
    yield Reading("rollbacks", len(plan.rollbacks))
    yield Reading("waivers", state.waivers)
    yield Reading("declared_steps", sum(item.steps for item in state.declared))
    yield Reading("superseded_calls", run.superseded_calls)
    yield Reading("updated_timestamp_seconds", run.updated_ns / 1e9)


def _values(state: core.RunState) -> Iterator[Reading]:
    rates, decays = state.values(state.progress)
    base = state.plan.base(state.progress)
    ahead, _ = state.values(state.horizon)
    for index, group in enumerate(state.spec.group_names):
        yield Reading("learning_rate", rates[index], (group,))
        yield Reading("horizon_learning_rate", ahead[index], (group,))
        if base[index]:
            yield Reading("learning_rate_multiplier", rates[index] / base[index], (group,))
        if decays is not None:
            yield Reading("weight_decay", decays[index], (group,))


def _decisions(state: core.RunState) -> Iterator[Reading]:
    """Yield what was decided by whom, and how near the next decision is."""
    # Whoever may decide is there with a zero: Prometheus sees no increase in a series that begins.
    adjustments = Counter({("operator", "operator"): 0})
    advice: Counter[tuple[str, str]] = Counter()
    for item in state.observers.standings(state.plan, state.progress):
        if item.mode != "off":
            (adjustments if item.mode == "act" else advice)[item.source, item.kind] = 0
        if item.bad is not None:
            yield Reading("policy_bad_reports", item.bad, (item.source,))
        if item.cooldown is not None:
            yield Reading("policy_cooldown_reports", item.cooldown, (item.source,))
    for decided in (*state.plan.adjustments, *state.advice, *state.forgotten):
        if decided.mode == "act":
            adjustments[decided.source, decided.kind] += 1
        elif decided.mode == "advise":
            advice[decided.source, decided.kind] += 1
    yield from (Reading("adjustments", count, labels) for labels, count in adjustments.items())
    yield from (Reading("advice", count, labels) for labels, count in advice.items())
    yield Reading("pending_advice", pending_advice(state))
    planned = sum(item.effective > state.progress for item in state.plan.adjustments)
    yield Reading("planned_adjustments", planned)
