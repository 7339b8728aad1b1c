"""What a run's log holds: one frozen class per kind of event.

An event is written as canonical JSON (`_canonical`) with its kind; `encode` and `decode` are
inverse to each other. Clocks and random numbers enter the log only as fields of events.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeAlias

from lrpilot.core import _canonical


@dataclass(frozen=True, slots=True)
class Report:
    """What the reporter says of one step."""

    progress: int
    """Progress of the forward pass."""
    loss: float | None
    """The reduced loss; None: there is none."""
    weight: float
    """Weight of the loss, > 0."""
    moves_to: int
    """Progress that the reporter moves to; what lies between is final as absent."""


@dataclass(frozen=True, slots=True)
class Created:
    """The run exists from here on."""

    kind: ClassVar[str] = "created"
    spec: Mapping[str, Any]
    """The spec with every default filled in."""
    by_trainer: bool
    """True when a trainer gave the spec, so that later trainers are compared with it."""
    may_revise: bool
    """Whether that trainer would have revised a known run: then a checkpoint with another spec
    may be restored into this one."""
    request_id: str


@dataclass(frozen=True, slots=True)
class Attached:
    """A trainer gave the spec that the run has, the first one to give any."""

    kind: ClassVar[str] = "attached"
    may_revise: bool
    request_id: str


@dataclass(frozen=True, slots=True)
class Opened:
    """A new attempt; the one before it is superseded."""

    kind: ClassVar[str] = "opened"
    attempt: int
    token: str
    """128 random bits, hexadecimal."""
    begin: int
    request_id: str
    key: str
    """Shared by the ranks that may join; empty: none may."""
    reporter: int
    """Global rank of the declared reporter."""
    incarnation: str
    """Incarnation of the reporter when it is the one who opened; else empty."""
    fold: Mapping[str, Any] | None = None
    """What `RunState.saved_fold` wrote, where the losses below `begin` are not those of this log:
    it went another way since, or it is not the log in which the state was saved."""
    lost_seq: int = 0
    lost_digest: str = ""
    """Where the state was saved in a log that was lost, of which this one is the continuation; 0
    and empty: it was saved in this log."""


@dataclass(frozen=True, slots=True)
class Joined:
    """The declared reporter is known from here on."""

    kind: ClassVar[str] = "joined"
    attempt: int
    incarnation: str


@dataclass(frozen=True, slots=True)
class Reported:
    """Losses, in order of progress."""

    kind: ClassVar[str] = "reported"
    attempt: int
    incarnation: str
    reports: tuple[Report, ...]


@dataclass(frozen=True, slots=True)
class Recorded:
    """Values that are fixed for good, written down before the first reply that holds them."""

    kind: ClassVar[str] = "recorded"
    attempt: int
    begin: int
    stride: int
    learning_rates: tuple[float, ...]
    """Step-major: steps x groups."""
    weight_decays: tuple[float, ...] | None
    """Likewise; None: the run sets none."""
    in_use: int
    """Greatest progress known to be in use."""


@dataclass(frozen=True, slots=True)
class Waived:
    """The missing losses below `until` are final as absent: blocked ranks waited too long."""

    kind: ClassVar[str] = "waived"
    attempt: int
    until: int


@dataclass(frozen=True, slots=True)
class Revised:
    """Another spec."""

    kind: ClassVar[str] = "revised"
    spec: Mapping[str, Any]
    effective: int | None
    """First progress that follows it; None: where the next attempt opens."""
    observes_from: int | None
    """First progress whose loss its policies see; None: where the next attempt opens."""
    by_trainer: bool
    request_id: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The run is over."""

    kind: ClassVar[str] = "finished"
    request_id: str


Event: TypeAlias = (
    Created | Attached | Opened | Joined | Reported | Recorded | Waived | Revised | Finished
)

_KINDS: dict[str, type[Any]] = {
    cls.kind: cls
    for cls in (
        Created,
        Attached,
        Opened,
        Joined,
        Reported,
        Recorded,
        Waived,
        Revised,
        Finished,
    )
}


def encode(event: Event) -> bytes:
    """Return the event as canonical bytes."""
    data: dict[str, Any] = {field.name: getattr(event, field.name) for field in fields(event)}
    if isinstance(event, Reported):
        data["reports"] = [
            [item.progress, item.loss, item.weight, item.moves_to] for item in event.reports
        ]
    return _canonical.to_bytes({"kind": event.kind, **data})


def decode(data: bytes) -> Event:
    """Return the event that `encode` wrote. Raises ValueError for an unknown kind."""
    content = _canonical.from_bytes(data)
    kind = content.pop("kind")
    if kind not in _KINDS:
        known = ", ".join(sorted(_KINDS))
        raise ValueError(f"event kind: got {kind!r}; this release knows {known}")
    if kind == Reported.kind:
        content["reports"] = tuple(
            Report(progress, None if loss is None else float(loss), float(weight), moves_to)
            for progress, loss, weight, moves_to in content["reports"]
        )
    elif kind == Recorded.kind:
        content["learning_rates"] = tuple(float(item) for item in content["learning_rates"])
        if content["weight_decays"] is not None:
            content["weight_decays"] = tuple(float(item) for item in content["weight_decays"])
    event: Event = _KINDS[kind](**content)
    return event
