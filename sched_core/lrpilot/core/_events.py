"""What a run's log holds: one frozen class per kind of event.

An event is written as canonical JSON (`_canonical`) with its kind, without the fields that have
their default; `encode` and `decode` are inverse to each other. Clocks and random numbers enter the
log only as fields of events.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeAlias

from lrpilot.core import _canonical
from lrpilot.core._records import Block


@dataclass(frozen=True, slots=True)
class Report:
    """What the reporter says of one step."""

    progress: int
    """Progress of the forward pass."""
    loss: float | None
    """The reduced loss; None: there is none."""
    weight: float
    """Weight of the loss in the mean over several reporters, > 0."""
    moves_to: int
    """Progress that the reporter moves to; what lies between is final as absent. Of a skipped
    update: `progress` itself."""
    skipped: bool = False
    """Whether the optimizer refused the update, so that the same progress comes again."""
    tries: int = 0
    """Number of skipped updates at this progress before this one."""
    validation: Mapping[str, float] = field(default_factory=dict)
    """Validation losses by name."""
    gradient_norm: float | None = None
    batch: int | None = None
    """Global batch size in samples; None: not known."""

    @property
    def has_metrics(self) -> bool:
        """Whether there is anything for a policy to see."""
        return (
            self.loss is not None
            or bool(self.validation)
            or self.gradient_norm is not None
            or self.batch is not None
        )


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
    """Global rank of the declared reporter, of several the first."""
    incarnation: str
    """Incarnation of the reporter when it is the one who opened; else empty."""
    fold: Mapping[str, Any] | None = None
    """What `RunState.saved_fold` wrote, where the losses below `begin` are not those of this log:
    it went another way since, or it is not the log in which the state was saved."""
    lost_seq: int = 0
    lost_digest: str = ""
    """Where the state was saved in a log that was lost, of which this one is the continuation; 0
    and empty: it was saved in this log."""
    reporters: tuple[int, ...] = ()
    """Global ranks of several reporters, in the order in which their losses are summed."""
    opener: int | None = None
    """Rank that opened, where `incarnation` is that of another reporter than the first."""
    directive: str = ""
    """Id of the rollback directive that this attempt carries out; empty: none."""
    before: int = 0
    asked_at: int = 0
    """Of a rollback: where the damage began, and the progress of the loss that asked for it."""
    factor: float = 1.0
    """Of a rollback: what the LR is multiplied by from `begin` on."""
    holder: str = ""
    """Leader mode: 128 random bits, hexadecimal, of the one who gets the values; empty: all do."""
    adopted: bool = False
    """Whether `fold` is of a part of this very log that was lost, as where its database was put
    back from an older copy: it takes the place of what the log has instead."""


@dataclass(frozen=True, slots=True)
class Joined:
    """The declared reporter is known from here on."""

    kind: ClassVar[str] = "joined"
    attempt: int
    incarnation: str
    rank: int | None = None
    """Which of several reporters; None: the only one."""


@dataclass(frozen=True, slots=True)
class Reported:
    """Losses, in order of progress."""

    kind: ClassVar[str] = "reported"
    attempt: int
    incarnation: str
    reports: tuple[Report, ...]
    rank: int | None = None
    """Which of several reporters; None: the only one."""


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
class Permitted:
    """The holder may go on alone with values that it was offered."""

    kind: ClassVar[str] = "permitted"
    attempt: int
    begin: int
    """The horizon: values below it were fixed."""
    end: int
    """First progress that it may not use alone."""


@dataclass(frozen=True, slots=True)
class Declared:
    """What the holder used alone: facts from here on."""

    kind: ClassVar[str] = "declared"
    attempt: int
    blocks: tuple[Block, ...]
    """In order of progress."""
    offer: int
    """Sequence number of the permit up to which the values knew the log."""


@dataclass(frozen=True, slots=True)
class Waived:
    """The missing losses below `until` are final as absent: blocked ranks waited too long."""

    kind: ClassVar[str] = "waived"
    attempt: int
    until: int
    counted: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """(progress, ranks) where enough of several reporters were there: their mean is the loss."""


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
    author: str = ""
    reason: str = ""
    """Who and why, of an operator."""


@dataclass(frozen=True, slots=True)
class Adjusted:
    """An operator changed the plan, or approved an advice."""

    kind: ClassVar[str] = "adjusted"
    change: Mapping[str, Any]
    """What `change_to_mapping` wrote, with everything resolved."""
    effective: int
    author: str
    request_id: str
    advice: str = ""
    """Id of the advice that was approved; empty: none."""


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """What became of a directive."""

    kind: ClassVar[str] = "acknowledged"
    attempt: int
    directive: str
    """Id of the adjustment."""
    outcome: str
    """`done`, `failed` or `unhandled`."""
    progress: int
    rank: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Forgot:
    """A client holds what this log has not, though the log gave it: nothing more comes of its
    attempt."""

    kind: ClassVar[str] = "forgot"
    attempt: int
    """The client's; above the log's where that has forgotten the attempt itself. The log's own goes
    on then: it lost nothing that is known."""
    rank: int
    what: str
    """`attempt`, `values`, `losses` or `offer`."""
    progress: int
    """Last progress of the values, or up to where losses were final, or its own were taken; of an
    attempt or an offer, as far as the client knew that they were final."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The run is over."""

    kind: ClassVar[str] = "finished"
    request_id: str


@dataclass(frozen=True, slots=True)
class Imported:
    """The log up to here was written by another server, which may go on with it: the attempts in
    it have ended here."""

    kind: ClassVar[str] = "imported"
    origin: str
    """Release and machine that exported it, for people."""
    exported_at_ns: int
    """When, in Unix nanoseconds by the clock of that machine. For people."""
    request_id: str
    author: str = ""
    reason: str = ""


Event: TypeAlias = (
    Created
    | Attached
    | Opened
    | Joined
    | Reported
    | Recorded
    | Permitted
    | Declared
    | Waived
    | Revised
    | Adjusted
    | Acknowledged
    | Forgot
    | Finished
    | Imported
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
        Permitted,
        Declared,
        Waived,
        Revised,
        Adjusted,
        Acknowledged,
        Forgot,
        Finished,
        Imported,
    )
}


def encode(event: Event) -> bytes:
    """Return the event as canonical bytes."""
    data: dict[str, Any] = {
        item.name: value
        for item in fields(event)
        if (value := getattr(event, item.name)) != item.default
    }
    if isinstance(event, Reported):
        data["reports"] = [report_to_list(report) for report in event.reports]
    elif isinstance(event, Declared):
        data["blocks"] = [block.to_mapping() for block in event.blocks]
    return _canonical.to_bytes({"kind": event.kind, **data})


def decode(data: bytes) -> Event:
    """Return the event that `encode` wrote. Raises ValueError for an unknown kind."""
    content = _canonical.from_bytes(data)
    kind = content.pop("kind")
    if kind not in _KINDS:
        known = ", ".join(sorted(_KINDS))
        raise ValueError(f"event kind: got {kind!r}; this release knows {known}")
    if kind == Reported.kind:
        content["reports"] = tuple(report_from_list(item) for item in content["reports"])
    elif kind == Recorded.kind:
        content["learning_rates"] = tuple(float(item) for item in content["learning_rates"])
        if content["weight_decays"] is not None:
            content["weight_decays"] = tuple(float(item) for item in content["weight_decays"])
    elif kind == Declared.kind:
        content["blocks"] = tuple(Block.from_mapping(item) for item in content["blocks"])
    elif kind == Opened.kind:
        content["reporters"] = tuple(content.get("reporters", ()))
        content["factor"] = float(content.get("factor", 1.0))
    elif kind == Waived.kind:
        counted = content.get("counted", ())
        content["counted"] = tuple((at, tuple(ranks)) for at, ranks in counted)
    event: Event = _KINDS[kind](**content)
    return event


_METRICS = ("skipped", "tries", "validation", "gradient_norm", "batch")


def report_to_list(report: Report) -> list[Any]:
    """Return a report as plain data; most have nothing beside the first four."""
    plain: list[Any] = [report.progress, report.loss, report.weight, report.moves_to]
    more = {name: value for name in _METRICS if (value := getattr(report, name))}
    if report.gradient_norm is not None:
        more["gradient_norm"] = report.gradient_norm
    return [*plain, more] if more else plain


def report_from_list(data: Sequence[Any]) -> Report:
    """Return the report that `report_to_list` wrote."""
    progress, loss, weight, moves_to, *rest = data
    more = dict(rest[0]) if rest else {}
    if "gradient_norm" in more:
        more["gradient_norm"] = float(more["gradient_norm"])
    if "validation" in more:
        more["validation"] = {name: float(value) for name, value in more["validation"].items()}
    loss = None if loss is None else float(loss)
    return Report(progress, loss, float(weight), moves_to, **more)
