"""What ends a stage before its latest progress: a watch on the loss, as policies are."""

import math
from dataclasses import dataclass
from typing import ClassVar

from lrpilot.core._changes import Change, NextStage
from lrpilot.core._spec import Condition
from lrpilot.core.policies import Observation, View
from lrpilot.core.policies._improvement import Improvement
from lrpilot.core.policies._state import Stateful
from lrpilot.core.policies._window import mean_of


@dataclass(frozen=True, slots=True)
class StageEndState:
    """What must be kept between losses."""

    best: float
    bad: int
    """Reports in a row without improvement."""
    recent: tuple[float, ...]
    """Losses in the report under way; of `below`, the last `window`."""


class StageEnd(Stateful[StageEndState]):
    """Proposes the next stage at the first report for which the condition holds.

    More precisely, with `a` the mean of `window` losses (their sum in order, divided):
    `plateau` reads each window once; `a` is better if `a < best * (1 - threshold)`, and the
    condition holds while more than `patience` reports in a row were not better. `below` reads the
    last `window` losses at every loss, and holds while `a <= value`. The stage ends at n + D, where
    that is `earliest` or later. Non-finite losses are left out.
    """

    kind: ClassVar[str] = "stage"
    state_type = StageEndState
    counts_bad: ClassVar[str] = "bad"

    def __init__(self, name: str, when: Condition, earliest: int | None) -> None:
        self._name = name
        self._when = when
        self._earliest = earliest or 0

    def initial(self) -> StageEndState:
        """Return the state at the beginning of the stage."""
        return StageEndState(math.inf, 0, ())

    def observe(
        self, state: StageEndState, observation: Observation, view: View
    ) -> tuple[StageEndState, tuple[Change, ...]]:
        """Return the state after an observation, and the next stage if it is due."""
        loss = observation.metric(self._when.metric)
        if loss is None or not math.isfinite(loss):
            return state, ()
        plateau, below = self._when.plateau, self._when.below
        recent = (*state.recent, loss)
        best, bad = state.best, state.bad
        reason = ""
        if plateau is not None:
            if len(recent) < plateau.window:
                return StageEndState(best, bad, recent), ()
            report, recent = mean_of(recent), ()
            improvement = Improvement("min", plateau.threshold, "rel")
            if improvement.is_better(report, best):
                best, bad = report, 0
            else:
                bad += 1
            if bad > plateau.patience:
                reason = (
                    f"{_what(plateau.window, self._when.metric)} {report:.6g}: none "
                    f"{improvement.bar(best)} for {bad} reports (patience {plateau.patience})"
                )
        elif below is not None:
            recent = recent[-below.window :]
            mean = mean_of(recent)
            if len(recent) == below.window and mean <= below.value:
                reason = (
                    f"{_what(below.window, self._when.metric)} {mean:.6g}: at most {below.value:g}"
                )
        state = StageEndState(best, bad, recent)
        if not reason or view.at < self._earliest:
            return state, ()
        return state, (NextStage(self._name, reason),)


def _what(window: int, metric: str) -> str:
    return metric if window == 1 else f"mean of {window} {metric} values"
