"""What is drawn of a run: its losses as they were reported, and LR and WD, past and to come.

Curves are pictures. Of more values than are asked for they keep the least and the greatest of each
stretch, at their own progress, so that no spike is lost.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lrpilot import core
from lrpilot.v1 import runs_pb2 as pb

POINTS, LEAST_POINTS, MOST_POINTS = 1000, 10, 4000

GROUPS, MOST_GROUPS = 8, 64
"""Groups that are drawn unless some are named, and how many may be."""

MOST_ATTEMPTS = 2000
"""Attempts whose losses are drawn, the newest: more do not fit into one message."""

MOST_NAMES = 32
"""Validation losses that are drawn, the first by name: more do not fit into one message."""

MOST_RATES = 32_000
"""Numbers that the curves of LR and WD have at most, so that the message stays small."""

MOST_LINKS = 1_000_000
"""About the most adjustments evaluated for curves of LR and WD, each once per value: some tenths of
a second of a thread. A run with hundreds of them is drawn with fewer points, and with thousands not
each jump is there."""


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


def draw_losses(
    attempts: Sequence[core.AttemptLosses], wanted: Wanted, answer: pb.GetCurvesResponse
) -> None:
    """Put the curves of the losses into an answer: those of all attempts, in order."""
    kept = list(zip(attempts, _forgotten_from(attempts), strict=True))
    drawn = []
    for attempt, forgotten in kept:
        curve = attempt.losses.ordered().between(wanted.begin, wanted.end)
        if curve.progress or attempt is attempts[-1]:
            drawn.append((attempt, forgotten, curve))
    drawn = drawn[-MOST_ATTEMPTS:]
    span = sum(_span(curve) for _, _, curve in drawn)
    is_long = sum(len(curve.progress) for _, _, curve in drawn) > wanted.points
    width = math.ceil(span / (wanted.points // 2)) if is_long else 0
    for attempt, forgotten, curve in drawn:
        message = answer.losses.add(attempt=attempt.attempt, begin=attempt.begin)
        if max(attempt.losses.progress, default=-1) >= forgotten:
            message.forgotten_from = int(forgotten)
        _fill(message.loss, thinned(curve, width))
    _fill(answer.smoothed_loss, _thinned(_smoothed(kept, wanted), wanted.points))
    norms = ((attempt.gradient_norms, forgotten) for attempt, forgotten in kept)
    _fill(answer.gradient_norm, _thinned(_counting(norms, wanted), wanted.points))
    names = sorted({name for attempt in attempts for name in attempt.validation})[:MOST_NAMES]
    for name in names:
        parts = ((attempt.validation.get(name), forgotten) for attempt, forgotten in kept)
        curve = _counting(parts, wanted)
        if curve.progress:
            points = max(LEAST_POINTS, wanted.points // len(names))
            _fill(answer.validation_losses[name], _thinned(curve, points))


def _forgotten_from(attempts: Sequence[core.AttemptLosses]) -> list[float]:
    """Return for each attempt from which progress on later ones forgot its losses."""
    least, found = math.inf, []
    for attempt in reversed(attempts):
        found.append(least)
        least = min(least, attempt.begin if attempt.restored is None else 0)
    return found[::-1]


def _smoothed(kept: Sequence[tuple[core.AttemptLosses, float]], wanted: Wanted) -> core.Series:
    """Return the smoothed loss at the losses that count, or at the last ones of some of them."""
    found, smoothed = core.Series(), _first_smoothed(attempt for attempt, _ in kept)
    for attempt, forgotten in kept:
        last = attempt.begin - 1
        averages = attempt.averages
        for at, count, part in zip(averages.progress, averages.counts, averages.parts, strict=True):
            if at >= forgotten:
                share = round(count * (forgotten - 1 - last) / (at - last)) if at > last else 0
                if 0 < share < count:
                    smoothed.take_some(share, count, part)
                break
            smoothed.take(count, part)
            last = at
            if wanted.begin <= at <= wanted.end:
                found.add(at, smoothed.value)
    return found


def _first_smoothed(attempts: Iterable[core.AttemptLosses]) -> core.Smoothed:
    """Return the smoothed loss before the first loss of the log that counts."""
    smoothed, origin = core.Smoothed(), 0
    for attempt in attempts:
        if attempt.restored is not None:
            smoothed, origin = core.Smoothed(*attempt.restored), attempt.begin
        elif attempt.begin < origin:
            # Of the losses below the origin only that saved state is known.
            smoothed, origin = core.Smoothed(), attempt.begin
    return smoothed


def _counting(parts: Iterable[tuple[core.Series | None, float]], wanted: Wanted) -> core.Series:
    """Return what counts of several attempts, each up to where it was forgotten, as one curve."""
    whole = core.Series()
    for series, forgotten in parts:
        if series is not None:
            whole.extend(series.ordered().between(wanted.begin, min(wanted.end, forgotten - 1)))
    return whole


def _span(curve: core.Series) -> int:
    return curve.progress[-1] - curve.progress[0] + 1 if curve.progress else 0


def _thinned(curve: core.Series, points: int) -> core.Series:
    """Return a curve with about so many points at most."""
    is_long = len(curve.progress) > points
    return thinned(curve, math.ceil(_span(curve) / (points // 2)) if is_long else 0)


def thinned(curve: core.Series, width: int) -> core.Series:
    """Return a curve with what stands out of each stretch of `width` progresses; 0: with all.

    Its first and its last point are always there.
    """
    if not width or not curve.progress:
        return curve
    at, count = curve.progress, len(curve.progress)
    kept = {0, count - 1}
    begin = 0
    while begin < count:
        end = bisect_left(at, (at[begin] // width + 1) * width, begin)
        kept |= curve.outstanding(begin, end)
        begin = end
    return curve.only(sorted(kept))


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
        self._known_places: dict[int, list[int | None]] = {}

    def draw(self, wanted: Wanted, answer: pb.GetCurvesResponse) -> None:
        """Put the curves of LR and WD into an answer."""
        plan, names = self._plan, wanted.groups
        at = self._progresses(wanted)
        rates: list[list[float]] = [[] for _ in names]
        bases: list[list[float]] = [[] for _ in names]
        decays: list[list[float]] = [[] for _ in names]
        has_decay = False
        for progress in at:
            # An earlier spec may not have had a group.
            groups = self._places(plan.spec_at(progress), names)
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

    def _places(self, spec: core.RunSpec, names: Sequence[str]) -> list[int | None]:
        """Return the position of each group in a spec; None: it is not there."""
        if id(spec) not in self._known_places:
            places = {name: place for place, name in enumerate(spec.group_names)}
            self._known_places[id(spec)] = [places.get(name) for name in names]
        return self._known_places[id(spec)]

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
        """Return where LR and WD are drawn: wherever they jump or bend, and all over the range."""
        begin, end, groups = wanted.begin, wanted.end, len(wanted.groups)
        links = groups * (1 + len(self._plan.adjustments))
        most = max(LEAST_POINTS, min(MOST_RATES // (4 * groups), MOST_LINKS // links))
        corners = self._plan.corners(begin, end)
        if len(corners) > most:
            # Both sides of a jump stand beside each other.
            step = 2 * math.ceil(len(corners) / most)
            corners = [at for i in range(0, len(corners), step) for at in corners[i : i + 2]]
        count = max(LEAST_POINTS, min(wanted.points, most - len(corners)))
        even = (begin + (end - begin) * index // (count - 1) for index in range(count))
        marks = (at for at in self._known if begin <= at <= end)
        return sorted({*corners, *even, *marks})
