"""Cut, and ask to go back, when the loss has risen for good or never left where it started."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from lrpilot.core._changes import Change, Direct, Multiply
from lrpilot.core._fields import count, number, one_of
from lrpilot.core.policies._interface import Mode, Observation, PolicySpec, Quiet, View
from lrpilot.core.policies._means import Filling, Window, fill, reach, settle
from lrpilot.core.policies._state import Stateful

_ERRORS = 6.0
"""Standard errors of a mean below which a rise may be noise."""

_ONSET = 0.5
"""Share of the way from the best up to the bar at which a rise begins, and is over again."""


class DivergenceSpec(PolicySpec):
    """Fields of the divergence policy."""

    kind: Annotated[Literal["divergence"], one_of("divergence")] = "divergence"
    mode: Annotated[Mode, one_of("act", "advise", "off")] = "advise"
    window: Annotated[int, count(2)] = 16
    """Losses in a mean; all else is counted in such means."""
    rise: Annotated[float, number(open_low=True)] = 0.2
    """How far above the best a mean is too high: a share of the best, or of what was gained."""
    patience: Annotated[int, count(1)] = 3
    """Means in a row that must be too high."""
    recovery: Annotated[int, count(1)] = 4
    """Means within which a cut must bring the loss back."""
    factor: Annotated[float, number(high=1.0, open_low=True, open_high=True)] = 0.5
    """What the LR is multiplied by, by the cut and by the rollback."""
    limit: Annotated[int, count(1)] = 3
    """Most rollbacks into the same region."""
    stuck_after: Annotated[int, count()] = 1000
    """Losses after the warmup within which the loss must have moved; 0 does not ask for it."""
    stuck_gain: Annotated[float, number(high=1.0, open_low=True, open_high=True)] = 0.01
    """Share of the first mean that it must have lost by then."""

    @property
    def quiet(self) -> frozenset[Quiet]:
        """Quiet while a new stage settles: other data, another loss.

        Not under a hold or in a dip: a run can diverge at an LR that stands still.
        """
        return frozenset({"stage change"})


@dataclass(frozen=True, slots=True)
class DivergenceState(Filling):
    """The best mean, how long it was too high, and whether a cut is being tried."""

    first: float = math.inf
    """The first mean; infinite before it."""
    first_end: int = 0
    """Progress of the last loss in it."""
    best: float = math.inf
    best_at: int = 0
    """The least level, and the progress at which it was reached."""
    previous: float = math.inf
    """The mean before."""
    noise: float = 0.0
    """Running mean of the errors of the means that were not too high."""
    high: int = 0
    """Means in a row above the bar."""
    onset: int | None = None
    """Progress of the first loss of the rise that is not over; None where there is none."""
    tried: int | None = None
    """Means since the cut that is being tried; None where there is none."""
    settled: int = 0
    """Losses after the warmup, counted until `stuck_after`."""


class Divergence(Stateful[DivergenceState]):
    """Cuts the LR on a sustained rise, and asks for a rollback if that does not bring it back.

    More precisely, with `a` the mean of each `window` losses, `a0` the first one, `best` the least
    value that two of them in a row did not exceed, and `e` the running mean of their standard
    errors:

    1. The bar is `best + max(rise * max(|best|, a0 - best), 6 * e)`, so that losses near 0 and
       below it have one, and noise alone does not reach it. A rise begins with the first mean more
       than half way up to the bar, and is over with the first that is not.
    2. `patience` means above the bar in a row: propose the cut, LR times `factor`.
    3. Is the rise over within `recovery` means, the cut stays and that is all. Else propose to go
       back to before the first loss of the rise, with the LR times `factor`. Then `a0`
       and `best` begin anew.
    4. Stuck: `stuck_after` losses after the first stage's warmup, `best` is still not below
       `a0 - stuck_gain * |a0|`: propose the cut and a rollback to before the end of the first
       window. Once; later stages start from a trained model and are not asked.

    A standard error is estimated from the distances of neighbouring losses; those of means above
    the bar do not count. A corrupted batch moves one mean: up, which `patience` bears, or down,
    which `best` does not follow. A NaN is passed over. A loss that hovers around 0 all the time, as
    that of a policy gradient, has no scale but its noise to measure by.

    Sources: OPT-175B answered divergence with a lower LR and an earlier checkpoint (arXiv
    2205.01068, 2.5), PaLM with a checkpoint from before it (arXiv 2204.02311, 5.1). Cutting
    alone rarely helps once the damage is done: measured for lrpilot on small trainings, a perfect
    cut at 10 % of the run brought 4 of 9 back from 3 times the right LR, and 1 of 9 from 30 times.
    Hence the short trial.

    >>> policy = Divergence(DivergenceSpec(mode="act", window=2, patience=2, recovery=3), groups=1)
    >>> state, said = policy.initial(), []
    >>> from lrpilot.core.policies import Phase
    >>> class View:
    ...     at, phase = 0, Phase("", 0, "constant", 0, 0.0, 100.0, 100)
    >>> for n, loss in enumerate([10.0, 10.0, *[2.0] * 4, *[8.0] * 10]):
    ...     state, proposed = policy.observe(state, Observation(n, loss), View())
    ...     said += [(n, change.action) for change in proposed]
    >>> said
    [(9, 'multiply'), (15, 'directive')]
    """

    kind: ClassVar[str] = "divergence"
    state_type = DivergenceState
    counts_bad: ClassVar[str] = "high"

    def __init__(self, spec: DivergenceSpec, groups: int) -> None:
        del groups
        self._spec = spec

    def initial(self) -> DivergenceState:
        """Return the state before the first loss."""
        return DivergenceState()

    def observe(
        self, state: DivergenceState, observation: Observation, view: View
    ) -> tuple[DivergenceState, tuple[Change, ...]]:
        """Return the state after a final loss, and the cut or the rollback if one is due."""
        loss, n = observation.loss, observation.progress
        if loss is None or not math.isfinite(loss):
            return state, ()
        state, window = fill(state, loss, n, self._spec.window)
        if window is None:
            return state, ()
        level = max(window.mean, state.previous)
        if state.first == math.inf:
            level = window.mean
            state = replace(state, first=level, first_end=n, noise=window.error)
        if level < state.best:
            state = replace(state, best=level, best_at=n)
        state, proposed = self._rise(replace(state, previous=window.mean), window)
        state, stuck = self._stuck(state, view)
        return state, proposed or stuck

    def _rise(
        self, state: DivergenceState, window: Window
    ) -> tuple[DivergenceState, tuple[Change, ...]]:
        spec, best, mean = self._spec, state.best, window.mean
        margin = max(spec.rise * reach(best, state.first), _ERRORS * state.noise)
        if mean > best + margin:
            state = replace(state, high=state.high + 1)
        else:
            state = replace(state, high=0, noise=settle(state.noise, window.error))
        if not mean > best + _ONSET * margin:
            return replace(state, onset=None, tried=None), ()
        onset = window.began if state.onset is None else state.onset
        state = replace(state, onset=onset)
        why = (
            f"mean of {spec.window} losses {mean:.6g}, bar {best + margin:.6g}, best {best:.6g} at"
            f" {state.best_at}; rising since {onset}"
        )
        if state.tried is None:
            if state.high < spec.patience:
                return state, ()
            reason = f"{why}; above the bar {state.high} times in a row (patience {spec.patience})"
            return replace(state, tried=0), (Multiply(spec.factor, reason),)
        tried = state.tried + 1
        if tried < spec.recovery:
            return replace(state, tried=tried), ()
        reason = f"{why}; not back {tried} means after the cut; back to before {onset}"
        return replace(self.initial(), settled=state.settled), (self._back(reason, onset),)

    def _stuck(
        self, state: DivergenceState, view: View
    ) -> tuple[DivergenceState, tuple[Change, ...]]:
        spec = self._spec
        if state.settled >= spec.stuck_after:
            return state, ()
        phase = view.phase
        if phase.index > 0 or phase.name == "warmup":
            return state, ()
        state = replace(state, settled=state.settled + spec.window)
        bar = state.first - spec.stuck_gain * abs(state.first)
        if state.settled < spec.stuck_after or state.best < bar:
            return state, ()
        reason = (
            f"best mean of {spec.window} losses {state.best:.6g} at {state.best_at}: not below"
            f" {bar:.6g} within {state.settled} losses after the warmup, first {state.first:.6g}"
        )
        back = self._back(f"{reason}; back to before {state.first_end}", state.first_end)
        return state, (Multiply(spec.factor, reason), back)

    def _back(self, reason: str, before: int) -> Direct:
        spec = self._spec
        return Direct("rollback", reason, before=before, factor=spec.factor, limit=spec.limit)
