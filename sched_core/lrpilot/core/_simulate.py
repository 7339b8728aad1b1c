"""A run over recorded losses: what would have been done, when and why.

It is the fold of the log that such a run would have written, so that a server which gets the same
losses does the same.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lrpilot.core._events import Created, Opened, Report
from lrpilot.core._plan import Adjustment
from lrpilot.core._requests import report_losses
from lrpilot.core._spec import RunSpec
from lrpilot.core._state import RunState


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """One progress of a simulated run."""

    progress: int
    loss: float | None
    """The recorded loss; None: there is none, or it is the progress behind the last one."""
    learning_rates: tuple[float, ...]
    """LR used there, one per group."""
    weight_decays: tuple[float, ...] | None
    """WD used there, one per group; None: the run sets none."""
    base_learning_rates: tuple[float, ...]
    """LR there without adjustments."""
    stage: str
    """Name of the stage; empty for a run without stages."""
    decided: tuple[Adjustment, ...]
    """Adjustments and advice decided on what was reported there."""


def simulate(spec: RunSpec, reports: Iterable[Report]) -> Iterator[SimulatedStep]:
    """Yield each report's step in order, and one more for the progress after the last.

    Nobody follows the directives. Raises InvalidRequest, LossConflict and the like as a server
    does.
    """
    state = RunState(spec.name)
    state.apply(Created(spec.to_mapping(), False, False, "create"))
    incarnation = "simulation"
    state.apply(Opened(1, "0" * 32, 0, "open", "", 0, incarnation))
    progress = 0
    for report in reports:
        seq = state.seq
        step = _step(state, report.progress, report.loss)
        events, _ = report_losses(state, [report], rank=0, incarnation=incarnation)
        for event in events:
            state.apply(event)
        yield SimulatedStep(*step, tuple(state.decided_since(seq)))
        progress = report.moves_to
    yield SimulatedStep(*_step(state, progress, None), ())


def _step(
    state: RunState, progress: int, loss: float | None
) -> tuple[
    int,
    float | None,
    tuple[float, ...],
    tuple[float, ...] | None,
    tuple[float, ...],
    str,
]:
    rates, decays = state.plan.values(progress)
    base, stage = state.plan.base(progress), state.plan.stage(progress).name
    return progress, loss, rates, decays, base, stage
