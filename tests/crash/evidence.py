"""The evidence of a round in the form that the checker asks about: calls, and what the log says.

The story of a log is read event by event without the core's fold: attempts, horizons, records and
losses are kept here once more, so that the checker has a second opinion. Of the core it takes only
how an event is decoded and what a spec says.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import Any

from lrpilot import core
from lrpilot.server._store import LogRow
from tests.crash.history import Record, request_of, response_of

DEFINITE = frozenset(
    {
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "OUT_OF_RANGE",
        "FAILED_PRECONDITION",
        "ABORTED",
        "UNIMPLEMENTED",
    }
)
"""Statuses of a server that has evaluated a request and did nothing. After any other one nobody
knows what became of the request."""

Hex = tuple[tuple[str, ...], tuple[str, ...] | None]
"""LR and WD of every group at one progress, as `float.hex`; WD None: the run sets none."""


def bits(value: float | None) -> bytes | None:
    """Return what two losses must have in common to be the same; all NaNs are one."""
    if value is None:
        return None
    return b"nan" if isnan(value) else struct.pack("<d", value)


def report_of(item: Any) -> core.Report:
    """Return a report as it was sent."""
    return core.Report(
        progress=item.progress,
        loss=item.loss if item.HasField("loss") else None,
        weight=item.weight or 1.0,
        moves_to=item.moves_to,
        skipped=item.skipped,
        tries=getattr(item, "try"),
        validation=dict(item.validation_losses),
        gradient_norm=item.gradient_norm if item.HasField("gradient_norm") else None,
        batch=item.batch or None,
    )


def bare(report: core.Report) -> core.Report:
    """Return of a report only that the reporter moves on."""
    return core.Report(report.progress, None, 1.0, report.moves_to)


def is_bare(report: core.Report) -> bool:
    """Return whether a report says only that the reporter moves on."""
    return not report.has_metrics and not report.skipped


def content(report: core.Report) -> tuple[Any, ...]:
    """Return what two reports must have in common to be the same."""
    return (
        report.progress,
        report.moves_to,
        report.skipped,
        report.tries,
        bits(report.loss),
        bits(report.weight),
        tuple(sorted((name, bits(value)) for name, value in report.validation.items())),
        bits(report.gradient_norm),
        report.batch,
    )


def shown(report: core.Report) -> str:
    """Return what a report says of its step as violations show it."""
    said = {"loss": report.loss, **report.validation, "gradient norm": report.gradient_norm}
    values = [f"{name} {value.hex()}" for name, value in said.items() if value is not None]
    if report.batch is not None:
        values.append(f"batch {report.batch}")
    kind = "skipped update" if report.skipped else "step"
    return f"a {kind} with {', '.join(values) or 'no loss'}"


@dataclass(frozen=True)
class Call:
    """One call of one process."""

    who: str
    method: str
    server: str
    sent_ns: int
    request: Any
    records: tuple[Record, ...]
    """The call, and its answer or error where there is one."""
    ended_ns: int | None = None
    """When its answer or error came; None: neither did."""
    response: Any = None
    """None: nobody knows what became of it, unless it was refused."""
    refused: bool = False
    """Whether the server said that it did not do it."""

    @property
    def run(self) -> str:
        """Name of the run, or empty where the request names none."""
        return str(getattr(self.request, "run", ""))

    @property
    def attempt(self) -> int:
        """Number of the attempt that the request is of; 0: of none."""
        return int(self.request.attempt.number) if hasattr(self.request, "attempt") else 0


def calls_of(history: Sequence[Record]) -> list[Call]:
    """Return the calls of one process in the order in which they were sent."""
    ends = {item["call"]: item for item in history if item["what"] in {"answer", "error"}}
    calls = []
    for record in history:
        if record["what"] != "call":
            continue
        end = ends.get(record["call"])
        calls.append(
            Call(
                who=record["who"],
                method=record["method"],
                server=record["server"],
                sent_ns=record["t"],
                request=request_of(record),
                records=(record,) if end is None else (record, end),
                ended_ns=None if end is None else end["t"],
                response=response_of(record, end) if end and end["what"] == "answer" else None,
                refused=end is not None and end.get("code") in DEFINITE,
            )
        )
    return calls


def hex_of(values: tuple[Sequence[float], Sequence[float] | None]) -> Hex:
    rates, decays = values
    return (
        tuple(value.hex() for value in rates),
        None if decays is None else tuple(value.hex() for value in decays),
    )


def values_of(
    begin: int,
    stride: int,
    groups: int,
    learning_rates: Sequence[float],
    weight_decays: Sequence[float] | None,
) -> Iterator[tuple[int, Hex]]:
    """Yield progress and values of each step of a block."""
    rates = [value.hex() for value in learning_rates]
    decays = [value.hex() for value in weight_decays or ()]
    for step in range(len(rates) // groups):
        part = slice(step * groups, (step + 1) * groups)
        yield begin + step * stride, (tuple(rates[part]), tuple(decays[part]) if decays else None)


@dataclass(frozen=True)
class LoggedReport:
    """One report as it stands in the log."""

    seq: int
    rank: int
    incarnation: str
    report: core.Report
    late: bool
    """Whether its step was final when it came."""

    @property
    def key(self) -> tuple[int, int, int, bool]:
        """What may come once in an attempt."""
        report = self.report
        return self.rank, report.progress, report.tries, report.skipped


@dataclass
class Attempt:
    """One attempt as the log tells it."""

    opened: core.Opened
    seq: int
    """Of the event that opened it."""
    delay: int
    has_feedback: bool
    groups: int
    frontier: int = 0
    in_use: int = 0
    positions: dict[int, int] = field(default_factory=dict)
    values: dict[int, Hex] = field(default_factory=dict)
    """Progress to the values that are fixed: recorded, declared or inherited."""
    inherited: frozenset[int] = frozenset()
    """Progress whose values were fixed in an earlier attempt, perhaps by a declaration."""
    once: dict[int, set[Hex]] = field(default_factory=dict)
    """Progress to all values that were ever recorded: a declaration undoes records."""
    reports: list[LoggedReport] = field(default_factory=list)
    passed_over: int = 0
    """Losses below it may have been made late after they had come, by a waiver or declaration."""
    permitted: int = 0
    declared: int = 0
    """What lies below it may have been declared already."""

    @property
    def number(self) -> int:
        return self.opened.attempt

    @property
    def is_led(self) -> bool:
        """Whether it is in leader mode."""
        return bool(self.opened.holder)

    @property
    def reporters(self) -> tuple[int, ...]:
        return self.opened.reporters or (self.opened.reporter,)

    @property
    def horizon(self) -> int:
        """First progress whose values are not fixed."""
        if self.has_feedback:
            return self.frontier + self.delay
        return max(self.opened.begin, self.in_use) + self.delay


@dataclass
class Complaint:
    """Something in a log that must not be there; see the checker for the kinds."""

    kind: str
    text: str
    seqs: tuple[int, ...]


class Story:
    """What the log of one run tells."""

    def __init__(self, run: str, rows: Sequence[LogRow]) -> None:
        self.run = run
        self.rows = rows
        self.events: list[core.Event] = []
        self.attempts: dict[int, Attempt] = {}
        self.requests: dict[str, list[tuple[int, core.Event]]] = {}
        """Request id to the events that it brought, with their seq."""
        self.complaints: list[Complaint] = []
        self._spec: core.RunSpec | None = None
        self._pending: core.RunSpec | None = None
        self._attempt: Attempt | None = None
        self._horizon = 0
        for row in rows:
            event = core.decode(row.payload)
            self.events.append(event)
            self._tell(row.seq, event)

    @property
    def is_undisturbed(self) -> bool:
        """Whether losses alone decided: no waiver, no declaration, no operator, no foreign past."""
        return not any(
            isinstance(item, core.Waived | core.Declared | core.Adjusted | core.Revised)
            or (isinstance(item, core.Opened) and (item.fold is not None or item.directive))
            for item in self.events
        )

    def _complain(self, kind: str, text: str, *seqs: int) -> None:
        self.complaints.append(Complaint(kind, f"run {self.run!r}: {text}", seqs))

    def _tell(self, seq: int, event: core.Event) -> None:
        request_id = getattr(event, "request_id", "")
        if request_id:
            self.requests.setdefault(request_id, []).append((seq, event))
        if isinstance(event, core.Forgot):
            # Of an attempt above the current one where the log has forgotten the attempt itself.
            self._complain(
                "accused",
                f"event {seq} says for rank {event.rank} that the log has forgotten "
                f"{event.what} of attempt {event.attempt}, up to progress {event.progress}",
                seq,
            )
            return
        number = getattr(event, "attempt", None)
        if isinstance(event, core.Opened):
            self._open(seq, event)
            return
        if number is not None and (self._attempt is None or number != self._attempt.number):
            current = 0 if self._attempt is None else self._attempt.number
            self._complain(
                "superseded",
                f"the {event.kind} event {seq} is of attempt {number}, while attempt {current} "
                "is the current one",
                seq,
            )
            return
        match event:
            case core.Created():
                self._spec = core.parse_spec(event.spec)
            case core.Revised():
                self._revise(seq, event)
            case core.Adjusted():
                self._check_effective(seq, event.effective)
            case core.Reported():
                self._report(seq, event)
            case core.Recorded():
                self._record(seq, event)
            case core.Waived():
                self._waive(seq, event)
            case core.Permitted():
                self._permit(seq, event)
            case core.Declared():
                self._declare(seq, event)
        self._horizon = self._attempt.horizon if self._attempt else 0

    def _open(self, seq: int, event: core.Opened) -> None:
        before = self._attempt
        # A restored run goes on with the number that its state gives.
        expected = event.attempt if before is None else before.number + 1
        if event.attempt != expected:
            self._complain(
                "superseded", f"attempt {event.attempt} opens where {expected} comes next", seq
            )
        has_new_spec = self._pending is not None
        if self._pending is not None:
            self._spec, self._pending = self._pending, None
        assert self._spec is not None, "an attempt of a run that was not created"
        spec = self._spec
        attempt = Attempt(event, seq, spec.delay, spec.has_feedback, len(spec.group_names))
        attempt.frontier = attempt.in_use = event.begin
        if event.fold is not None:
            blocks = [] if has_new_spec or event.directive else event.fold["records"]
            for block in blocks:
                rates = [float(item) for item in block["learning_rates"]]
                decays = block["weight_decays"] and [float(x) for x in block["weight_decays"]]
                for at, values in values_of(
                    block["begin"], block["stride"], block["groups"], rates, decays
                ):
                    if at < event.begin + attempt.delay:
                        attempt.values[at] = values
        elif before is not None and not has_new_spec and not event.directive:
            inherited = range(event.begin, event.begin + attempt.delay)
            attempt.values = {at: before.values[at] for at in inherited if at in before.values}
        attempt.inherited = frozenset(attempt.values)
        attempt.once = {at: {values} for at, values in attempt.values.items()}
        self.attempts[event.attempt] = self._attempt = attempt
        self._horizon = attempt.horizon

    def _revise(self, seq: int, event: core.Revised) -> None:
        if event.effective is None:
            self._pending = core.parse_spec(event.spec)
            return
        self._spec = core.parse_spec(event.spec)
        if self._attempt is not None:
            self._check_effective(seq, event.effective)

    def _check_effective(self, seq: int, effective: int) -> None:
        if effective < self._horizon:
            self._complain(
                "beyond the horizon",
                f"event {seq} changes the plan from progress {effective} on, below the horizon, "
                f"{self._horizon}: values there were fixed",
                seq,
            )

    def _report(self, seq: int, event: core.Reported) -> None:
        attempt = self._attempt
        assert attempt is not None
        rank = attempt.reporters[0] if event.rank is None else event.rank
        for report in event.reports:
            position = attempt.positions.get(rank, attempt.opened.begin)
            late = report.progress < max(attempt.frontier, position)
            attempt.reports.append(LoggedReport(seq, rank, event.incarnation, report, late))
            attempt.positions[rank] = max(position, report.moves_to)
            together = min(
                attempt.positions.get(item, attempt.opened.begin) for item in attempt.reporters
            )
            attempt.frontier = max(attempt.frontier, together)

    def _record(self, seq: int, event: core.Recorded) -> None:
        attempt = self._attempt
        assert attempt is not None
        if event.in_use < attempt.in_use:
            self._complain(
                "horizon",
                f"attempt {event.attempt}: event {seq} moves the progress in use from "
                f"{attempt.in_use} back to {event.in_use}",
                seq,
            )
        attempt.in_use = max(attempt.in_use, event.in_use)
        for at, values in values_of(
            event.begin, event.stride, attempt.groups, event.learning_rates, event.weight_decays
        ):
            if at >= attempt.horizon:
                self._complain(
                    "beyond the horizon",
                    f"attempt {event.attempt}, progress {at}: event {seq} fixes {values}, and "
                    f"the horizon is {attempt.horizon}",
                    seq,
                )
            self._fix(seq, attempt, at, values)

    def _fix(self, seq: int, attempt: Attempt, at: int, values: Hex) -> None:
        known = attempt.values.setdefault(at, values)
        attempt.once.setdefault(at, set()).add(values)
        if known != values:
            self._complain(
                "one value",
                f"attempt {attempt.number}, progress {at}: event {seq} fixes {values}, and "
                f"{known} was fixed before",
                seq,
            )

    def _waive(self, seq: int, event: core.Waived) -> None:
        attempt = self._attempt
        assert attempt is not None
        if event.until <= attempt.frontier:
            self._complain(
                "horizon",
                f"attempt {event.attempt}: the waiver {seq} goes up to {event.until}, and losses "
                f"below {attempt.frontier} were final: the horizon would move back",
                seq,
            )
        attempt.frontier = max(attempt.frontier, event.until)
        attempt.passed_over = max(attempt.passed_over, event.until)

    def _permit(self, seq: int, event: core.Permitted) -> None:
        attempt = self._attempt
        assert attempt is not None
        if event.end < attempt.permitted or event.begin != attempt.horizon:
            self._complain(
                "horizon",
                f"attempt {event.attempt}: the permit {seq} is [{event.begin}, {event.end}); the "
                f"horizon is {attempt.horizon}, and up to {attempt.permitted} was permitted",
                seq,
            )
        attempt.permitted = max(attempt.permitted, event.end)

    def _declare(self, seq: int, event: core.Declared) -> None:
        attempt = self._attempt
        assert attempt is not None
        begin, end = event.blocks[0].begin, event.blocks[-1].last + 1
        if end > attempt.permitted:
            self._complain(
                "beyond the horizon",
                f"attempt {event.attempt}: the declaration {seq} goes up to {end}, and up to "
                f"{attempt.permitted} was permitted",
                seq,
            )
        if begin < attempt.declared:
            self._complain(
                "request repeated",
                f"attempt {event.attempt}: the declaration {seq} begins at {begin}, and what lies "
                f"below {attempt.declared} was declared before",
                seq,
            )
        attempt.declared = max(attempt.declared, end)
        # What was recorded there never arrived; else it would not be declared.
        attempt.values = {at: item for at, item in attempt.values.items() if at < begin}
        for block in event.blocks:
            for at, values in values_of(
                block.begin, block.stride, block.groups, block.learning_rates, block.weight_decays
            ):
                self._fix(seq, attempt, at, values)
        attempt.in_use = max(attempt.in_use, end - 1)
        if attempt.has_feedback:
            attempt.frontier = max(attempt.frontier, end - attempt.delay)
            attempt.passed_over = max(attempt.passed_over, end - attempt.delay)


def records_of(histories: Iterable[Sequence[Record]], what: str) -> list[Record]:
    """Return the records of one kind of all processes in order of time."""
    found = (item for history in histories for item in history if item["what"] == what)
    return sorted(found, key=lambda item: int(item["t"]))


def used_values(record: Mapping[str, Any]) -> Hex:
    """Return the values of a `used` record."""
    decays = record["weight_decays"]
    return tuple(record["learning_rates"]), None if decays is None else tuple(decays)
