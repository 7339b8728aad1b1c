"""Stretch the warmup when the loss swings or rises in it: the peak comes too fast."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from lrpilot.core._changes import Change, StretchWarmup
from lrpilot.core._fields import count, number, one_of
from lrpilot.core.policies._interface import Observation, PolicySpec, Quiet, View
from lrpilot.core.policies._means import Filling, Window, fill, reach, settle
from lrpilot.core.policies._state import Stateful

_ERRORS = 6.0
"""Standard errors of a mean below which a rise or a swing may be noise."""


class WarmupGuardSpec(PolicySpec):
    """Fields of the warmup-guard policy."""

    kind: Annotated[Literal["warmup-guard"], one_of("warmup-guard")] = "warmup-guard"
    window: Annotated[int, count(2)] = 16
    """Losses in a mean; all else is counted in such means."""
    rise: Annotated[float, number(open_low=True)] = 0.1
    """How far above the best a mean is too high: a share of the best, or of what was gained."""
    patience: Annotated[int, count(1)] = 3
    """Means in a row that must be too high."""
    swing: Annotated[float, number(open_low=True)] = 0.1
    """How far from one mean to the next is a swing: a share as with `rise`."""
    swings: Annotated[int, count(2)] = 4
    """Swings in a row, up and down in turn, that are an oscillation."""
    factor: Annotated[float, number(low=1.0, open_low=True)] = 2.0
    """How many times longer the rest of the warmup becomes."""
    limit: Annotated[int, count(1)] = 3
    """Most stretches in a warmup."""

    @property
    def quiet(self) -> frozenset[Quiet]:
        """Quiet while the LR is not the warmup's: a longer warmup would change nothing then."""
        return frozenset({"hold", "dip"})


@dataclass(frozen=True, slots=True)
class WarmupGuardState(Filling):
    """The best mean of this warmup, and what speaks against its slope."""

    first: float = math.inf
    """The first mean; infinite before it."""
    best: float = math.inf
    """The least level since the last stretch; before the first one, of all."""
    previous: float = 0.0
    """The last mean."""
    noise: float = 0.0
    """Running mean of the errors of the means that were not too high."""
    high: int = 0
    """Means in a row that were too high."""
    turns: int = 0
    """Swings in a row, up and down in turn."""
    is_up: bool = False
    """Whether the last swing went up."""
    stretched: int = 0
    """Stretches in this warmup."""


class WarmupGuard(Stateful[WarmupGuardState]):
    """Makes what is left of the warmup `factor` times longer when the loss swings or rises in it.

    More precisely, while the base schedule warms up, with `a` the mean of each `window` losses,
    `a0` the first one, `best` the least value that two of them in a row did not exceed,
    `scale = max(|best|, a0 - best)`, and `e` the running mean of their standard errors:

    1. Rising: `patience` means in a row above `best + max(rise * scale, 6 * e)`.
    2. Oscillating: `swings` steps in a row from one mean to the next that are each longer than
       `max(swing * scale, 6 * e)` and change their direction each time.
    3. On either, unless it was done `limit` times: propose the stretch. Both counts and the best
       begin anew from this mean, so that the next one needs a further rise.

    A standard error is estimated from the distances of neighbouring losses, so that noise alone is
    neither; those of means that are too high do not count.
    Where the warmup ends, all of it begins anew, for that of a later stage.

    Sources: warmup lets training reach regions where a higher LR is stable, and the loss rises
    and swings where the LR outruns that (arXiv 2110.04369; arXiv 2406.09405); a longer warmup
    is the remedy there. How the two are told here is lrpilot's.

    >>> policy = WarmupGuard(WarmupGuardSpec(window=2, patience=2), groups=1)
    >>> state, said = policy.initial(), []
    >>> from lrpilot.core.policies import Phase
    >>> class View:
    ...     phase = Phase("", 0, "warmup", 0, 100.0, 100.0, 100)
    >>> for n, loss in enumerate([8.0, 8.0, *[6.0] * 4, 7.0, 7.0, 8.0, 8.0]):
    ...     state, proposed = policy.observe(state, Observation(n, loss), View())
    >>> proposed[0].factor, proposed[0].reason
    (2.0, 'mean of 2 losses 8: 2 in a row above 6.6 (patience 2), best 6; stretch 1 of 3')
    """

    kind: ClassVar[str] = "warmup-guard"
    state_type = WarmupGuardState
    counts_bad: ClassVar[str] = "high"

    def __init__(self, spec: WarmupGuardSpec, groups: int) -> None:
        del groups
        self._spec = spec

    def initial(self) -> WarmupGuardState:
        """Return the state before the first loss of a warmup."""
        return WarmupGuardState()

    def observe(
        self, state: WarmupGuardState, observation: Observation, view: View
    ) -> tuple[WarmupGuardState, tuple[Change, ...]]:
        """Return the state after a final loss, and the stretch if it is due."""
        loss = observation.loss
        if loss is None or not math.isfinite(loss):
            return state, ()
        state, window = fill(state, loss, observation.progress, self._spec.window)
        if window is None:
            return state, ()
        if view.phase.name != "warmup":
            return self.initial(), ()
        if state.first == math.inf:
            mean = window.mean
            return replace(state, first=mean, best=mean, previous=mean, noise=window.error), ()
        return self._judge(state, window)

    def _judge(
        self, state: WarmupGuardState, window: Window
    ) -> tuple[WarmupGuardState, tuple[Change, ...]]:
        spec, mean = self._spec, window.mean
        best = min(state.best, max(mean, state.previous))
        scale, least = reach(best, state.first), _ERRORS * state.noise

        bar = best + max(spec.rise * scale, least)
        if mean > bar:
            high, noise = state.high + 1, state.noise
        else:
            high, noise = 0, settle(state.noise, window.error)

        step, length = mean - state.previous, max(spec.swing * scale, least)
        turns, is_up = 0, step > 0.0
        if abs(step) > length:
            turns = state.turns + 1 if state.turns and is_up is not state.is_up else 1

        now = replace(
            state, best=best, previous=mean, noise=noise, high=high, turns=turns, is_up=is_up
        )
        what = f"mean of {spec.window} losses {mean:.6g}"
        if high >= spec.patience:
            why = f"{what}: {high} in a row above {bar:.6g} (patience {spec.patience})"
        elif turns >= spec.swings:
            why = (
                f"{what}: {turns} swings in a row of more than {length:.6g} (swings {spec.swings})"
            )
        else:
            return now, ()
        if state.stretched >= spec.limit:
            return now, ()
        stretched = state.stretched + 1
        reason = f"{why}, best {best:.6g}; stretch {stretched} of {spec.limit}"
        now = replace(now, best=mean, high=0, turns=0, stretched=stretched)
        return now, (StretchWarmup(spec.factor, reason),)
