"""Cut the LR when the loss has stopped improving, as torch's ReduceLROnPlateau does."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from lrpilot.core._changes import Change, Multiply
from lrpilot.core._fields import METRIC, count, flag, number, one_of
from lrpilot.core.policies._improvement import Improvement, counted, report_text
from lrpilot.core.policies._interface import Misfit, Observation, PolicySpec, Quiet, View
from lrpilot.core.policies._rates import RATES, Rates, misfits, spread
from lrpilot.core.policies._state import Stateful
from lrpilot.core.policies._window import into_window


class PlateauSpec(PolicySpec):
    """Fields of the plateau policy; they carry torch's names, save that its mode is `objective`."""

    kind: Annotated[Literal["plateau"], one_of("plateau")] = "plateau"
    objective: Annotated[Literal["min", "max"], one_of("min", "max")] = "min"
    """Whether less or more is better."""
    factor: Annotated[float, number(high=1.0, open_low=True, open_high=True)] = 0.5
    """What the LR is multiplied by."""
    patience: Annotated[int, count()] = 10
    """Reports without improvement that are borne; the next one cuts."""
    threshold: Annotated[float, number()] = 1e-4
    """What counts as an improvement: a share of the best (rel) or a difference (abs)."""
    threshold_mode: Annotated[Literal["rel", "abs"], one_of("rel", "abs")] = "rel"
    cooldown: Annotated[int, count()] = 0
    """Reports after a cut in which none counts as bad."""
    min_lr: Annotated[Rates, RATES] = 0.0
    """Floor of the LR: one for all groups, or one each."""
    eps: Annotated[float, number()] = 1e-8
    """A change of at most this is not made."""
    window: Annotated[int, count(1)] = 1
    """Losses in a report: 1 takes each as it is, k the mean of k."""
    metric: Annotated[str, METRIC] = "loss"
    """What is read: `loss`, or the validation loss of that name."""
    nonfinite: Annotated[Literal["skip", "count"], one_of("skip", "count")] = "skip"
    """`skip` does not observe NaN and infinities; `count` makes each a report, as torch does."""
    in_stable_phase: Annotated[bool, flag()] = False
    """Whether it also observes in the stable phase of `wsd`, whose LR is not to move."""

    @property
    def quiet(self) -> frozenset[Quiet]:
        """A held or dipped LR says nothing of its own, and a new stage has another loss."""
        quiet: frozenset[Quiet] = frozenset({"hold", "dip", "stage change"})
        return quiet if self.in_stable_phase else quiet | {"stable phase"}

    def misfits(self, group_names: Sequence[str]) -> tuple[Misfit, ...]:
        """Refuse a list of floors of another length than the groups."""
        return misfits("min_lr", self.min_lr, group_names)


@dataclass(frozen=True, slots=True)
class PlateauState:
    """What must be kept between losses; everything else follows from the spec."""

    best: float
    bad: int
    """Reports without improvement since the last better one, cut, or end of a cooldown."""
    cooldown: int
    """Reports left in the cooldown."""
    total: float
    """Sum of the losses in the report under way, added in order."""
    seen: int
    """Number of losses in the report under way."""


class Plateau(Stateful[PlateauState]):
    """Multiplies every group's LR by `factor` once `patience` reports in a row brought nothing.

    More precisely, on a report `a` with state `best`, `bad`, `cool`:

    1. `a` is better if `a < best * (1 - threshold)` (rel) or `a < best - threshold` (abs);
       for `objective: max` if `a > best * (threshold + 1)` or `a > best + threshold`. Better:
       `best = a`, `bad = 0`. Else `bad += 1`; NaN is never better.
    2. In a cooldown: `cool -= 1`, `bad = 0`.
    3. If `bad > patience`: propose the cut, `cool = cooldown`, `bad = 0`.

    A group's LR `x` becomes `max(x * factor, min_lr)` if that lowers it by more than `eps`. Where
    it would move no group at `view.at`, nothing is proposed, but the counters start afresh
    all the same.

    With `window: k` a report is the mean of k losses: their sum in order, divided by k. With
    `nonfinite: count` a non-finite loss is a report of its own and enters no mean.

    On a constant base with `window: 1` and `nonfinite: count` this is
    `torch.optim.lr_scheduler.ReduceLROnPlateau` of PyTorch 2.13 to the bit.

    >>> policy = Plateau(PlateauSpec(patience=1), groups=1)
    >>> state = policy.initial()
    >>> class AtOne:
    ...     at, base, adjusted = 1, (1e-3,), (1e-3,)
    >>> for n, loss in enumerate([2.0, 2.0, 2.0]):
    ...     state, proposed = policy.observe(state, Observation(n, loss), AtOne())
    >>> proposed[0].factor, proposed[0].reason
    (0.5, 'loss 2: none below 2 * (1 - 0.0001) for 2 reports (patience 1)')
    """

    kind: ClassVar[str] = "plateau"
    state_type = PlateauState
    counts_bad: ClassVar[str] = "bad"

    def __init__(self, spec: PlateauSpec, groups: int) -> None:
        self._spec = spec
        self._min_lr = spread(spec.min_lr, groups)
        self._improvement = Improvement(spec.objective, spec.threshold, spec.threshold_mode)

    def initial(self) -> PlateauState:
        """Return the state before the first loss: anything is better than its best."""
        return PlateauState(best=self._improvement.worst, bad=0, cooldown=0, total=0.0, seen=0)

    def observe(
        self, state: PlateauState, observation: Observation, view: View
    ) -> tuple[PlateauState, tuple[Change, ...]]:
        """Return the state after a final loss, and the cut if one is due."""
        spec, loss = self._spec, observation.metric(self._spec.metric)
        if loss is None:
            return state, ()
        total, seen = state.total, state.seen
        report: float | None = loss
        if math.isfinite(loss):
            total, seen, report = into_window(total, seen, loss, spec.window)
        elif spec.nonfinite == "skip":
            return state, ()
        if report is None:
            return replace(state, total=total, seen=seen), ()

        best, bad, cooldown = state.best, state.bad, state.cooldown
        if self._improvement.is_better(report, best):
            best, bad = report, 0
        else:
            bad += 1
        if cooldown > 0:
            cooldown, bad = cooldown - 1, 0
        proposed: tuple[Change, ...] = ()
        if bad > spec.patience:
            if self._moves(view.adjusted):
                reason = self._reason(report, best, bad)
                cut = Multiply(spec.factor, reason, min_lr=self._min_lr, eps=spec.eps)
                proposed = (cut,)
            cooldown, bad = spec.cooldown, 0
        return PlateauState(best, bad, cooldown, total, seen), proposed

    def _moves(self, rates: Sequence[float]) -> bool:
        return any(
            x - max(x * self._spec.factor, floor) > self._spec.eps
            for x, floor in zip(rates, self._min_lr, strict=True)
        )

    def _reason(self, report: float, best: float, bad: int) -> str:
        spec = self._spec
        what, bar = report_text(spec.metric, spec.window), self._improvement.bar(best)
        reports = counted(bad, "report")
        return f"{what} {report:.6g}: none {bar} for {reports} (patience {spec.patience})"
