"""Proves the promise from what the processes of a round saw and from the log alone.

`check` knows nothing of how the round went: faults, timing and which process met which server are
all in the histories. Each kind of violation stands in `KINDS` with what is checked.
"""

import hashlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from lrpilot import core
from lrpilot.server._store import LogRow
from lrpilot.v1 import trainer_pb2
from tests.crash.evidence import (
    Attempt,
    Call,
    Hex,
    LoggedReport,
    Story,
    bare,
    bits,
    calls_of,
    content,
    hex_of,
    is_bare,
    records_of,
    report_of,
    shown,
    used_values,
    values_of,
)
from tests.crash.history import Record
from tests.crash.second_opinion import Evaluation

KINDS = {
    "one value": "One value per (run, attempt, progress, group), bit for bit, in every answer of "
    "GetValues, every step that used it, and every record and declaration of the log",
    "not recorded": "No value is handed out or used that the log does not hold",
    "horizon": "The horizon never moves back, in the log and in what a client sees of a server",
    "beyond the horizon": "Nothing is fixed or handed out at or beyond the horizon, and no change "
    "lands below it",
    "log": "The log is dense, and its hash chain right",
    "steps": "A rank uses every progress of its attempt in order, none left out",
    "loss lost": "Every acknowledged loss, validation loss and skipped update is in the log with "
    "its bits",
    "loss outcome": "A loss was acknowledged as what the log has it as: recorded, repeated or late",
    "loss repeated": "A loss is in the log once, however often it was sent",
    "loss from nowhere": "The log says nothing of a step that was refused or never sent so",
    "request lost": "Every acknowledged request of an operator or trainer is in the log, as it was "
    "answered",
    "request repeated": "A request id brings what it asked for once",
    "request from nowhere": "The log holds nothing that was refused or never asked for",
    "superseded": "Once a new attempt is open, nothing more is fixed in an older one",
    "accused": "Nobody says of a log that it has forgotten something: no round puts a copy back",
    "state": "A saved state names a place of this log",
    "replay": "A fold of the log gives the values that were handed out, from the records and "
    "computed anew from the plan",
    "n + D": "What the loss at n decides shows at the first used progress from n + D on, as an "
    "evaluation without the core has it",
    "simulation": "Without waivers and operators, the values are those that the simulator gives "
    "for the same losses",
}
"""Kinds of violations, and what holds where there is none."""


@dataclass(frozen=True)
class Violation:
    """One thing that must not be."""

    kind: str
    """One of KINDS."""
    text: str
    """Run, attempt, progress, process and values, floats in hexadecimal."""
    records: tuple[Any, ...] = ()
    """What shows it: records of histories, and rows of the log."""

    def __str__(self) -> str:
        lines = "".join(f"\n    {record}" for record in self.records)
        return f"{self.kind}: {self.text}{lines}"


def check(
    histories: Sequence[Sequence[Record]], logs: Mapping[str, Sequence[LogRow]]
) -> list[Violation]:
    """Return everything that breaks the promise; empty: it held.

    `histories`: one per process, see `history`. `logs`: each run's rows as the store has them at
    the end, when everybody is done.
    """
    calls = sorted(
        (call for history in histories for call in calls_of(history)), key=lambda call: call.sent_ns
    )
    used = records_of(histories, "used")
    violations: list[Violation] = []
    for run in sorted({*logs, *(call.run for call in calls if call.run)}):
        violations += _Round(
            run,
            list(logs.get(run, ())),
            [call for call in calls if call.run == run or _creates(call, run)],
            [record for record in used if record["run"] == run],
        ).check()
    return violations


def _creates(call: Call, run: str) -> bool:
    return call.method == "CreateRun" and run in call.request.spec_document


@dataclass
class _Round:
    """The evidence of one run."""

    run: str
    rows: list[LogRow]
    calls: list[Call]
    used: list[Record]
    violations: list[Violation] = field(default_factory=list)

    def check(self) -> list[Violation]:
        if not self._log_is_whole():
            # Nothing else can be asked of it.
            return self.violations
        self.story = Story(self.run, self.rows)
        for complaint in self.story.complaints:
            rows = (row for row in self.rows if row.seq in complaint.seqs)
            self.violations.append(Violation(complaint.kind, complaint.text, tuple(rows)))
        self._values()
        self._horizons()
        self._ahead_of_losses()
        self._steps()
        self._losses()
        self._requests()
        self._superseded()
        self._states()
        self._replay()
        self._recompute()
        self._simulate()
        return self.violations

    def _add(self, kind: str, text: str, *records: Any) -> None:
        self.violations.append(Violation(kind, f"run {self.run!r}: {text}", records))

    def _answered(self, *methods: str) -> Iterator[Call]:
        return (call for call in self.calls if call.method in methods and call.response is not None)

    # The log.

    def _log_is_whole(self) -> bool:
        digest = "0" * 64
        for expected, row in enumerate(self.rows, 1):
            digest = hashlib.sha256(digest.encode("ascii") + row.payload).hexdigest()
            if row.seq != expected:
                self._add("log", f"seq {row.seq} stands where {expected} comes next", row)
                return False
            if row.digest != digest:
                self._add("log", f"seq {row.seq}: its content gives digest {digest}", row)
                return False
        return True

    # Values.

    def _values(self) -> None:
        """One value, the recorded one."""
        offered = self._offered()
        first: dict[tuple[int, int], tuple[Hex, tuple[Any, ...]]] = {}
        for number, at, values, records, is_use in self._handed_out():
            attempt = self.story.attempts.get(number)
            where = f"attempt {number}, progress {at}, {records[0]['who']}"
            if attempt is None:
                self._add("not recorded", f"{where}: the log has no such attempt", *records)
                continue
            # The holder passes over what it gets too late: then it declares what it used.
            if is_use or not attempt.is_led:
                known, shown_by = first.setdefault((number, at), (values, records))
                if known != values:
                    text = f"{where}: {values}, and {known} before"
                    self._add("one value", text, *shown_by, *records)
                    continue
            fixed = attempt.values.get(at)
            if fixed is None and attempt.is_led and is_use:
                # What a holder used alone and never declared is known to nobody.
                if at >= attempt.permitted:
                    self._add("not recorded", f"{where}: it used {values}", *records)
            elif attempt.is_led and not is_use:
                if values not in attempt.once.get(at, ()):
                    self._add("not recorded", f"{where}: it got {values}", *records)
            elif fixed is None:
                self._add("not recorded", f"{where}: it has {values}", *records)
            elif fixed != values and not (
                # It went on with what it was offered, and ended before it could declare that.
                is_use and at >= attempt.declared and values in offered.get((number, at), ())
            ):
                self._add("one value", f"{where}: {values}, and the log has {fixed}", *records)

    def _offered(self) -> dict[tuple[int, int], set[Hex]]:
        """Return attempt and progress to the values that a holder was offered for it."""
        offered: dict[tuple[int, int], set[Hex]] = defaultdict(set)
        for call in self._answered("OfferValues"):
            block, attempt = call.response.block, self.story.attempts.get(call.attempt)
            if attempt is not None:
                for at, values in values_of(
                    block.begin,
                    block.stride,
                    attempt.groups,
                    block.learning_rates,
                    block.weight_decays,
                ):
                    offered[call.attempt, at].add(values)
        return offered

    def _handed_out(self) -> Iterator[tuple[int, int, Hex, tuple[Record, ...], bool]]:
        """Yield attempt, progress, values, what shows it, and whether a step used it."""
        for call in self._answered("GetValues"):
            if not call.response.HasField("block"):
                continue
            block, attempt = call.response.block, self.story.attempts.get(call.attempt)
            groups = attempt.groups if attempt else 1
            for at, values in values_of(
                block.begin, block.stride, groups, block.learning_rates, block.weight_decays
            ):
                yield call.attempt, at, values, call.records, False
        for record in self.used:
            yield record["attempt"], record["progress"], used_values(record), (record,), True

    def _horizons(self) -> None:
        """What clients see of a server never moves back."""
        seen: dict[tuple[str, str, int], list[tuple[Call, int]]] = defaultdict(list)
        for call in self._answered("GetValues", "ReportLosses", "DeclareValues", "OpenAttempt"):
            number = call.attempt or call.response.attempt.number
            # Of several servers behind one address, one may lag.
            if "," not in call.server:
                key = call.who, call.server, number
                seen[key].append((call, call.response.horizon))
            attempt = self.story.attempts.get(number)
            if attempt is not None and call.response.horizon > attempt.horizon:
                self._add(
                    "beyond the horizon",
                    f"attempt {number}, {call.who}: {call.server} says horizon "
                    f"{call.response.horizon}, and the log only comes to {attempt.horizon}",
                    *call.records,
                )
            if call.method == "GetValues" and call.response.HasField("block") and attempt:
                block = call.response.block
                steps = len(block.learning_rates) // attempt.groups
                last = block.begin + (steps - 1) * block.stride
                if last >= call.response.horizon:
                    self._add(
                        "beyond the horizon",
                        f"attempt {number}, progress {last}, {call.who}: handed out with horizon "
                        f"{call.response.horizon}",
                        *call.records,
                    )
        for (who, server, number), answers in seen.items():
            ended = sorted(answers, key=lambda item: item[0].ended_ns or 0)
            times = [call.ended_ns or 0 for call, _ in ended]
            greatest = list(accumulate(ended, _further))
            for call, horizon in answers:
                before = bisect_right(times, call.sent_ns - 1)
                if before and greatest[before - 1][1] > horizon:
                    other, was = greatest[before - 1]
                    self._add(
                        "horizon",
                        f"attempt {number}, {who}: {server} says horizon {horizon} after it "
                        f"said {was}",
                        *other.records,
                        *call.records,
                    )

    def _ahead_of_losses(self) -> None:
        """No value is answered before the losses that fix it were even sent.

        Only the histories are asked, so that a log that was written too early shows, too.
        """
        moved: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        in_use: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for call in self.calls:
            if call.method == "ReportLosses" and not call.refused and call.request.reports:
                to = max(report.moves_to for report in call.request.reports)
                moved[call.attempt, call.request.rank].append((call.sent_ns, to))
            elif call.method == "GetValues" and not call.refused:
                in_use[call.attempt].append((call.sent_ns, call.request.in_use))
        for call in self._answered("GetValues"):
            attempt = self.story.attempts.get(call.attempt)
            if attempt is None or attempt.is_led or not call.response.HasField("block"):
                continue
            if attempt.has_feedback and attempt.passed_over:
                continue
            end_ns = call.ended_ns or 0
            begin = attempt.opened.begin
            if attempt.has_feedback:
                frontier = min(
                    _greatest(moved[call.attempt, rank], end_ns, begin)
                    for rank in attempt.reporters
                )
            else:
                frontier = _greatest(in_use[call.attempt], end_ns, begin)
            block = call.response.block
            last = block.begin + (len(block.learning_rates) // attempt.groups - 1) * block.stride
            if last >= frontier + attempt.delay:
                self._add(
                    "beyond the horizon",
                    f"attempt {call.attempt}, progress {last}, {call.who}: answered when nobody "
                    f"had sent what makes more final than {frontier}",
                    *call.records,
                )

    # Steps.

    def _steps(self) -> None:
        strides: dict[tuple[str, int], set[int]] = defaultdict(set)
        following: dict[tuple[int, int], int] = {}
        for call in self.calls:
            if call.method == "GetValues":
                strides[call.who, call.attempt].add(call.request.stride)
            elif call.method == "ReportLosses" and not call.refused:
                for report in call.request.reports:
                    if not report.skipped:
                        following.setdefault((call.attempt, report.progress), report.moves_to)
        last: dict[tuple[str, int], Record] = {}
        for record in self.used:
            who, number, at = record["who"], record["attempt"], record["progress"]
            before = last.get((who, number))
            last[who, number] = record
            attempt = self.story.attempts.get(number)
            if attempt is None:
                continue
            if before is None:
                expected = attempt.opened.begin
            elif at == before["progress"]:
                # A skipped update: the same step comes again.
                continue
            else:
                # Ranks step alike: what one of them did or said tells of all.
                was, asked = before["progress"], strides[who, number]
                step = was + min(asked) if len(asked) == 1 else at
                expected = following.setdefault((number, was), step)
            if at != expected:
                self._add(
                    "steps",
                    f"attempt {number}, {who}: used progress {at}, and {expected} comes next",
                    *(() if before is None else (before,)),
                    record,
                )

    # Losses.

    def _losses(self) -> None:
        sources: set[Any] = set()
        for call in self.calls:
            if call.method == "ReportLosses" and not call.refused:
                for item in call.request.reports:
                    sources |= set(_marks(call, report_of(item)))
        for attempt in self.story.attempts.values():
            by_key: dict[tuple[int, int, int, bool], list[LoggedReport]] = defaultdict(list)
            for logged in attempt.reports:
                if not is_bare(logged.report):
                    by_key[logged.key].append(logged)
                self._check_source(attempt, logged, sources)
            for logs in by_key.values():
                if len(logs) == 2 and logs[0].report.loss is None and logs[1].late:
                    # Something else was known of the step in its time; its loss came late.
                    continue
                if len(logs) > 1:
                    one = logs[0].report
                    seqs = ", ".join(str(item.seq) for item in logs)
                    losses = ", ".join(shown(item.report) for item in logs)
                    self._add(
                        "loss repeated",
                        f"attempt {attempt.number}, progress {one.progress}, rank {logs[0].rank}: "
                        f"the log has it {len(logs)} times (seq {seqs}): {losses}",
                        *(self.rows[item.seq - 1] for item in logs),
                    )
            for call in self._answered("ReportLosses"):
                if call.attempt == attempt.number:
                    self._check_outcomes(attempt, call, by_key)
        for call in self._answered("ReportLosses"):
            if call.attempt not in self.story.attempts:
                text = f"attempt {call.attempt}, {call.who}: acknowledged in no attempt of the log"
                self._add("loss lost", text, *call.records)

    def _check_source(self, attempt: Attempt, logged: LoggedReport, sources: set[Any]) -> None:
        report = logged.report
        mark = (attempt.number, logged.rank, logged.incarnation, logged.late, content(report))
        if mark not in sources:
            self._add(
                "loss from nowhere",
                f"attempt {attempt.number}, progress {report.progress}, rank {logged.rank}: the "
                f"log has {shown(report)}, moving to {report.moves_to}, which nobody sent so or "
                "which was refused",
                self.rows[logged.seq - 1],
            )

    def _check_outcomes(
        self, attempt: Attempt, call: Call, by_key: Mapping[Any, Sequence[LoggedReport]]
    ) -> None:
        rank = call.request.rank
        if len(call.response.outcomes) != len(call.request.reports):
            self._add("loss outcome", f"{call.who}: an outcome for each report", *call.records)
        for item, outcome in zip(call.request.reports, call.response.outcomes, strict=False):
            name = trainer_pb2.ReportOutcome.Name(outcome).removeprefix("REPORT_OUTCOME_")
            sent = report_of(item)
            passed = max(attempt.positions.get(rank, attempt.opened.begin), attempt.frontier)
            # The update is one for all: the first reporter speaks for the others.
            if is_bare(sent) or (sent.skipped and rank != attempt.reporters[0]):
                if passed < sent.moves_to:
                    self._lost(call, sent, name, "the log does not say that it moved on")
                continue
            keys = {(rank, sent.progress, sent.tries, sent.skipped)}
            if not sent.skipped:
                # Late, and received after its step was final: it counts without its try.
                keys.add((rank, sent.progress, 0, False))
            logs = [logged for key in keys for logged in by_key.get(key, ())]
            if name == "RECORDED":
                same = [logged for logged in logs if content(logged.report) == content(sent)]
            else:
                same = [logged for logged in logs if bits(logged.report.loss) == bits(sent.loss)]
            # Of a step that is final nothing but a late loss is kept.
            may_be_dropped = name == "REPEATED" and (sent.skipped or sent.loss is None)
            if not same and may_be_dropped and sent.progress < passed:
                if passed < sent.moves_to:
                    self._lost(call, sent, name, "the log does not say that it moved on")
            elif not same:
                there = ", ".join(shown(logged.report) for logged in logs) or "nothing"
                self._lost(call, sent, name, f"the log has {there}")
            elif name == "LATE":
                was_dropped = sent.progress < attempt.passed_over
                if not any(logged.late for logged in same) and not was_dropped:
                    self._lost(call, sent, name, "its step was not final", kind="loss outcome")
            elif all(logged.late for logged in same):
                self._lost(call, sent, name, "it came late", kind="loss outcome")

    def _lost(
        self, call: Call, sent: core.Report, name: str, why: str, kind: str = "loss lost"
    ) -> None:
        self._add(
            kind,
            f"attempt {call.attempt}, progress {sent.progress}, {call.who}: {shown(sent)} was "
            f"acknowledged as {name}, and {why}",
            *call.records,
        )

    # Requests with an id.

    def _requests(self) -> None:
        sent: dict[str, list[Call]] = defaultdict(list)
        for call in self.calls:
            if getattr(call.request, "request_id", "") and not getattr(
                call.request, "dry_run", False
            ):
                sent[call.request.request_id].append(call)
        for request_id, events in self.story.requests.items():
            rows = [self.rows[seq - 1] for seq, _ in events]
            calls = sent.get(request_id.removesuffix("/create"), [])
            if all(call.refused for call in calls):
                self._add(
                    "request from nowhere",
                    f"the log has {events[0][1].kind} with request id {request_id!r}, which "
                    f"{'was refused' if calls else 'nobody sent'}",
                    *rows,
                    *(record for call in calls for record in call.records),
                )
            # An approval may take back what its policy did before: two events of one append.
            most = 2 if any(call.method == "ApproveAdvice" for call in calls) else 1
            if len(events) > most or events[-1][0] - events[0][0] >= most:
                seqs = ", ".join(str(seq) for seq, _ in events)
                text = f"request id {request_id!r} is in the log {len(events)} times (seq {seqs})"
                self._add("request repeated", text, *rows)
        for call in self._answered(*_CHECKS):
            if not getattr(call.request, "dry_run", False):
                self._check_answer(call)
        for call in self._answered("DeclareValues", "AcknowledgeDirective"):
            why = _undeclared(self.story, call) or _unacknowledged(self.story, call)
            if why:
                text = f"attempt {call.attempt}, {call.who}: {call.method} was answered, and "
                self._add("request lost", text + why, *call.records)

    def _check_answer(self, call: Call) -> None:
        request_id = call.request.request_id
        events = [event for _, event in self.story.requests.get(request_id, ())]
        why = _CHECKS[call.method](self.story, call, events)
        if why:
            text = f"{call.who}: {call.method} with request id {request_id!r} was answered, and "
            self._add("request lost", text + why, *call.records)

    # Attempts.

    def _superseded(self) -> None:
        opened_ns: dict[int, tuple[int, Call]] = {}
        for call in self._answered("OpenAttempt"):
            number, end_ns = call.response.attempt.number, call.ended_ns or 0
            if number not in opened_ns or end_ns < opened_ns[number][0]:
                opened_ns[number] = (end_ns, call)
        for call in self._answered(
            "ReportLosses", "SaveState", "DeclareValues", "OfferValues", "AcknowledgeDirective"
        ):
            for number, (end_ns, opening) in opened_ns.items():
                if number > call.attempt and end_ns < call.sent_ns:
                    self._add(
                        "superseded",
                        f"{call.who}: {call.method} of attempt {call.attempt} was answered after "
                        f"attempt {number} was open",
                        *opening.records,
                        *call.records,
                    )
                    break

    def _states(self) -> None:
        for call in self._answered("SaveState"):
            saved = core.read_state(call.response.state, self.run)
            there = self.rows[saved.seq - 1].digest if saved.seq <= len(self.rows) else "none"
            if there != saved.digest:
                self._add(
                    "state",
                    f"{call.who}: the state at progress {saved.progress} names seq {saved.seq} "
                    f"with digest {saved.digest}; the log has {there}",
                    *call.records,
                )

    # Computed anew.

    def _replay(self) -> None:
        state = core.RunState(self.run)
        for row, event in zip(self.rows, self.story.events, strict=True):
            if isinstance(event, core.Recorded):
                self._check_computed(row, event, state)
            try:
                state.apply(event, row.payload)
            except Exception as error:
                self._add("replay", f"event {row.seq} cannot be applied: {error!r}", row)
                return
        attempt = self.story.attempts.get(state.attempt)
        if attempt is None:
            return
        if (state.frontier, state.horizon) != (attempt.frontier, attempt.horizon):
            self._add(
                "replay",
                f"attempt {state.attempt}: the fold has frontier {state.frontier} and horizon "
                f"{state.horizon}, the events say {attempt.frontier} and {attempt.horizon}",
            )
        for at, values in sorted(attempt.values.items()):
            folded = state.records.at(at)
            if folded is None or hex_of(folded) != values:
                self._add(
                    "replay",
                    f"attempt {state.attempt}, progress {at}: the log has {values}, its fold "
                    f"{folded and hex_of(folded)}",
                )

    def _check_computed(self, row: LogRow, event: core.Recorded, state: core.RunState) -> None:
        groups = len(state.spec.group_names)
        for at, values in values_of(
            event.begin, event.stride, groups, event.learning_rates, event.weight_decays
        ):
            known = state.records.at(at)
            computed = hex_of(state.plan.values(at))
            # What a holder declared is a fact that no plan has, also where it is inherited.
            is_fact = (
                state.declared_values(at) is not None
                or at in self.story.attempts[event.attempt].inherited
            )
            if values != (hex_of(known) if known else computed) or (
                values != computed and not is_fact
            ):
                self._add(
                    "replay",
                    f"attempt {event.attempt}, progress {at}: event {row.seq} fixes {values}; "
                    f"recorded before: {known and hex_of(known)}, computed anew: {computed}",
                    row,
                )

    def _recompute(self) -> None:
        """Work the values out without the core's plan, policies and fold."""
        other = Evaluation(self.story)
        used: dict[tuple[int, int], Record] = {
            (record["attempt"], record["progress"]): record for record in self.used
        }
        for number, expected in other.attempts():
            attempt = self.story.attempts[number]
            for at, values in sorted(attempt.values.items()):
                if at in expected and values != expected[at]:
                    record = used.get((number, at))
                    self._add(
                        "n + D",
                        f"attempt {number}, progress {at}: {values} is fixed, and the losses up "
                        f"to {at - attempt.delay} lead to {expected[at]}",
                        *(() if record is None else (record,)),
                    )

    def _simulate(self) -> None:
        if not self.story.is_undisturbed or not self.story.attempts:
            return
        kept: list[core.Report] = []
        for number, attempt in sorted(self.story.attempts.items()):
            begin = attempt.opened.begin
            kept = [_ending_at(report, begin) for report in kept if report.progress < begin]
            if len(attempt.reporters) > 1 or attempt.is_led:
                return
            kept += [item.report for item in attempt.reports]
            spec = self._spec_of(attempt)
            for step in core.simulate(spec, kept):
                fixed = attempt.values.get(step.progress)
                simulated = hex_of((step.learning_rates, step.weight_decays))
                if fixed is not None and step.progress >= begin and fixed != simulated:
                    self._add(
                        "simulation",
                        f"attempt {number}, progress {step.progress}: {fixed} is fixed, and the "
                        f"simulator gives {simulated}",
                    )

    def _spec_of(self, attempt: Attempt) -> core.RunSpec:
        created = next(item for item in self.story.events if isinstance(item, core.Created))
        return core.parse_spec(created.spec)


def _further(a: tuple[Call, int], b: tuple[Call, int]) -> tuple[Call, int]:
    return b if b[1] > a[1] else a


def _greatest(moved: Sequence[tuple[int, int]], before_ns: int, least: int) -> int:
    return max((to for sent_ns, to in moved if sent_ns < before_ns), default=least)


def _marks(call: Call, sent: core.Report) -> Iterator[tuple[Any, ...]]:
    """Yield what the log may keep of a report, and whether only where its step was final."""
    mark = (call.attempt, call.request.rank, call.request.incarnation)
    moves = bare(sent)
    yield (*mark, False, content(sent))
    yield (*mark, True, content(moves))
    if sent.skipped:
        # Where another reporter speaks for this one.
        yield (*mark, False, content(moves))
    else:
        # A late loss is kept alone.
        yield (*mark, True, content(replace(moves, loss=sent.loss)))


def _ending_at(report: core.Report, begin: int) -> core.Report:
    """Return a report of an earlier attempt as one that opens at `begin` keeps it."""
    return replace(report, moves_to=min(report.moves_to, max(begin, report.progress)))


# What an acknowledged request must have left; each returns what is wrong, or nothing.


def _adjusted(story: Story, call: Call, events: Sequence[core.Event]) -> str:
    if getattr(call.response, "unchanged", False):
        return ""
    if not events:
        return "the log has nothing of it"
    for event in events:
        if not isinstance(event, core.Adjusted | core.Revised):
            return f"the log has {event.kind}"
        if event.effective != call.response.effective:
            return f"it takes effect at {event.effective}, not at {call.response.effective}"
        if event.author != call.request.author:
            return f"the log has author {event.author!r}, not {call.request.author!r}"
    return ""


def _finished(story: Story, call: Call, events: Sequence[core.Event]) -> str:
    is_finished = any(isinstance(event, core.Finished) for event in story.events)
    return "" if is_finished else "the log has no end"


def _created(story: Story, call: Call, events: Sequence[core.Event]) -> str:
    is_created = any(isinstance(event, core.Created) for event in events)
    return "" if is_created else "the log was not begun by it"


def _attached(story: Story, call: Call, events: Sequence[core.Event]) -> str:
    kinds = [event.kind for event in events]
    for is_said, kind in ((call.response.created, "created"), (call.response.revised, "revised")):
        if is_said != (kind in kinds):
            return f"it says {kind}={is_said}, the log has {kinds}"
    return "" if story.events else "the run is not there"


def _opened(story: Story, call: Call, events: Sequence[core.Event]) -> str:
    got = call.response.attempt
    attempt = story.attempts.get(got.number)
    if attempt is None or attempt.opened.token != got.token.hex():
        return f"the log has no attempt {got.number} with that token"
    if attempt.opened.begin != call.response.begin:
        return f"attempt {got.number} opened at {attempt.opened.begin}, not {call.response.begin}"
    if call.response.joined:
        is_own_key = call.request.key and call.request.key == attempt.opened.key
        return "" if is_own_key else f"it joined attempt {got.number}, which has another key"
    if attempt.opened.request_id != call.request.request_id:
        return f"attempt {got.number} was opened by {attempt.opened.request_id!r}"
    return ""


def _undeclared(story: Story, call: Call) -> str:
    attempt = story.attempts.get(call.attempt)
    if call.method != "DeclareValues" or attempt is None:
        return ""
    for block in call.request.blocks:
        for at, values in values_of(
            block.begin, block.stride, attempt.groups, block.learning_rates, block.weight_decays
        ):
            if attempt.values.get(at) != values:
                return f"progress {at}: it has {values}, the log {attempt.values.get(at)}"
    return ""


def _unacknowledged(story: Story, call: Call) -> str:
    if call.method != "AcknowledgeDirective":
        return ""
    known = {item.directive for item in story.events if isinstance(item, core.Acknowledged)}
    return "" if call.request.directive in known else "the log has nothing of it"


_CHECKS = {
    "AdjustRun": _adjusted,
    "ApproveAdvice": _adjusted,
    "ReviseRun": _adjusted,
    "FinishRun": _finished,
    "CreateRun": _created,
    "AttachRun": _attached,
    "OpenAttempt": _opened,
}
"""Method to what its answer promises."""
