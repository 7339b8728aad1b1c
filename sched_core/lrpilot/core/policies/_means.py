"""Means of windows of losses, each with how far noise alone can be expected to move it."""

import math
from dataclasses import dataclass, replace
from typing import TypeVar

_MEAN_STEP = 2.0 / math.sqrt(math.pi)
"""Mean distance of two draws from a normal distribution, in standard deviations."""

_NEWEST = 0.125
"""Weight of the newest error in their running mean: one alone is off by a fifth or more."""


@dataclass(frozen=True, slots=True)
class Filling:
    """The window of losses under way; the first fields of a policy's state."""

    seen: int = 0
    """Losses in it."""
    total: float = 0.0
    """Their sum, added in order."""
    travel: float = 0.0
    """Sum of the distances from each to the next, added in order."""
    last: float = 0.0
    """The last of them."""
    began: int = 0
    """Progress of the first of them; 0 where there is none."""


FillingT = TypeVar("FillingT", bound=Filling)


@dataclass(frozen=True, slots=True)
class Window:
    """A full window."""

    mean: float
    error: float
    """Standard error of the mean, from the distances of neighbours: a slope hardly raises it."""
    began: int
    """Progress of its first loss."""


def fill(state: FillingT, loss: float, progress: int, size: int) -> tuple[FillingT, Window | None]:
    """Return the state with one more finite loss, and the window if that made it full.

    More precisely, the error is `travel / (size - 1) * sqrt(pi) / 2 / sqrt(size)`; `size` is at
    least 2. A window whose numbers leave the range of float64 is dropped.
    """
    if state.seen == 0:
        return replace(state, seen=1, total=loss, travel=0.0, last=loss, began=progress), None
    seen, total = state.seen + 1, state.total + loss
    travel = state.travel + abs(loss - state.last)
    if seen < size:
        return replace(state, seen=seen, total=total, travel=travel, last=loss), None
    empty = replace(state, seen=0, total=0.0, travel=0.0, last=0.0, began=0)
    mean, error = total / size, travel / (size - 1) / _MEAN_STEP / math.sqrt(size)
    if not (math.isfinite(mean) and math.isfinite(error)):
        return empty, None
    return empty, Window(mean, error, state.began)


def settle(noise: float, error: float) -> float:
    """Return the running mean of the errors, in which the newest counts for an eighth."""
    return noise + (error - noise) * _NEWEST


def reach(best: float, first: float) -> float:
    """Return the scale that a rise of the loss is measured by.

    The larger of the best mean's distance from 0 and of what was gained since the first one, so
    that it makes sense for losses near 0 and below it.
    """
    return max(abs(best), first - best)
