"""Raise WD, then end sooner, when the validation loss rises while the training loss falls."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from lrpilot.core._changes import BeginDecay, Change, ScaleWeightDecay
from lrpilot.core._fields import METRIC, count, number, one_of
from lrpilot.core.policies._anneal import ENOUGH, anneal_length
from lrpilot.core.policies._improvement import counted, report_text
from lrpilot.core.policies._interface import Misfit, Observation, PolicySpec, Quiet, View
from lrpilot.core.policies._state import Stateful
from lrpilot.core.policies._window import into_window


class OverfitSpec(PolicySpec):
    """Fields of the policy against overfitting."""

    kind: Annotated[Literal["overfit"], one_of("overfit")] = "overfit"
    metric: Annotated[str, METRIC] = "val_loss"
    """Name of the validation loss that is read beside the loss."""
    patience: Annotated[int, count(1)] = 3
    """Evaluations in a row above the best that make a rise; a rise may also be longer."""
    threshold: Annotated[float, number()] = 0.01
    """Share of the best by which an evaluation must lie above it to count."""
    window: Annotated[int, count(1)] = 100
    """Training losses in a mean."""
    factor: Annotated[float, number(low=1.0, high=10.0, open_low=True)] = 1.5
    """What the WD is multiplied by in each step."""
    max_weight_decay: Annotated[float, number()] = 0.4
    """No step raises a WD above this."""

    @property
    def quiet(self) -> frozenset[Quiet]:
        """A held or dipped LR moves both losses, and a new stage has others."""
        return frozenset({"hold", "dip", "stage change"})

    def misfits(self, group_names: Sequence[str]) -> tuple[Misfit, ...]:
        """Refuse the training loss: it cannot rise while it falls."""
        del group_names
        if self.metric != "loss":
            return ()
        return (Misfit("metric", "loss", "the name of a validation loss"),)


@dataclass(frozen=True, slots=True)
class OverfitState:
    """What must be kept between losses; everything else follows from the spec."""

    best: float
    """Least validation loss so far."""
    above: int
    """Evaluations in a row above it."""
    mean: float | None
    """Mean of the last full window of training losses."""
    reference: float | None
    """What `mean` was at the best evaluation, or at the last proposal where that is later."""
    total: float
    """Sum of the losses in the window under way, added in order."""
    seen: int
    """Number of losses in the window under way."""
    decayed: bool
    """Whether the decay of this stage was brought forward; nothing more is observed then."""


class Overfit(Stateful[OverfitState]):
    """Raises the WD in steps, then brings the decay forward, when a run overfits.

    More precisely, non-finite losses count nowhere. Each `window` training losses, without overlap,
    give a mean: their sum in order, divided by `window`. On a validation loss `v`, after the
    training loss of the same step, with state `best`, `above`, `mean`, `reference`:

    1. If `v < best`: `best = v`, `above = 0`, `reference = mean`. Else if `v` lies more than
       `threshold * abs(best)` above it: `above += 1`. Else `above = 0`.
    2. If `above >= patience` and `mean < reference`, the run overfits: propose, and then `above =
       0`, `reference = mean`. While there was no mean at the best, the first one after it counts.

    What is proposed: every group's WD `x` becomes `min(x * factor, max_weight_decay)`, and one that
    is above the bound stays. If that raises none, or the run sets no WD, the decay is brought
    forward, once in a stage, and nothing more is observed in it: the LR is annealed to `min` in the
    shape `1 - sqrt`, over 10% of what was run so far, or what is left of the stage if that is less.

    The rule is that of Prechelt 1998 ("Early stopping - but when?", Neural Networks 11): a
    generalisation loss above 1% (GL) in three evaluations in a row (UP), while the training goes
    on. A higher WD is what runs over repeated data want: Kim et al. 2025 (arXiv:2509.14786) find 30
    times the usual 0.1 to be best; the bound here is 4 times it. The anneal is that of
    decay-on-plateau.

    >>> policy = Overfit(OverfitSpec(patience=2, window=1), groups=1)
    >>> state = policy.initial()
    >>> class AtOne:
    ...     at, weight_decay = 1, (0.1, 0.0)
    >>> for n, (loss, value) in enumerate([(3.0, 3.0), (2.0, 3.2), (1.0, 3.3)]):
    ...     seen = Observation(n, loss, {"val_loss": value})
    ...     state, proposed = policy.observe(state, seen, AtOne())
    >>> proposed[0].factor, proposed[0].max_weight_decay
    (1.5, 0.4)
    """

    kind: ClassVar[str] = "overfit"
    state_type = OverfitState
    counts_bad: ClassVar[str] = "above"

    def __init__(self, spec: OverfitSpec, groups: int) -> None:
        del groups  # The view holds their WDs.
        self._spec = spec

    def initial(self) -> OverfitState:
        """Return the state before the first loss: anything is better than its best."""
        return OverfitState(
            best=math.inf, above=0, mean=None, reference=None, total=0.0, seen=0, decayed=False
        )

    def observe(
        self, state: OverfitState, observation: Observation, view: View
    ) -> tuple[OverfitState, tuple[Change, ...]]:
        """Return the state after what became final, and the step or the decay if one is due."""
        if state.decayed:
            return state, ()
        loss = observation.loss
        if loss is not None and math.isfinite(loss):
            state = self._trained(state, loss)
        value = observation.metric(self._spec.metric)
        if value is None or not math.isfinite(value):
            return state, ()
        return self._evaluated(state, value, observation.progress, view)

    def _trained(self, state: OverfitState, loss: float) -> OverfitState:
        total, seen, mean = into_window(state.total, state.seen, loss, self._spec.window)
        state = replace(state, total=total, seen=seen)
        if mean is None:
            return state
        reference = mean if state.reference is None else state.reference
        return replace(state, mean=mean, reference=reference)

    def _evaluated(
        self, state: OverfitState, value: float, n: int, view: View
    ) -> tuple[OverfitState, tuple[Change, ...]]:
        spec, best, mean, reference = self._spec, state.best, state.mean, state.reference
        if value < best:
            return replace(state, best=value, above=0, reference=mean), ()
        state = replace(state, above=state.above + 1 if value > self._bar(best) else 0)
        if state.above < spec.patience or mean is None or reference is None or not mean < reference:
            return state, ()
        what = report_text("loss", spec.window)
        reason = (
            f"{spec.metric} {value:.6g}: more than {spec.threshold:g} above {best:.6g} on "
            f"{counted(state.above, 'evaluation')} in a row (patience {spec.patience}), while the "
            f"{what} fell from {reference:.6g} to {mean:.6g}"
        )
        state = replace(state, above=0, reference=mean)
        rates, bound = view.weight_decay, spec.max_weight_decay
        if rates is not None and any(min(x * spec.factor, bound) > x for x in rates):
            return state, (ScaleWeightDecay(spec.factor, reason, max_weight_decay=bound),)
        left = view.phase.end - view.at
        if left < 1:
            return state, ()
        decay = BeginDecay(anneal_length(ENOUGH, n, left), "minus_sqrt", reason)
        return replace(state, decayed=True), (decay,)

    def _bar(self, best: float) -> float:
        return best + self._spec.threshold * abs(best)
