"""Say when the loss falls less per decade of progress than a run of its kind should."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from lrpilot.core._changes import BeginDecay, Change, Multiply
from lrpilot.core._errors import InvalidState
from lrpilot.core._fields import count, number, one_of
from lrpilot.core.policies._interface import Mode, Observation, PolicySpec, Quiet, View
from lrpilot.core.policies._state import Stateful
from lrpilot.core.policies._window import mean_of

PARTS = 16
"""Parts of a decade of progress; the losses in one become one point of the fit."""
LEAST_POINTS = 3
"""A slope through fewer points says nothing of their scatter."""


class SlowConvergenceSpec(PolicySpec):
    """Fields of the policy that watches how fast the loss falls; it advises unless told to act."""

    kind: Annotated[Literal["slow-convergence"], one_of("slow-convergence")] = "slow-convergence"
    mode: Annotated[Mode, one_of("act", "advise", "off")] = "advise"
    least_gain: Annotated[float, number()] = 0.1
    """By how much the loss should fall per decade of progress, in the loss's own unit."""
    after: Annotated[int, count(1)] = 1000
    """Losses that must have been seen before the first judgement."""
    again: Annotated[int, count(1)] = 10_000
    """Losses seen between one proposal and the next."""
    factor: Annotated[float, number(low=1.0, high=2.0, open_low=True)] = 1.25
    """What the LR is multiplied by in the first half of the run; no group goes above its base peak
    times this."""

    @property
    def quiet(self) -> frozenset[Quiet]:
        """A held or dipped LR slows the run down by itself, and a new stage has another loss."""
        return frozenset({"hold", "dip", "stage change"})


@dataclass(frozen=True, slots=True)
class SlowConvergenceState:
    """What must be kept between losses; everything else follows from the spec."""

    first: int | None
    """The part of a decade in which the first loss lay."""
    parts: tuple[int, ...]
    """The full parts that the fit reads, in rising order."""
    means: tuple[float, ...]
    """Mean loss of each."""
    part: int
    """The part under way."""
    low: float
    """The least of its losses; infinite before the first."""
    high: float
    """The largest of its losses, likewise."""
    total: float
    """Sum of its other losses, in order of progress."""
    count: int
    """Number of its losses."""
    seen: int
    """Losses so far."""
    silent_until: int
    """Losses that must have been seen before the next proposal."""


class SlowConvergence(Stateful[SlowConvergenceState]):
    r"""Proposes a higher LR or a steeper decay where the loss falls too slowly for its progress.

    More precisely, a loss at n counts if it is finite, n is at least 1, and the warmup is over. It
    belongs to part `k = floor(16 * log10(n))` of the decades of progress. When the first loss past
    a part comes in, before it is added:

    1. The mean of the part's losses becomes the point `(k, mean)`: of more than two without the
       largest and the least one, so that one corrupted batch moves nothing; their sum divided by
       their number. A mean that is not finite is left out.
    2. The fit reads the second half of the decades seen: the points with `2 * k >= first + last`,
       from the part of the first loss to the one just closed. With at least 3 of them, of the
       averages `x` and `y`, `gain = 16 * sum((k - x) * (y - mean)) / sum((k - x) * (k - x))`, each
       sum in rising order of k.
    3. If `gain < least_gain`, and at least `after` losses were seen, and `again` since the last
       proposal: propose. Before half of the run (`2 * n < total`) every group's LR `x` becomes
       `min(x * factor, peak * factor)`: a higher peak. From half of the run on the LR is annealed
       in the shape `1 - sqrt` to `min` at the total: a steeper decay. What would move nothing, or
       lies past the end of the decay, is not proposed.

    The default of `least_gain` is a little less than the 0.115 per decade that the law of Hoffmann
    et al. 2022 (arXiv:2203.15556, appendix D.3: `L = 1.69 + 406.4 / N**0.34 + 410.7 / D**0.28`)
    still gives at D = 1e12 tokens, so that a shorter run of a language model that gains less is
    slow. For another loss give the gain of a run that went well. That a peak somewhat off costs
    little is in Wortsman et al. 2023 (arXiv:2309.14322); the shape `1 - sqrt` in Hägele et al. 2024
    (arXiv:2405.18392).

    >>> from lrpilot.core.policies import Phase
    >>> policy = SlowConvergence(SlowConvergenceSpec(after=50), groups=1)
    >>> state = policy.initial()
    >>> class View:
    ...     at, total, adjusted, peak = 101, 1000, (1e-3,), (1e-3,)
    ...     phase = Phase("", 0, "constant", 0, 0.0, 1000.0, 1000)
    >>> for n in range(58):
    ...     state, proposed = policy.observe(state, Observation(n, 3.0), View())
    >>> proposed[0].factor, proposed[0].max_lr
    (1.25, (0.00125,))
    >>> for part in proposed[0].reason.split("; "):
    ...     print(part.replace(" over", "\n  over"))
    loss falls by 0 per decade of progress
      over the last 14/16 of a decade before 57, less than 0.1 (56 losses)
    6% of the run: a higher peak
    """

    kind: ClassVar[str] = "slow-convergence"
    state_type = SlowConvergenceState

    def __init__(self, spec: SlowConvergenceSpec, groups: int) -> None:
        del groups  # They are raised and annealed together.
        self._spec = spec

    def initial(self) -> SlowConvergenceState:
        """Return the state before the first loss."""
        return SlowConvergenceState(
            first=None,
            parts=(),
            means=(),
            part=0,
            low=math.inf,
            high=-math.inf,
            total=0.0,
            count=0,
            seen=0,
            silent_until=0,
        )

    def decode(self, data: Mapping[str, Any]) -> SlowConvergenceState:
        """Return the state that `encode` wrote; raises InvalidState if it is none."""
        state = super().decode(data)
        if len(state.parts) != len(state.means) or (state.first is None) != (state.count == 0):
            raise InvalidState(f"not the state of a {self.kind} policy: {data!r}")
        return state

    def observe(
        self, state: SlowConvergenceState, observation: Observation, view: View
    ) -> tuple[SlowConvergenceState, tuple[Change, ...]]:
        """Return the state after a final loss, and what is proposed if the run is slow."""
        n, loss = observation.progress, observation.loss
        if loss is None or not math.isfinite(loss) or n < 1 or view.phase.name == "warmup":
            return state, ()
        # Only powers of ten lie on a border, and their logarithm is exact on every machine.
        part = math.floor(PARTS * math.log10(n))
        if state.first is None:
            state = replace(state, first=part, part=part)
        proposed: tuple[Change, ...] = ()
        if part > state.part:
            state = _closed(state)
            proposed = self._judged(state, n, view)
            silent = state.seen + self._spec.again if proposed else state.silent_until
            state = replace(
                state,
                part=part,
                low=math.inf,
                high=-math.inf,
                total=0.0,
                count=0,
                silent_until=silent,
            )
        return _added(state, loss), proposed

    def _judged(self, state: SlowConvergenceState, n: int, view: View) -> tuple[Change, ...]:
        spec = self._spec
        if state.seen < max(spec.after, state.silent_until) or len(state.parts) < LEAST_POINTS:
            return ()
        gain = _gain(state.parts, state.means)
        if not gain < spec.least_gain or view.phase.name == "ended" or view.at >= view.total:
            return ()
        width = state.parts[-1] - state.parts[0] + 1
        reason = (
            f"loss falls by {gain:.3g} per decade of progress over the last {width}/{PARTS} of a "
            f"decade before {n}, less than {spec.least_gain:g} ({state.seen} losses); "
            f"{100 * n / view.total:.0f}% of the run: "
        )
        if 2 * n >= view.total:
            return (BeginDecay(view.total - view.at, "minus_sqrt", f"{reason}a steeper decay"),)
        ceilings = tuple(peak * spec.factor for peak in view.peak)
        if not any(
            min(x * spec.factor, ceiling) > x
            for x, ceiling in zip(view.adjusted, ceilings, strict=True)
        ):
            return ()
        return (Multiply(spec.factor, f"{reason}a higher peak", max_lr=ceilings),)


def _added(state: SlowConvergenceState, loss: float) -> SlowConvergenceState:
    """Return the state with one more loss of the part under way."""
    low, high, total = state.low, state.high, state.total
    if state.count >= 2:
        # The one in the middle; the others may yet be overtaken.
        total += max(low, min(loss, high))
    return replace(
        state,
        low=min(low, loss),
        high=max(high, loss),
        total=total,
        count=state.count + 1,
        seen=state.seen + 1,
    )


def _mean(state: SlowConvergenceState) -> float:
    """Return the mean of the part under way."""
    if state.count > 2:
        return state.total / (state.count - 2)
    return state.low if state.count == 1 else (state.low + state.high) / 2


def _closed(state: SlowConvergenceState) -> SlowConvergenceState:
    """Return the state with the part under way as a point, without what the fit reads no more."""
    first, last, mean = state.first or 0, state.part, _mean(state)
    points = list(zip(state.parts, state.means, strict=True))
    if math.isfinite(mean):
        points.append((last, mean))
    points = [(part, value) for part, value in points if 2 * part >= first + last]
    return replace(
        state,
        parts=tuple(part for part, _ in points),
        means=tuple(value for _, value in points),
    )


def _gain(parts: tuple[int, ...], means: tuple[float, ...]) -> float:
    """Return by how much the loss falls per decade, fitted by least squares."""
    x, y = sum(parts) / len(parts), mean_of(means)
    upper = lower = 0.0
    for part, mean in zip(parts, means, strict=True):
        upper += (part - x) * (y - mean)
        lower += (part - x) * (part - x)
    return PARTS * (upper / lower)
