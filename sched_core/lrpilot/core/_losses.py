"""The losses of a log as they are drawn: read from its rows, without the rest of their fold.

A fold keeps what decides; people look at everything that was reported, also at what a later attempt
forgot. To read it takes a small part of the fold alone: which attempt is open, up to where its
losses are final, and what is there of steps that not all of several reporters have reported.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lrpilot.core import _canonical
from lrpilot.core._events import report_from_list
from lrpilot.core._observers import NEWEST_WEIGHT
from lrpilot.core._reporters import Reporters
from lrpilot.core.policies import Observation

_ROUTINE = re.compile(rb'"kind":"(reported|recorded|permitted)"')
"""In an event's canonical bytes; a quotation mark inside a string is escaped there."""


def is_routine(payload: bytes) -> bool:
    """Return whether an encoded event is of a kind that every step brings.

    Those are reports, records of values, and permits.
    """
    return _ROUTINE.search(payload) is not None


@dataclass(slots=True)
class Series:
    """Values over progress, in the order in which they came; both lists are equally long."""

    progress: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, progress: int, value: float) -> None:
        """Add a point."""
        self.progress.append(progress)
        self.values.append(value)


@dataclass(slots=True)
class AttemptLosses:
    """What was reported in one attempt, or in a part of it."""

    attempt: int
    begin: int
    """Progress at which it opened."""
    restored: tuple[float, float] | None = None
    """Where it began from a saved state in place of the losses of the log: the sum and the weight
    of the smoothed loss in that state; else None."""
    losses: Series = field(default_factory=Series)
    """Every loss of a step, also of skipped updates and those that came late."""
    counted: Series = field(default_factory=Series)
    """Those that the smoothed loss is made of: finite, in time, of updates that were not
    skipped."""
    gradient_norms: Series = field(default_factory=Series)
    validation: dict[str, Series] = field(default_factory=dict)


class LossReader:
    """Reads the losses of a log, row by row, from its begin on or from where another one stopped.

    `attempts` has what the rows given hold, in the order in which the attempts opened.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self.attempts: list[AttemptLosses] = []
        self._reporters = Reporters()
        self._frontier = 0
        if state is not None:
            self._reporters = Reporters.from_mapping(state["reporters"])
            self._frontier = state["frontier"]
            self._open(state["attempt"], state["begin"])
        else:
            self._open(0, 0)

    def state(self) -> dict[str, Any]:
        """Return as plain data what another reader needs to go on from here."""
        current = self.attempts[-1]
        return {
            "attempt": current.attempt,
            "begin": current.begin,
            "frontier": self._frontier,
            "reporters": self._reporters.to_mapping(),
        }

    def read(self, payload: bytes) -> None:
        """Read the next row."""
        kind = _ROUTINE.search(payload)
        if kind is not None and kind[1] != b"reported":
            return
        event = _canonical.from_bytes(payload)
        match event["kind"]:
            case "reported":
                self._report(event["reports"], event.get("rank"))
            case "waived":
                counted = dict(event.get("counted", ()))
                for at in [at for at in self._reporters.parts if at < event["until"]]:
                    self._reporters.only(at, counted.get(at, ()))
                self._advance(event["until"])
            case "opened":
                self._open(event["attempt"], event["begin"], event.get("fold"))
                self._frontier = event["begin"]
                ranks = event.get("reporters") or (event["reporter"],)
                self._reporters = Reporters(tuple(ranks))

    def _open(self, attempt: int, begin: int, fold: Mapping[str, Any] | None = None) -> None:
        restored = None
        if fold is not None:
            observers = fold["observers"]
            restored = float(observers["average"]), float(observers["average_weight"])
        self.attempts.append(AttemptLosses(attempt, begin, restored))

    def _report(self, reports: Sequence[Sequence[Any]], rank: int | None) -> None:
        if len(self._reporters.ranks) > 1:
            rank = self._reporters.ranks[0] if rank is None else rank
            for item in reports:
                self._report_of_several(item, rank)
            return
        current = self.attempts[-1]
        for progress, said, _, moves_to, *more in reports:
            in_time = progress >= self._frontier
            if more:
                self._report_with_more(progress, said, more[0], in_time=in_time)
            elif said is not None:
                loss = float(said)
                current.losses.add(progress, loss)
                if in_time and math.isfinite(loss):
                    current.counted.add(progress, loss)
            self._frontier = max(self._frontier, moves_to)

    def _report_with_more(
        self, progress: int, loss: Any, more: Mapping[str, Any], *, in_time: bool
    ) -> None:
        norm, is_skipped = more.get("gradient_norm"), bool(more.get("skipped"))
        observation = Observation(
            progress,
            None if loss is None else float(loss),
            validation={} if is_skipped else more.get("validation", {}),
            gradient_norm=None if norm is None else float(norm),
            is_skipped=is_skipped,
        )
        self._observe(observation, in_time=in_time)

    def _report_of_several(self, item: Sequence[Any], rank: int) -> None:
        report, reporters = report_from_list(item), self._reporters
        begin = self.attempts[-1].begin
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
        current, at, loss = self.attempts[-1], observation.progress, observation.loss
        if loss is not None:
            current.losses.add(at, loss)
            if in_time and math.isfinite(loss) and not observation.is_skipped:
                current.counted.add(at, loss)
        if observation.gradient_norm is not None:
            current.gradient_norms.add(at, observation.gradient_norm)
        for name, value in observation.validation.items():
            current.validation.setdefault(name, Series()).add(at, float(value))


@dataclass(slots=True)
class Smoothed:
    """The smoothed loss, loss by loss: an exponential average, bias corrected."""

    average: float = 0.0
    weight: float = 0.0

    def add(self, loss: float) -> float:
        """Take a loss; return the smoothed loss with it."""
        self.average = (1.0 - NEWEST_WEIGHT) * self.average + NEWEST_WEIGHT * loss
        self.weight = (1.0 - NEWEST_WEIGHT) * self.weight + NEWEST_WEIGHT
        return self.average / self.weight
