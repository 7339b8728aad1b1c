"""What is drawn of a run: its losses as they were reported, and LR and WD, past and to come.

Curves are pictures. Of more values than are asked for they keep the least and the greatest of each
stretch, at their own progress, so that no spike is lost.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from lrpilot import core
from lrpilot.v1 import runs_pb2 as pb

POINTS, LEAST_POINTS, MOST_POINTS = 1000, 10, 4000

GROUPS, MOST_GROUPS = 8, 64
"""Groups that are drawn unless some are named, and how many may be."""

MOST_ATTEMPTS = 2000
"""Attempts whose losses are drawn, the newest: more do not fit into one message."""

MOST_NAMES = 32
"""Validation losses that are drawn, the first by name: more do not fit into one message."""

MOST_RATES = 40_000
"""Numbers that the curves of LR and WD have at most, so that the message stays small."""

MOST_LINKS = 3_000_000
"""About the most adjustments evaluated for curves of LR and WD, each once per value: a second of
a thread at most. A run with thousands of adjustments is drawn with fewer points."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of a run is to be drawn."""

    begin: int
    end: int
    """Last progress."""
    points: int
    groups: tuple[str, ...]


def read_wanted(request: pb.GetCurvesRequest, state: core.RunState) -> Wanted:
    """Return what a request asks for. Raises InvalidRequest."""
    violations = []
    end = request.end or max(state.spec.total, state.progress)
    if not 0 <= request.begin <= core.MAX_PROGRESS:
        allowed = f"0 to {core.MAX_PROGRESS}"
        violations.append(core.Violation("begin", str(request.begin), allowed))
    elif request.end == 0 and end < request.begin:
        allowed = f"0 to {end}, the end of the run; `end` says how far beyond"
        violations.append(core.Violation("begin", str(request.begin), allowed))
    elif not request.begin <= end <= core.MAX_PROGRESS:
        allowed = f"`begin`, {request.begin}, to {core.MAX_PROGRESS}; or 0: the end of the run"
        violations.append(core.Violation("end", str(request.end), allowed))
    if request.points and not LEAST_POINTS <= request.points <= MOST_POINTS:
        allowed = f"{LEAST_POINTS} to {MOST_POINTS}, or 0 for {POINTS}"
        violations.append(core.Violation("points", str(request.points), allowed))
    known = state.spec.group_names
    unknown = [name for name in request.groups if name not in known]
    if len(request.groups) > MOST_GROUPS:
        got = f"{len(request.groups)} names"
        violations.append(core.Violation("groups", got, f"at most {MOST_GROUPS}"))
    elif unknown:
        some = ", ".join(map(repr, known[:MOST_GROUPS]))
        more = f" and {len(known) - MOST_GROUPS} more" if len(known) > MOST_GROUPS else ""
        violations.append(core.Violation("groups", repr(unknown[0]), f"one of {some}{more}"))
    if violations:
        raise core.InvalidRequest("these curves cannot be drawn", violations)
    return Wanted(
        begin=request.begin,
        end=end,
        points=request.points or POINTS,
        groups=tuple(dict.fromkeys(request.groups)) or known[:GROUPS],
    )


# Losses.


@dataclass(frozen=True, slots=True)
class Losses:
    """The losses of a run, attempt by attempt, in the order in which they opened."""

    attempts: Sequence[core.AttemptLosses]

    def forgotten_from(self) -> list[float]:
        """Return for each attempt from which progress on later ones forgot its losses."""
        least, found = math.inf, []
        for attempt in reversed(self.attempts):
            found.append(least)
            least = min(least, attempt.begin if attempt.restored is None else 0)
        return found[::-1]


def losses_of(payloads: Iterable[bytes]) -> Losses:
    """Return the losses of a whole log."""
    reader = core.LossReader()
    for payload in payloads:
        reader.read(payload)
    # Nothing is reported before the first attempt.
    return Losses(reader.attempts[1:])


def draw_losses(losses: Losses, wanted: Wanted, answer: pb.GetCurvesResponse) -> None:
    """Put the curves of the losses into an answer."""
    forgotten_from = losses.forgotten_from()
    drawn = []
    for attempt, forgotten in zip(losses.attempts, forgotten_from, strict=True):
        curve = _between(_in_order(attempt.losses), wanted.begin, wanted.end)
        if curve.progress or attempt is losses.attempts[-1]:
            drawn.append((attempt, forgotten, curve))
    drawn = drawn[-MOST_ATTEMPTS:]
    total = sum(len(curve.progress) for _, _, curve in drawn)
    span = sum(_span(curve) for _, _, curve in drawn)
    # Two points to a stretch, as a rule.
    width = math.ceil(span / (wanted.points // 2)) if total > wanted.points else 0
    for attempt, forgotten, curve in drawn:
        message = answer.losses.add(attempt=attempt.attempt, begin=attempt.begin)
        if max(attempt.losses.progress, default=-1) >= forgotten:
            message.forgotten_from = int(forgotten)
        _fill(message.loss, thinned(curve, width))
    kept = list(zip(losses.attempts, forgotten_from, strict=True))
    _fill(answer.smoothed_loss, _thinned(_smoothed(kept, wanted), wanted))
    norms = ((item.gradient_norms, until) for item, until in kept)
    _fill(answer.gradient_norm, _thinned(_joined(norms, wanted), wanted))
    names = sorted({name for item in losses.attempts for name in item.validation})[:MOST_NAMES]
    for name in names:
        curves = ((item.validation.get(name), until) for item, until in kept)
        curve = _joined(curves, wanted)
        if curve.progress:
            few = max(LEAST_POINTS, wanted.points // len(names))
            _fill(answer.validation_losses[name], _thinned(curve, wanted, few))


def _smoothed(kept: Sequence[tuple[core.AttemptLosses, float]], wanted: Wanted) -> core.Series:
    """Return the smoothed loss at each loss that counts."""
    found, smoothed, origin = core.Series(), core.Smoothed(), 0
    for attempt, _ in kept:
        if attempt.restored is not None:
            smoothed, origin = core.Smoothed(*attempt.restored), attempt.begin
        elif attempt.begin < origin:
            # Only what a saved state says of the losses there was known.
            smoothed, origin = core.Smoothed(), attempt.begin
    for attempt, forgotten in kept:
        for at, loss in zip(attempt.counted.progress, attempt.counted.values, strict=True):
            if at >= forgotten:
                break
            value = smoothed.add(loss)
            if wanted.begin <= at <= wanted.end:
                found.add(at, value)
    return found


def _joined(parts: Iterable[tuple[core.Series | None, float]], wanted: Wanted) -> core.Series:
    """Return what counts of several attempts, each up to where it was forgotten, as one curve."""
    whole = core.Series()
    for series, forgotten in parts:
        if series is not None:
            part = _between(series, wanted.begin, min(wanted.end, forgotten - 1))
            whole.progress += part.progress
            whole.values += part.values
    return whole


def _in_order(series: core.Series) -> core.Series:
    """Return a curve whose progress does not fall: what came late may lie behind what did not."""
    at = series.progress
    if all(a <= b for a, b in pairwise(at)):
        return series
    order = sorted(range(len(at)), key=at.__getitem__)
    return core.Series([at[i] for i in order], [series.values[i] for i in order])


def _between(series: core.Series, begin: int, last: float) -> core.Series:
    first, end = bisect_left(series.progress, begin), bisect_right(series.progress, last)
    return core.Series(series.progress[first:end], series.values[first:end])


def _span(curve: core.Series) -> int:
    return curve.progress[-1] - curve.progress[0] + 1 if curve.progress else 0


def _thinned(curve: core.Series, wanted: Wanted, points: int | None = None) -> core.Series:
    points = points or wanted.points
    width = math.ceil(_span(curve) / (points // 2)) if len(curve.progress) > points else 0
    return thinned(curve, width)


def thinned(curve: core.Series, width: int) -> core.Series:
    """Return a curve with what stands out of each stretch of `width` progresses; 0: with all.

    Those are the least and the greatest finite value, and the first one that is not finite. The
    first and the last point of the curve are always there.
    """
    if not width:
        return curve
    at, values = curve.progress, curve.values
    kept = {0, len(at) - 1} if at else set()
    index, count = 0, len(at)
    while index < count:
        end = bisect_left(at, (at[index] // width + 1) * width, index)
        kept.update(_outstanding(values, index, end))
        index = end
    order = sorted(kept)
    return core.Series([at[i] for i in order], [values[i] for i in order])


def _outstanding(values: Sequence[float], begin: int, end: int) -> Iterator[int]:
    part = values[begin:end]
    low, high = min(part), max(part)
    # A sum of finite numbers is finite, unless it overflows; and comparisons with NaN say nothing.
    if not math.isfinite(sum(part)):
        finite = [value for value in part if math.isfinite(value)]
        broken = next((i for i, value in enumerate(part) if not math.isfinite(value)), None)
        if broken is not None:
            yield begin + broken
        if not finite:
            return
        low, high = min(finite), max(finite)
    yield begin + part.index(low)
    yield begin + part.index(high)


def _fill(message: pb.Curve, curve: core.Series) -> None:
    message.progress.extend(curve.progress)
    message.value.extend(curve.values)


# LR and WD.


class Rates:
    """LR and WD of a run as of one moment. Made on the event loop, it is drawn on any thread."""

    def __init__(self, state: core.RunState) -> None:
        self._plan = state.plan.copy()
        self._records = state.records.copy()
        self._known = (state.progress, state.horizon)

    def draw(self, wanted: Wanted, answer: pb.GetCurvesResponse) -> None:
        """Put the curves of LR and WD into an answer."""
        plan, names = self._plan, wanted.groups
        at = self._progresses(wanted)
        rates: list[list[float]] = [[] for _ in names]
        bases: list[list[float]] = [[] for _ in names]
        decays: list[list[float]] = [[] for _ in names]
        has_decay = False
        for progress in at:
            spec = plan.spec_at(progress)
            places = {name: place for place, name in enumerate(spec.group_names)}
            # An earlier spec may not have had a group.
            groups = [places.get(name) for name in names]
            known = [place for place in groups if place is not None]
            found, found_decays = self._values(progress, known)
            base = plan.base(progress, known)
            has_decay = has_decay or found_decays is not None
            there = iter(range(len(known)))
            for index, place in enumerate(groups):
                here = None if place is None else next(there)
                rates[index].append(math.nan if here is None else found[here])
                bases[index].append(math.nan if here is None else base[here])
                decays[index].append(
                    math.nan if here is None or found_decays is None else found_decays[here]
                )
        for index, name in enumerate(names):
            answer.groups.add(
                name=name,
                progress=at,
                learning_rate=rates[index],
                base_learning_rate=bases[index],
                weight_decay=decays[index] if has_decay else (),
            )
        answer.group_count = len(plan.spec.group_names)
        stages = plan.stages()
        if len(stages) > 1:
            answer.stages.extend(
                pb.StageSpan(
                    name=stage.name,
                    begin=stage.begin,
                    end=max(plan.spec.total, stage.begin) if stage.until is None else stage.until,
                )
                for stage in stages
            )

    def _values(
        self, progress: int, groups: Sequence[int]
    ) -> tuple[Sequence[float], Sequence[float] | None]:
        """Return what was handed out, else what the plan says, of groups by their positions."""
        recorded = None
        if progress >= self._records.floor:
            recorded = self._records.at(progress)
        if recorded is None:
            return self._plan.values(progress, groups)
        rates, decays = recorded
        return [rates[place] for place in groups], decays and [decays[place] for place in groups]

    def _progresses(self, wanted: Wanted) -> list[int]:
        """Return where LR and WD are drawn: all over the range, and wherever they jump or bend."""
        links = 3 * len(wanted.groups) * (1 + len(self._plan.adjustments))
        most = min(MOST_RATES // (4 * len(wanted.groups)), MOST_LINKS // links)
        count = max(LEAST_POINTS, min(wanted.points, most))
        span = wanted.end - wanted.begin
        found = {wanted.begin + span * index // (count - 1) for index in range(count)}
        marks = {at for at in self._known if wanted.begin <= at <= wanted.end}
        corners = self._plan.corners(wanted.begin, wanted.end)
        room = max(count, most) - len(found)
        if len(corners) > room:
            # Both sides of a jump stand beside each other.
            step = math.ceil(len(corners) / max(2, room))
            pairs = (corners[i : i + 2] for i in range(0, len(corners), 2 * step))
            corners = list(chain.from_iterable(pairs))
        return sorted(found | marks | set(corners))
