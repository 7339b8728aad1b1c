"""Changes of LR or WD, with their reasons, for whoever writes a log of the training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from lrpilot.v1 import trainer_pb2 as pb


@dataclass(frozen=True)
class Change:
    """A change of LR or WD: what it did, and why."""

    id: str
    """Name within the run."""
    progress: int
    """First progress at which it shows, in the run's unit."""
    source: str
    """Who decided, such as "policies.0 (plateau)", "operator" or "rollback"."""
    summary: str
    """What it does, as one phrase."""
    reason: str
    """Why, as one phrase with the numbers."""
    before: tuple[float, ...]
    """Learning rate at `progress` per group, without it."""
    after: tuple[float, ...]
    """Learning rate likewise, with it."""
    weight_decay_before: tuple[float, ...]
    """Weight decay at `progress` per group, without it; empty: the run sets none."""
    weight_decay_after: tuple[float, ...]
    """Weight decay likewise, with it."""


ChangeHandler: TypeAlias = Callable[[Change], object]


def read_change(sent: pb.Change) -> Change:
    """Return a change as it came."""
    return Change(
        id=sent.id,
        progress=sent.progress,
        source=sent.source,
        summary=sent.summary,
        reason=sent.reason,
        before=tuple(sent.before),
        after=tuple(sent.after),
        weight_decay_before=tuple(sent.weight_decay_before),
        weight_decay_after=tuple(sent.weight_decay_after),
    )
