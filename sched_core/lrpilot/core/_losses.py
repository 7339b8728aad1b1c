"""The losses of a log as they are drawn: read from its rows, without the rest of their fold.

A fold keeps what decides; people look at everything that was reported, also at what a later attempt
forgot. To read that takes a small part of the fold alone: which attempt is open, up to where its
losses are final, and what is there of steps that not all of several reporters have reported.
"""

import math
import operator
import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeAlias

from lrpilot.core import _canonical
from lrpilot.core._events import report_from_list
from lrpilot.core._observers import NEWEST_WEIGHT
from lrpilot.core._reporters import Reporters
from lrpilot.core.policies import Observation

BUCKET_LOSSES = 64
"""Values of which a reduced series keeps what stands out."""

_ROUTINE = re.compile(rb'"kind":"(reported|recorded|permitted)"')
"""In an event's canonical bytes; a quotation mark inside a string is escaped there."""


def has_no_loss(payload: bytes) -> bool:
    """Return whether an encoded event is of a kind that every step brings and that has no loss.

    Numbers in it may be left out.
    """
    kind = _ROUTINE.search(payload)
    return kind is not None and kind[1] != b"reported"


def is_routine(payload: bytes) -> bool:
    """Return whether an encoded event is of a kind that every step brings.

    Those are reports, records of values, and permits.
    """
    return _ROUTINE.search(payload) is not None


@dataclass(slots=True)
class Series:
    """Values over progress; both columns are equally long."""

    progress: "array[int]" = field(default_factory=lambda: array("q"))
    values: "array[float]" = field(default_factory=lambda: array("d"))

    def add(self, progress: int, value: float) -> None:
        """Add a point."""
        self.progress.append(progress)
        self.values.append(value)

    def extend(self, other: "Series") -> None:
        """Add the points of another series."""
        self.progress += other.progress
        self.values += other.values

    def ordered(self) -> "Series":
        """Return the series in order of progress: what came late may lie behind what did not."""
        if all(map(operator.le, self.progress, self.progress[1:])):
            return self
        return self.only(sorted(range(len(self.progress)), key=self.progress.__getitem__))

    def between(self, begin: int, last: float) -> "Series":
        """Return the points of an ordered series in [begin, last]."""
        part = slice(bisect_left(self.progress, begin), bisect_right(self.progress, last))
        return Series(self.progress[part], self.values[part])

    def only(self, places: Iterable[int]) -> "Series":
        """Return the points at these places."""
        places = list(places)
        return Series(
            array("q", [self.progress[place] for place in places]),
            array("d", [self.values[place] for place in places]),
        )

    def outstanding(self, begin: int, end: int) -> set[int]:
        """Return the places of what stands out between two places: the least and the greatest
        finite value, and the first one that is not finite."""
        part = self.values[begin:end]
        if not part:
            return set()
        low, high = min(part), max(part)
        found = set()
        # The sum of finite values is finite, unless it overflows; comparisons with NaN say nothing.
        if not math.isfinite(sum(part)):
            finite = [value for value in part if math.isfinite(value)]
            if len(finite) < len(part):
                found.add(next(i for i, value in enumerate(part) if not math.isfinite(value)))
            if not finite:
                return {begin + place for place in found}
            low, high = min(finite), max(finite)
        found |= {part.index(low), part.index(high)}
        return {begin + place for place in found}

    def reduced(self) -> "Series":
        """Return the series in order, with what stands out of each bucket, its first and its last
        point; a short one whole."""
        ordered = self.ordered()
        count = len(self.values)
        if count <= 2 * BUCKET_LOSSES:
            return ordered
        kept = {0, count - 1}
        for begin in range(0, count, BUCKET_LOSSES):
            kept |= ordered.outstanding(begin, begin + BUCKET_LOSSES)
        return ordered.only(sorted(kept))


@dataclass(slots=True)
class Averages:
    """What an exponential average takes in, one loss after the other or some at a time."""

    progress: "array[int]" = field(default_factory=lambda: array("q"))
    """Of the last one of each."""
    counts: "array[int]" = field(default_factory=lambda: array("q"))
    parts: "array[float]" = field(default_factory=lambda: array("d"))
    """What each adds to an average that was 0."""

    def add(self, progress: int, loss: float) -> None:
        """Add one loss."""
        self.progress.append(progress)
        self.counts.append(1)
        self.parts.append(NEWEST_WEIGHT * loss)

    def extend(self, other: "Averages") -> None:
        """Add what another one takes in after this one."""
        self.progress += other.progress
        self.counts += other.counts
        self.parts += other.parts

    def reduced(self) -> "Averages":
        """Return the same, with a bucket at a time."""
        found = Averages()
        count = len(self.progress)
        for begin in range(0, count, BUCKET_LOSSES):
            end = min(begin + BUCKET_LOSSES, count)
            smoothed = Smoothed()
            for place in range(begin, end):
                smoothed.take(self.counts[place], self.parts[place])
            found.progress.append(self.progress[end - 1])
            found.counts.append(sum(self.counts[begin:end]))
            found.parts.append(smoothed.average)
        return found


@dataclass(slots=True)
class Smoothed:
    """The smoothed loss: an exponential average, bias corrected."""

    average: float = 0.0
    weight: float = 0.0

    def take(self, count: int, part: float) -> None:
        """Take in some losses; see Averages."""
        kept = (1.0 - NEWEST_WEIGHT) ** count
        self.average = kept * self.average + part
        self.weight = kept * self.weight + (NEWEST_WEIGHT if count == 1 else 1.0 - kept)

    def take_some(self, share: int, count: int, part: float) -> None:
        """Take in about the first `share` of `count` losses, where only all together are known."""
        kept = 1.0 - NEWEST_WEIGHT
        mean = part / (1.0 - kept**count)
        self.take(share, mean * (1.0 - kept**share))

    @property
    def value(self) -> float:
        """The average; there must have been a loss."""
        return self.average / self.weight


@dataclass(slots=True)
class AttemptLosses:
    """What was reported in one attempt, or in a part of it."""

    attempt: int
    begin: int
    """Progress at which it opened."""
    restored: tuple[float, float] | None = None
    """Where it began from a saved state in place of the losses of the log: sum and weight of the
    smoothed loss there; else None."""
    losses: Series = field(default_factory=Series)
    """Every loss of a step, also of skipped updates and those that came late."""
    averages: Averages = field(default_factory=Averages)
    """The losses of which the smoothed one is made: finite, in time, of updates not skipped."""
    gradient_norms: Series = field(default_factory=Series)
    validation: dict[str, Series] = field(default_factory=dict)

    def extend(self, other: "AttemptLosses") -> None:
        """Add what another part of the attempt has, which came later."""
        self.losses.extend(other.losses)
        self.averages.extend(other.averages)
        self.gradient_norms.extend(other.gradient_norms)
        for name, series in other.validation.items():
            self.validation.setdefault(name, Series()).extend(series)

    def empty(self) -> "AttemptLosses":
        """Return a part without any loss of the same attempt."""
        return AttemptLosses(self.attempt, self.begin, self.restored)

    def reduced(self) -> "AttemptLosses":
        """Return it with what stands out alone."""
        return AttemptLosses(
            self.attempt,
            self.begin,
            self.restored,
            self.losses.reduced(),
            self.averages.reduced(),
            self.gradient_norms.reduced(),
            {name: series.reduced() for name, series in self.validation.items()},
        )


Steps: TypeAlias = tuple[Sequence[int], Sequence[Any], Sequence[int], Sequence[Any]]
"""Progress, losses, what the reporter moves to, and norms of the gradient; all equally long.
Losses and norms are as an event has them: None, a float, or the word for one that is not finite."""


class LossReader:
    """Reads the losses of a log, row by row, from its begin on or from where another one stopped.

    `attempts` has what the rows given hold, in the order in which the attempts opened.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        """Go on from `state`, what `state()` of another one returned; None: from the begin."""
        self.attempts: list[AttemptLosses] = []
        self._reporters = Reporters()
        self._frontier = 0
        if state is not None:
            self._reporters = Reporters.from_mapping(state["reporters"])
            self._frontier = state["frontier"]
            restored = state["restored"]
            self._current = AttemptLosses(
                state["attempt"], state["begin"], restored and (restored[0], restored[1])
            )
            self.attempts.append(self._current)
        else:
            # Nothing is reported before the first attempt.
            self._current = AttemptLosses(0, 0)

    def state(self) -> dict[str, Any] | None:
        """Return as plain data what another reader needs to go on from here."""
        current = self._current
        if not current.attempt:
            return None
        return {
            "attempt": current.attempt,
            "begin": current.begin,
            "restored": current.restored,
            "frontier": self._frontier,
            "reporters": self._reporters.to_mapping(),
        }

    def read(self, payload: bytes) -> None:
        """Read the next row."""
        if has_no_loss(payload):
            return
        event = _canonical.from_bytes(payload)
        match event["kind"]:
            case "reported" if len(self._reporters.ranks) == 1:
                self._report(event["reports"])
            case "reported":
                rank = event.get("rank", self._reporters.ranks[0])
                for item in event["reports"]:
                    self._report_of_several(item, rank)
            case "waived":
                counted = dict(event.get("counted", ()))
                for at in [at for at in self._reporters.parts if at < event["until"]]:
                    self._reporters.only(at, counted.get(at, ()))
                self._advance(event["until"])
            case "opened":
                self._open(event)

    def _open(self, event: Mapping[str, Any]) -> None:
        restored, fold = None, event.get("fold")
        if fold is not None:
            observers = fold["observers"]
            restored = float(observers["average"]), float(observers["average_weight"])
        self._current = AttemptLosses(event["attempt"], event["begin"], restored)
        self.attempts.append(self._current)
        self._frontier = event["begin"]
        self._reporters = Reporters(tuple(event.get("reporters") or (event["reporter"],)))

    def take(self, steps: Steps) -> None:
        """Take in reports of a sole reporter whose steps hold nothing else."""
        if not self._take_at_once(steps):
            for step in zip(*steps, strict=True):
                self._take(*step)

    def _take_at_once(self, steps: Steps) -> bool:
        """Take in steps that are all in time and have each a finite loss; return whether they
        are and have."""
        progress, losses, moves_to, norms = steps
        without_norm = list(norms).count(None)
        if without_norm not in {0, len(norms)}:
            return False
        try:
            values = array("d", losses)
            norm_values = array("d", () if without_norm else norms)
        except TypeError:
            return False
        in_time = all(map(operator.ge, progress, chain((self._frontier,), moves_to)))
        if not in_time or not math.isfinite(sum(values)):
            return False
        at = array("q", progress)
        current = self._current
        current.losses.extend(Series(at, values))
        parts = array("d", [NEWEST_WEIGHT * loss for loss in values])
        current.averages.extend(Averages(at, array("q", [1]) * len(at), parts))
        if norm_values:
            current.gradient_norms.extend(Series(at, norm_values))
        self._frontier = moves_to[-1]
        return True

    def _take(
        self, progress: int, said: float | str | None, moves_to: int, norm: float | str | None
    ) -> None:
        current = self._current
        if said is not None:
            loss = float(said)
            current.losses.add(progress, loss)
            if progress >= self._frontier and math.isfinite(loss):
                current.averages.add(progress, loss)
        if norm is not None:
            current.gradient_norms.add(progress, float(norm))
        self._frontier = max(self._frontier, moves_to)

    def _report(self, reports: Sequence[Sequence[Any]]) -> None:
        if all(len(item) == 4 for item in reports):
            progress, losses, _, moves_to = zip(*reports, strict=True)
            self.take((progress, losses, moves_to, [None] * len(reports)))
            return
        for progress, loss, _, moves_to, *rest in reports:
            more = rest[0] if rest else {}
            if more.get("skipped") or "validation" in more:
                observation = Observation(
                    progress,
                    None if loss is None else float(loss),
                    validation={} if more.get("skipped") else more["validation"],
                    gradient_norm=more.get("gradient_norm"),
                    is_skipped=bool(more.get("skipped")),
                )
                self._observe(observation, in_time=progress >= self._frontier)
                self._frontier = max(self._frontier, moves_to)
            else:
                self._take(progress, loss, moves_to, more.get("gradient_norm"))

    def _report_of_several(self, item: Sequence[Any], rank: int) -> None:
        report, reporters = report_from_list(item), self._reporters
        begin = self._current.begin
        if report.progress >= max(self._frontier, reporters.positions.get(rank, begin)):
            self._advance(reporters.take(rank, report, begin))
        else:
            # What comes late is a part of a mean only, and is not drawn.
            self._advance(reporters.move(rank, report.moves_to, begin))

    def _advance(self, until: int) -> None:
        """Make the steps below `until` final."""
        until = max(until, self._frontier)
        for observation in self._reporters.final(until):
            self._observe(observation, in_time=True)
        self._reporters.trim(until)
        self._frontier = until

    def _observe(self, observation: Observation, *, in_time: bool) -> None:
        current, at, loss = self._current, observation.progress, observation.loss
        if loss is not None:
            current.losses.add(at, loss)
            if in_time and math.isfinite(loss) and not observation.is_skipped:
                current.averages.add(at, loss)
        if observation.gradient_norm is not None:
            current.gradient_norms.add(at, float(observation.gradient_norm))
        for name, value in observation.validation.items():
            current.validation.setdefault(name, Series()).add(at, float(value))
