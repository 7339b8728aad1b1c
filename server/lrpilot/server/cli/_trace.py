"""What a replay of recorded losses leaves, in the form that tables and pictures need."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import track

from lrpilot.core import Adjustment, InvalidFields, Report, RunSpec, SimulatedStep
from lrpilot.core import simulate as replay
from lrpilot.server.cli._failures import invalid_fields
from lrpilot.server.cli._losses import LossRow, make_reports

LONG = 2_000
"""From so many losses on a progress bar is worth its lines."""


@dataclass
class Trace:
    """A replay, column by column."""

    progress: list[int] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    learning_rates: list[tuple[float, ...]] = field(default_factory=list)
    """LR used at each progress, one per chosen group."""
    base: list[tuple[float, ...]] = field(default_factory=list)
    """LR there without adjustments, likewise."""
    stages: list[str] = field(default_factory=list)
    decided: list[Adjustment] = field(default_factory=list)

    @classmethod
    def of(cls, steps: Iterable[SimulatedStep], groups: Sequence[int]) -> "Trace":
        """Return the trace of the steps for the groups of these indices."""
        trace = cls()
        for step in steps:
            trace.progress.append(step.progress)
            trace.losses.append(step.loss)
            trace.learning_rates.append(tuple(step.learning_rates[index] for index in groups))
            trace.base.append(tuple(step.base_learning_rates[index] for index in groups))
            trace.stages.append(step.stage)
            trace.decided.extend(step.decided)
        return trace

    @property
    def count(self) -> int:
        """How many losses there are."""
        return sum(loss is not None for loss in self.losses)

    @property
    def nonfinite(self) -> int:
        """How many losses are NaN or infinite."""
        return sum(loss is not None and not math.isfinite(loss) for loss in self.losses)


def simulated(
    spec: RunSpec, rows: Sequence[LossRow], *, show_progress: bool = False
) -> Iterator[SimulatedStep]:
    """Return what the run of `spec` makes of recorded losses, step by step.

    `show_progress`: with a bar on standard error, where that is a terminal and the rows are many.
    """
    reports: Iterable[Report] = make_reports(rows)
    if show_progress and len(rows) >= LONG:
        console = Console(stderr=True)
        reports = track(
            reports,
            "replaying",
            len(rows),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
    try:
        yield from replay(spec, reports)
    except InvalidFields as error:
        raise invalid_fields("the losses", error) from None
