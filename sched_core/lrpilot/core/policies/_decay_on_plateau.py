"""Begin the anneal once the stable phase has stopped paying: `wsd` driven by the loss."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, get_args

from lrpilot.core._changes import AnnealStyle, BeginDecay, Change
from lrpilot.core._fields import count, number, one_of
from lrpilot.core.policies._anneal import ANNEAL, ENOUGH, anneal_length
from lrpilot.core.policies._improvement import Improvement, counted, report_text
from lrpilot.core.policies._interface import Observation, PolicySpec, Quiet, View
from lrpilot.core.policies._state import Stateful
from lrpilot.core.policies._window import into_window


class DecayOnPlateauSpec(PolicySpec):
    """Fields of the policy that begins the anneal."""

    kind: Annotated[Literal["decay-on-plateau"], one_of("decay-on-plateau")] = "decay-on-plateau"
    window: Annotated[int, count(1)] = 200
    """Losses in a report, which is their mean."""
    patience: Annotated[int, count()] = 10
    """Reports without improvement that are borne; the next one begins the anneal."""
    threshold: Annotated[float, number()] = 1e-4
    """Share of the best by which a better report lies below it."""
    anneal: Annotated[int | float | str, ANNEAL] = ENOUGH
    """Length of the anneal, in the unit, or as a share of what was run so far."""
    anneal_style: Annotated[AnnealStyle, one_of(*get_args(AnnealStyle))] = "minus_sqrt"
    """Its shape."""

    @property
    def quiet(self) -> frozenset[Quiet]:
        """A held or dipped LR says nothing of the stable one, and a new stage has another loss."""
        return frozenset({"hold", "dip", "stage change"})


@dataclass(frozen=True, slots=True)
class DecayOnPlateauState:
    """What must be kept between losses; everything else follows from the spec."""

    best: float
    bad: int
    """Reports without improvement since the last better one."""
    total: float
    """Sum of the losses in the report under way, added in order."""
    seen: int
    """Number of losses in the report under way."""
    begun: bool
    """Whether the anneal of this stage was proposed; nothing more is observed then."""


class DecayOnPlateau(Stateful[DecayOnPlateauState]):
    """Begins the anneal of a stage, once, when `patience` reports in a row brought nothing.

    More precisely, a loss at n counts if it is finite and the base LR is in its stable phase there,
    between warmup and anneal of `wsd` or after the warmup of a constant LR. A report `a` is the
    mean of `window` such losses: their sum in order, divided by `window`. With state `best`, `bad`:

    1. If `a < best * (1 - threshold)`: `best = a`, `bad = 0`. Else `bad += 1`.
    2. If `bad > patience`, and the base does not come down by itself at `view.at` already: begin
       the anneal there, and observe nothing more in this stage.

    Every group's LR then goes down to its `min` in the shape of `anneal_style`, over `anneal`, or
    over that share of n, rounded: at least 1, and at most what is left of the stage. What was
    planned for later does not raise it again.

    The defaults: MiniCPM finds that a decay over 10% of the tokens is enough (Hu et al. 2024,
    arXiv:2404.06395); `1 - sqrt` is the best shape of Hägele et al. 2024 (arXiv:2405.18392);
    `patience` and `threshold` are those of torch's ReduceLROnPlateau, on means of 200, as a single
    loss is noisy.

    >>> from lrpilot.core.policies import Phase
    >>> policy = DecayOnPlateau(DecayOnPlateauSpec(window=1, patience=1), groups=1)
    >>> state = policy.initial()
    >>> class Stable:
    ...     at, phase = 2001, Phase("", 0, "stable", 0, 0.0, 9000.0, 10000)
    >>> for n in (1998, 1999, 2000):
    ...     state, proposed = policy.observe(state, Observation(n, 2.0), Stable())
    >>> proposed[0].length, proposed[0].style
    (200, 'minus_sqrt')
    >>> proposed[0].reason
    'loss 2: none below 2 * (1 - 0.0001) for 2 reports (patience 1); anneal over 10% of 2000'
    """

    kind: ClassVar[str] = "decay-on-plateau"
    state_type = DecayOnPlateauState
    counts_bad: ClassVar[str] = "bad"

    def __init__(self, spec: DecayOnPlateauSpec, groups: int) -> None:
        del groups  # All of them anneal together.
        self._spec = spec
        self._improvement = Improvement("min", spec.threshold, "rel")

    def initial(self) -> DecayOnPlateauState:
        """Return the state before the first loss: anything is better than its best."""
        return DecayOnPlateauState(
            best=self._improvement.worst, bad=0, total=0.0, seen=0, begun=False
        )

    def observe(
        self, state: DecayOnPlateauState, observation: Observation, view: View
    ) -> tuple[DecayOnPlateauState, tuple[Change, ...]]:
        """Return the state after a final loss, and the anneal if it is due."""
        spec, loss = self._spec, observation.loss
        if state.begun or loss is None or not math.isfinite(loss):
            return state, ()
        phase = view.phase
        if phase.name not in ("stable", "constant"):
            return state, ()
        total, seen, report = into_window(state.total, state.seen, loss, spec.window)
        state = replace(state, total=total, seen=seen)
        if report is None:
            return state, ()
        if self._improvement.is_better(report, state.best):
            return replace(state, best=report, bad=0), ()
        state = replace(state, bad=state.bad + 1)
        left = phase.end - view.at
        if state.bad <= spec.patience or view.at >= phase.decay_begin or left < 1:
            return state, ()
        n = observation.progress
        what, bar = report_text("loss", spec.window), self._improvement.bar(state.best)
        share = f"{spec.anneal} of {n}" if isinstance(spec.anneal, str) else f"{spec.anneal}"
        reason = (
            f"{what} {report:.6g}: none {bar} for {counted(state.bad, 'report')} "
            f"(patience {spec.patience}); anneal over {share}"
        )
        begin = BeginDecay(anneal_length(spec.anneal, n, left), spec.anneal_style, reason)
        return replace(state, begun=True), (begin,)
