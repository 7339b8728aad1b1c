"""Answer a loss spike that does not pass: note it, cut the LR, cut it more, ask to go back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from lrpilot.core._changes import Change, Curve, Direct, EndOwn, Note
from lrpilot.core._fields import count, number, one_of
from lrpilot.core.policies._interface import Misfit, Mode, Observation, PolicySpec, Quiet, View
from lrpilot.core.policies._state import Stateful
from lrpilot.core.policies._window import mean_of

_LET_IN = 3
"""The outlier in a row from which on the statistics take them in."""

_AVERAGED = 100
"""Losses in the mean by which a severe outlier is told (llm-foundry)."""

_SEVERE = 2.0
"""How many times that mean a severe outlier is at least (llm-foundry)."""

_LEAST_DEVIATION = 1e-6
"""Floor of the standard deviation (Levanter): on a constant loss, rounding is no spike."""

_NOTED, _CUT, _CUT_MORE = 1, 2, 3


class SpikeSpec(PolicySpec):
    """Fields of the spike policy."""

    kind: Annotated[Literal["spike"], one_of("spike")] = "spike"
    mode: Annotated[Mode, one_of("act", "advise", "off")] = "advise"
    window: Annotated[int, count(2)] = 128
    """Losses in the statistics."""
    sigma: Annotated[float, number(open_low=True)] = 6.0
    """Standard deviations above the mean at which an outlier begins."""
    least: Annotated[int, count(2)] = 64
    """Losses that the statistics need before anything is an outlier."""
    persistent: Annotated[int, count(1)] = 4
    """Outliers in a row that are borne; one more is a spike that persists."""
    recovery: Annotated[int, count(1)] = 200
    """Losses within which a spike should pass, and after each step of the ladder once more."""
    first_cut: Annotated[float, number(high=1.0, open_low=True, open_high=True)] = 0.9
    """What the LR is multiplied by at the second step of the ladder."""
    second_cut: Annotated[float, number(high=1.0, open_low=True, open_high=True)] = 2.0 / 3.0
    """What it is multiplied by at the third step, in place of the first cut, and by a rollback."""
    hold: Annotated[int | None, count(1)] = None
    """Progress over which a cut stays; without it as many losses as `recovery` take."""
    rewarm: Annotated[int | None, count(1)] = None
    """Progress over which the LR then comes back; without it as many losses as `recovery` take."""
    limit: Annotated[int, count(1)] = 3
    """Most rollbacks into the same region."""

    @property
    def quiet(self) -> frozenset[Quiet]:
        """Quiet while a new stage settles: other data, another loss. Its own cuts it must watch."""
        return frozenset({"stage change"})

    def misfits(self, group_names: Sequence[str]) -> tuple[Misfit, ...]:
        """Refuse a `least` that the window never holds."""
        del group_names
        if self.least > self.window:
            return (Misfit("least", self.least, f"at most the window, {self.window}"),)
        return ()


@dataclass(frozen=True, slots=True)
class SpikeState:
    """The statistics, the outliers in a row, and how far up the ladder it is."""

    losses: tuple[float, ...]
    """The losses of the statistics, oldest first; at most `window`, or 100 if that is more."""
    bar: float | None
    """What is above it is an outlier, while a run of outliers or the ladder lasts."""
    run: int
    """Outliers in a row."""
    began: int
    """Progress of the first of them."""
    rung: int
    """Steps of the ladder taken: 0 to 3."""
    damage: int
    """Progress of the first outlier of the run that led to the first step."""
    noted: int
    """Progress of the first step."""
    since: int
    """Losses since the last step."""
    back: int
    """Losses in a row that were no outliers, since the first step."""
    best: float
    best_at: int
    """The least loss that was no outlier, and its progress."""


class Spike(Stateful[SpikeState]):
    """Climbs a ladder while a spike persists; a spike that passes changes nothing.

    More precisely, with `m` and `s` the mean and the standard deviation (divisor: their number) of
    the last `window` losses that were let in:

    1. A loss is an outlier if it is above `m + sigma * max(s, 1e-6)` and at least `least` losses
       were let in. Outliers are not let in, save the third in a row and those after it. The
       bar stays where the first outlier of a run found it until the run, and the ladder, are over.
    2. A spike persists at more than `persistent` outliers in a row.
    3. The ladder: (i) a spike that persists, or one outlier that is at least twice the mean of the
       last 100 losses let in: a note. If the spike persists again or still `recovery` losses
       later: (ii) LR times `first_cut`; and `recovery` losses after that (iii) `second_cut` in its
       place; and after that (iv) the request to go back to before the first outlier, with the LR
       times `second_cut`. Each cut holds over `hold`, then comes back linearly over `rewarm`.
    4. After `recovery` losses in a row without an outlier the ladder begins anew. So whether the
       loss comes back within `recovery` losses decides between cutting and going back. On the
       ladder no outlier is let in. After (iv) the statistics begin anew.

    Non-finite losses are passed over: they end no run and enter nothing. Lengths are counted in
    losses, save `hold` and `rewarm`, which are in the run's unit: where they are not given, the
    distance of the outliers in a row that led to the cut, times `recovery`.

    Sources: window, sigma and least are those of OLMo-core's `SkipStepOptimizer`, Levanter's
    `SkipStepConfig` (with the divisor and the floor of s) and the detector of llm.c, which let all
    losses in; that outliers stay out is lrpilot's. Persistence and twice the mean of 100: the
    `KillLossSpike` of llm-foundry, which asks for both together. The cuts: OPT-175B's
    logbook (metaseq, update at 56 %: LR less 10 %, then to 2/3). `recovery`: the spikes of
    BLOOM-176B passed by themselves within 30 to 200 steps (its chronicles). Going back to before
    a spike: PaLM (arXiv 2204.02311, 5.1).

    >>> policy = Spike(SpikeSpec(mode="act", least=2, recovery=2), groups=1)
    >>> state, said = policy.initial(), []
    >>> class View:
    ...     at = 0
    >>> for n, loss in enumerate([2.0, 2.2, 2.1, *[4.0] * 20]):
    ...     state, proposed = policy.observe(state, Observation(n, loss), View())
    ...     said += [(n, change.action) for change in proposed]
    >>> said[:4]
    [(7, 'note'), (9, 'end own'), (9, 'curve'), (11, 'end own')]
    """

    kind: ClassVar[str] = "spike"
    state_type = SpikeState
    counts_bad: ClassVar[str] = "run"

    def __init__(self, spec: SpikeSpec, groups: int) -> None:
        del groups
        self._spec = spec
        self._kept = max(spec.window, _AVERAGED)

    def initial(self) -> SpikeState:
        """Return the state before the first loss."""
        return SpikeState((), None, 0, 0, 0, 0, 0, 0, 0, math.inf, 0)

    def observe(
        self, state: SpikeState, observation: Observation, view: View
    ) -> tuple[SpikeState, tuple[Change, ...]]:
        """Return the state after a final loss, and the next step of the ladder if it is due."""
        del view
        loss = observation.loss
        if loss is None or not math.isfinite(loss):
            return state, ()
        bar = self._bar(state.losses, loss) if state.bar is None else state.bar
        if loss > bar:
            return self._outlier(state, observation.progress, loss, bar)
        best, best_at = state.best, state.best_at
        if loss < best:
            best, best_at = loss, observation.progress
        losses = self._let_in(state.losses, loss)
        back = state.back + 1
        if state.rung == 0 or back >= self._spec.recovery:
            return SpikeState(losses, None, 0, 0, 0, 0, 0, 0, 0, best, best_at), ()
        return replace(
            state,
            losses=losses,
            run=0,
            since=state.since + 1,
            back=back,
            best=best,
            best_at=best_at,
        ), ()

    def _let_in(self, losses: tuple[float, ...], loss: float) -> tuple[float, ...]:
        return (*losses[-self._kept + 1 :], loss)

    def _bar(self, losses: tuple[float, ...], loss: float) -> float:
        """Return the bar for `loss`; infinite where it is no outlier without a look at the rest."""
        if len(losses) < self._spec.least:
            return math.inf
        losses = losses[-self._spec.window :]
        mean = mean_of(losses)
        if loss <= mean:
            return math.inf
        # In order, and not by sum(), whose last bit depends on the version of Python.
        squares = 0.0
        for x in losses:
            squares += (x - mean) * (x - mean)
        deviation = math.sqrt(squares / len(losses))
        return mean + self._spec.sigma * max(deviation, _LEAST_DEVIATION)

    def _outlier(
        self, state: SpikeState, n: int, loss: float, bar: float
    ) -> tuple[SpikeState, tuple[Change, ...]]:
        spec, run, losses = self._spec, state.run + 1, state.losses
        if state.rung == 0 and run >= _LET_IN:
            losses = self._let_in(losses, loss)
        began = n if run == 1 else state.began
        now = replace(
            state, losses=losses, bar=bar, run=run, began=began, since=state.since + 1, back=0
        )
        persists = run > spec.persistent
        if state.rung == 0:
            if not persists and not _is_severe(state.losses, loss):
                return now, ()
            noted = replace(now, rung=_NOTED, damage=began, noted=n, since=0)
            return noted, (Note(self._reason(noted, loss)),)
        if not persists or now.since < spec.recovery:
            return now, ()
        if state.rung == _NOTED:
            return replace(now, rung=_CUT, since=0), self._cut(now, n, loss, spec.first_cut)
        if state.rung == _CUT:
            return replace(now, rung=_CUT_MORE, since=0), self._cut(now, n, loss, spec.second_cut)
        back = Direct(
            "rollback",
            f"{self._reason(now, loss)}; not back {spec.recovery} losses after the last cut; best"
            f" loss {now.best:.6g} at {now.best_at}; back to before {now.damage}",
            before=now.damage,
            factor=spec.second_cut,
            limit=spec.limit,
            until=now.noted,
        )
        return replace(self.initial(), best=now.best, best_at=now.best_at), (back,)

    def _cut(self, state: SpikeState, n: int, loss: float, factor: float) -> tuple[Change, ...]:
        """Return the end of the cut before, and a cut that holds and then comes back."""
        spec = self._spec
        # As many losses as `recovery` take: by their mean distance in this run, of at least two.
        chosen = spec.recovery * (n - state.began) // (state.run - 1)
        hold = chosen if spec.hold is None else spec.hold
        end = hold + (chosen if spec.rewarm is None else spec.rewarm)
        reason = f"{self._reason(state, loss)}; LR * {factor:.6g} over {hold}, back to 1 at {end}"
        return EndOwn(reason), Curve(((0, factor), (hold, factor), (end, 1.0)), reason)

    def _reason(self, state: SpikeState, loss: float) -> str:
        outliers = "1 outlier" if state.run == 1 else f"{state.run} outliers in a row"
        return f"loss {loss:.6g} above {state.bar:.6g}: {outliers} since {state.began}"


def _is_severe(losses: tuple[float, ...], loss: float) -> bool:
    if len(losses) < _AVERAGED:
        return False
    mean = mean_of(losses[-_AVERAGED:])
    return mean > 0.0 and loss >= _SEVERE * mean
