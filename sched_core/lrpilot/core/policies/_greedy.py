"""Raise the LR while the loss improves and cut it when it does not, as GreedyLR does."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from lrpilot.core._changes import Change, Divide, EndOwn, Multiply
from lrpilot.core._fields import METRIC, count, flag, number, one_of
from lrpilot.core.policies._improvement import Improvement, counted, report_text
from lrpilot.core.policies._interface import Misfit, Observation, PolicySpec, Quiet, View
from lrpilot.core.policies._rates import RATES, Rates, misfits, spread
from lrpilot.core.policies._state import Stateful


class GreedySpec(PolicySpec):
    """Fields of the greedy policy; they carry Hugging Face's names.

    Its `mode` is `objective` here, and its `window_size` is `window`.
    """

    kind: Annotated[Literal["greedy"], one_of("greedy")] = "greedy"
    objective: Annotated[Literal["min", "max"], one_of("min", "max")] = "min"
    """Whether less or more is better."""
    factor: Annotated[float, number(high=1.0, open_low=True, open_high=True)] = 0.95
    """What the LR is multiplied by in a cut, and divided by in a raise."""
    patience: Annotated[int, count()] = 2
    """Reports in a row, good or bad, that are let pass; the next one moves the LR."""
    threshold: Annotated[float, number()] = 1e-4
    """What counts as an improvement: a share of the best (rel) or a difference (abs)."""
    threshold_mode: Annotated[Literal["rel", "abs"], one_of("rel", "abs")] = "rel"
    cooldown: Annotated[int, count()] = 0
    """Reports after a cut that are not looked at."""
    warmup: Annotated[int, count()] = 0
    """Reports after a raise that are not looked at."""
    smooth: Annotated[bool, flag()] = False
    """Whether a report is the mean of the last `window` losses instead of one loss."""
    window: Annotated[int, count(1)] = 50
    """Losses in the mean; each new one pushes the oldest out."""
    min_lr: Annotated[Rates, RATES] = 1e-5
    """Floor of a cut: one for all groups, or one each."""
    max_lr: Annotated[Rates | None, RATES] = None
    """Ceiling of a raise, likewise; never above a group's base peak, which is the default."""
    eps: Annotated[float, number()] = 1e-8
    """A change of at most this is not made."""
    reset_start: Annotated[int, count()] = 0
    """Cuts that find every group at `min_lr` after which all starts afresh; 0: never."""
    metric: Annotated[str, METRIC] = "loss"
    """What is read: `loss`, or the validation loss of that name."""
    nonfinite: Annotated[Literal["skip", "count"], one_of("skip", "count")] = "skip"
    """`skip` does not observe NaN and infinities; `count` makes each a report. With `smooth` the
    first one counted then spoils every later mean, as it does in Hugging Face's class."""

    @property
    def quiet(self) -> frozenset[Quiet]:
        """A held or dipped LR says nothing of its own, and a new stage has another loss."""
        return frozenset({"hold", "dip", "stage change"})

    def misfits(self, group_names: Sequence[str]) -> tuple[Misfit, ...]:
        """Refuse a list of floors or ceilings of another length than the groups."""
        return (
            *misfits("min_lr", self.min_lr, group_names),
            *misfits("max_lr", self.max_lr, group_names),
        )


@dataclass(frozen=True, slots=True)
class GreedyState:
    """What must be kept between losses; everything else follows from the spec."""

    best: float
    good: int
    """Better reports in a row."""
    bad: int
    """Reports in a row that were not better."""
    cooldown: int
    """Reports after a cut that are still passed over."""
    warmup: int
    """Reports after a raise that are still passed over."""
    until_reset: int
    """Cuts at `min_lr` left until all starts afresh; 0 where it never does."""
    values: tuple[float, ...]
    """With `smooth`: the last losses, the oldest first."""
    total: float
    """Their running sum: each new loss added, then the one pushed out subtracted."""


class Greedy(Stateful[GreedyState]):
    """Divides every group's LR by `factor` while reports improve; multiplies it when they do not.

    More precisely, on a report `a` with state `best`, `good`, `bad`, `cool`, `warm`, `left`:

    1. If `cool > 0`, else if `warm > 0`: that one falls by 1, `good = bad = 0`, and `a` is not
       looked at any further.
    2. `a` is better as in plateau: `a < best * (1 - threshold)` (rel) or `a < best - threshold`
       (abs), and for `objective: max` mirrored. Better: `best = a`, `good += 1`, `bad = 0`. Else
       `bad += 1`, `good = 0`; NaN is never better.
    3. If `good > patience`: raise, `warm = warmup`, `good = 0`, `left = reset_start`. A group's LR
       `x` becomes `min(x / factor, max_lr)` if that raises it by more than `eps`.
    4. Else if `bad > patience`: cut, and then `cool = cooldown`, `bad = 0`. `x` becomes
       `max(x * factor, min_lr)` if that lowers it by more than `eps`. If no group is above `min_lr`
       then, `left -= 1`; once that leaves 0, the policy ends all that it did before instead, and
       forgets `best`, the counters, and the losses in the mean.

    Where a raise, a cut or a fresh start would move no group at `view.at`, nothing is proposed, but
    the counters go on all the same.

    `max_lr` is the lower of the field and the base peak: at 1.0, the default of the class that this
    reproduces, a language model diverges. That class has no `reset_start: 0`.

    With `smooth` a report is the mean of the last `window` losses, as a running sum divided by
    their number. With `nonfinite: skip` a sum that overflowed is added up afresh, the oldest first.

    On a constant base and a clean series this is `GreedyLR` of Hugging Face Transformers 5.24 to
    the bit (https://arxiv.org/abs/2512.14527, "GreedyLR: A Novel Adaptive Learning Rate
    Scheduler"), with a base LR equal to its initial one. With `nonfinite: count` so it is on any
    series.

    >>> policy = Greedy(GreedySpec(factor=0.5, patience=1), groups=1)
    >>> state = policy.initial()
    >>> class AtOne:
    ...     at, base, adjusted, peak = 1, (1e-3,), (4e-4,), (1e-3,)
    >>> for n, loss in enumerate([3.0, 2.0, 2.0, 2.0]):
    ...     state, proposed = policy.observe(state, Observation(n, loss), AtOne())
    ...     for change in proposed:
    ...         print(n, change.action, change.reason)
    1 divide loss 2: better for 2 reports in a row (patience 1)
    3 multiply loss 2: none below 2 * (1 - 0.0001) for 2 reports (patience 1)
    """

    kind: ClassVar[str] = "greedy"
    state_type = GreedyState
    counts_bad: ClassVar[str] = "bad"

    def __init__(self, spec: GreedySpec, groups: int) -> None:
        self._spec = spec
        self._min_lr = spread(spec.min_lr, groups)
        self._max_lr = None if spec.max_lr is None else spread(spec.max_lr, groups)
        self._improvement = Improvement(spec.objective, spec.threshold, spec.threshold_mode)

    def initial(self) -> GreedyState:
        """Return the state before the first loss: anything is better than its best."""
        return GreedyState(
            best=self._improvement.worst,
            good=0,
            bad=0,
            cooldown=0,
            warmup=0,
            until_reset=self._spec.reset_start,
            values=(),
            total=0.0,
        )

    def observe(
        self, state: GreedyState, observation: Observation, view: View
    ) -> tuple[GreedyState, tuple[Change, ...]]:
        """Return the state after a final loss, and the raise, cut or fresh start that is due."""
        spec, loss = self._spec, observation.metric(self._spec.metric)
        if loss is None or (spec.nonfinite == "skip" and not math.isfinite(loss)):
            return state, ()
        report = loss
        if spec.smooth:
            state = self._smoothed(state, loss)
            report = state.total / len(state.values)

        if state.cooldown > 0:
            return replace(state, cooldown=state.cooldown - 1, good=0, bad=0), ()
        if state.warmup > 0:
            return replace(state, warmup=state.warmup - 1, good=0, bad=0), ()
        if self._improvement.is_better(report, state.best):
            state = replace(state, best=report, good=state.good + 1, bad=0)
        else:
            state = replace(state, bad=state.bad + 1, good=0)
        if state.good > spec.patience:
            proposed = self._raise(state, report, view)
            after = replace(state, good=0, warmup=spec.warmup, until_reset=spec.reset_start)
            return after, proposed
        if state.bad > spec.patience:
            after, proposed = self._cut(state, report, view)
            return replace(after, bad=0, cooldown=spec.cooldown), proposed
        return state, ()

    def _smoothed(self, state: GreedyState, loss: float) -> GreedyState:
        values, total = (*state.values, loss), state.total + loss
        if len(values) > self._spec.window:
            total -= values[0]
            values = values[1:]
        if self._spec.nonfinite == "skip" and not math.isfinite(total):
            total = 0.0
            for value in values:
                total += value
        return replace(state, values=values, total=total)

    def _raise(self, state: GreedyState, report: float, view: View) -> tuple[Change, ...]:
        spec = self._spec
        ceilings = view.peak
        if self._max_lr is not None:
            ceilings = tuple(map(min, self._max_lr, ceilings))
        if not any(
            min(x / spec.factor, ceiling) - x > spec.eps
            for x, ceiling in zip(view.adjusted, ceilings, strict=True)
        ):
            return ()
        what, reports = report_text(spec.metric, self._window), counted(state.good, "report")
        reason = f"{what} {report:.6g}: better for {reports} in a row (patience {spec.patience})"
        return (Divide(spec.factor, reason, max_lr=ceilings, eps=spec.eps),)

    def _cut(
        self, state: GreedyState, report: float, view: View
    ) -> tuple[GreedyState, tuple[Change, ...]]:
        spec, rates = self._spec, view.adjusted
        cut = tuple(max(x * spec.factor, low) for x, low in zip(rates, self._min_lr, strict=True))
        after = tuple(new if x - new > spec.eps else x for x, new in zip(rates, cut, strict=True))
        if spec.reset_start and not any(
            x > low for x, low in zip(after, self._min_lr, strict=True)
        ):
            left = state.until_reset - 1
            if left == 0:
                reason = (
                    f"every group at min_lr on {counted(spec.reset_start, 'cut')} "
                    f"(reset_start {spec.reset_start}): back to the base"
                )
                return self.initial(), (EndOwn(reason),) if rates != view.base else ()
            state = replace(state, until_reset=left)
        if after == rates:
            return state, ()
        what, bar = report_text(spec.metric, self._window), self._improvement.bar(state.best)
        reports = counted(state.bad, "report")
        reason = f"{what} {report:.6g}: none {bar} for {reports} (patience {spec.patience})"
        return state, (Multiply(spec.factor, reason, min_lr=self._min_lr, eps=spec.eps),)

    @property
    def _window(self) -> int:
        return self._spec.window if self._spec.smooth else 1
