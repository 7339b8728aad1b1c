"""What was seen lately, in bounded memory."""

import heapq
from dataclasses import dataclass

MOST_RANKS = 16_384
"""Ranks that are remembered at most, those that asked last."""


class RecentMaximum:
    """The greatest of the values of the last `span_s` to twice `span_s` seconds.

    Only two numbers are kept, so that it does not matter how many ask. Times are on one monotonic
    clock, in seconds, and never go back.
    """

    def __init__(self, span_s: float) -> None:
        self._span_s = span_s
        self._since_s = 0.0
        self._now: int | None = None
        self._before: int | None = None

    def add(self, value: int, at_s: float) -> None:
        """Take a value that was seen at `at_s`."""
        self._turn(at_s)
        self._now = value if self._now is None else max(self._now, value)

    def greatest(self, at_s: float) -> int | None:
        """Return the greatest value as of `at_s`, or None where none was seen lately."""
        self._turn(at_s)
        return max((item for item in (self._now, self._before) if item is not None), default=None)

    def _turn(self, at_s: float) -> None:
        """Begin a new span where the one under way is over."""
        passed_s = at_s - self._since_s
        if passed_s >= self._span_s:
            self._before = self._now if passed_s < 2 * self._span_s else None
            self._now = None
            self._since_s = at_s


@dataclass(frozen=True, slots=True)
class Asked:
    """Where a rank was when it asked for something."""

    rank: int
    progress: int
    """Greatest progress that it used."""
    lag: int
    """How far that was behind the progress of the run."""
    at_s: float
    """When it asked."""


class RecentRanks:
    """The ranks that asked within the last `span_s` seconds. Times are as in RecentMaximum."""

    def __init__(self, span_s: float) -> None:
        self._span_s = span_s
        self._asked: dict[int, Asked] = {}
        """By rank, in the order in which they asked last."""

    def add(self, asked: Asked) -> None:
        """Take note of a rank that asks."""
        self._asked.pop(asked.rank, None)
        self._asked[asked.rank] = asked
        if len(self._asked) > MOST_RANKS:
            del self._asked[next(iter(self._asked))]

    def count(self, at_s: float) -> int:
        """Return the number of ranks as of `at_s`."""
        while self._asked:
            oldest = next(iter(self._asked.values()))
            if at_s - oldest.at_s <= self._span_s:
                break
            del self._asked[oldest.rank]
        return len(self._asked)

    def slowest(self, number: int) -> list[Asked]:
        """Return the ranks that were farthest behind as of the last `count`, the farthest first."""
        return heapq.nsmallest(
            number, self._asked.values(), key=lambda item: (-item.lag, item.progress, item.rank)
        )
