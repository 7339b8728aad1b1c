"""Stop the schedule and ask for a rollback when the loss is NaN or infinite several times running.

That such losses stay out of every window, are counted and shown does not need this policy.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from lrpilot.core._changes import Change, Direct, Hold
from lrpilot.core._fields import count, number, one_of
from lrpilot.core.policies._interface import Mode, Observation, PolicySpec, View
from lrpilot.core.policies._state import Stateful

_DELAYS_HELD = 10
"""Length of the hold, in delays, where the spec gives none."""


class NonfiniteSpec(PolicySpec):
    """Fields of the nonfinite policy."""

    kind: Annotated[Literal["nonfinite"], one_of("nonfinite")] = "nonfinite"
    mode: Annotated[Mode, one_of("act", "advise", "off")] = "advise"
    streak: Annotated[int, count(1)] = 3
    """Non-finite losses in a row that call for action."""
    hold: Annotated[int | None, count(1)] = None
    """Length of the hold in the run's unit; without it ten delays."""
    factor: Annotated[float, number(high=1.0, open_low=True, open_high=True)] = 0.5
    """What the LR is multiplied by after the rollback."""
    limit: Annotated[int, count(1)] = 3
    """Most rollbacks into the same region."""


@dataclass(frozen=True, slots=True)
class NonfiniteState:
    """The non-finite losses in a row, and the hold."""

    seen: int
    """How many there are in a row, skipped updates included."""
    began: int
    """Progress of the first of them; 0 where there is none."""
    held_until: int
    """Progress at which the last hold ends; nothing is proposed below it."""


class Nonfinite(Stateful[NonfiniteState]):
    """Holds LR and WD and asks for a rollback on `streak` non-finite losses in a row.

    More precisely, on a loss at n that acts at n + D:

    1. A finite loss: `seen = 0`. NaN or infinite: `seen += 1`; the first one sets `began = n`.
    2. If `seen >= streak` and `n >= held_until`: propose a hold from n + D over `hold`, and a
       rollback to before `began`; `held_until = n + D + hold`.

    So the hold ends by itself, and what has not ended with it is asked for once more, with the same
    `began`. A skipped update counts like any other: it is its loss that is read. One NaN, or
    two, change nothing. `hold` that is not given is `10 * D`, which is a length in every unit.

    Source: a single overflow passes, a NaN in the weights does not. Megatron-LM stops the run at
    the first one (`check_for_nan_in_loss_and_grad`). Going back to a checkpoint from before the
    damage, with a lower LR, is what OPT-175B did (arXiv 2205.01068, 2.5).

    >>> policy = Nonfinite(NonfiniteSpec(mode="act"), groups=1)
    >>> state = policy.initial()
    >>> class View:
    ...     at = 132
    >>> for n in (98, 99, 100):
    ...     state, proposed = policy.observe(state, Observation(n, math.nan), View())
    >>> hold, rollback = proposed
    >>> hold.length, rollback.before, rollback.until, state.held_until
    (320, 98, 100, 452)
    >>> hold.reason
    'loss nan at 100: 3 in a row are not finite, the first at 98 (streak 3); held until 452'
    """

    kind: ClassVar[str] = "nonfinite"
    reads_skipped: ClassVar[bool] = True
    state_type = NonfiniteState
    counts_bad: ClassVar[str] = "seen"

    def __init__(self, spec: NonfiniteSpec, groups: int) -> None:
        del groups
        self._spec = spec

    def initial(self) -> NonfiniteState:
        """Return the state before the first loss."""
        return NonfiniteState(seen=0, began=0, held_until=0)

    def observe(
        self, state: NonfiniteState, observation: Observation, view: View
    ) -> tuple[NonfiniteState, tuple[Change, ...]]:
        """Return the state after a final loss, and the hold and the rollback if they are due."""
        n, loss = observation.progress, observation.loss
        if loss is None:
            return state, ()
        if math.isfinite(loss):
            if state.seen == 0:
                return state, ()
            return NonfiniteState(0, 0, state.held_until), ()
        seen, began = state.seen + 1, state.began if state.seen else n
        if seen < self._spec.streak or n < state.held_until:
            return NonfiniteState(seen, began, state.held_until), ()
        return self._stop(n, loss, seen, began, view.at)

    def _stop(
        self, n: int, loss: float, seen: int, began: int, at: int
    ) -> tuple[NonfiniteState, tuple[Change, ...]]:
        spec = self._spec
        length = _DELAYS_HELD * (at - n) if spec.hold is None else spec.hold
        held_until = at + length
        why = (
            f"loss {loss} at {n}: {seen} in a row are not finite, the first at {began}"
            f" (streak {spec.streak})"
        )
        rollback = Direct(
            "rollback",
            f"{why}; back to before {began}",
            before=began,
            factor=spec.factor,
            limit=spec.limit,
            until=n,
        )
        hold = Hold(length, f"{why}; held until {held_until}")
        return NonfiniteState(seen, began, held_until), (hold, rollback)
