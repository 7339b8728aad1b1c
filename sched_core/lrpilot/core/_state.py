"""The state of a run: a fold over its event log.

    state = fold(apply, events)

`RunState.apply` is the only place where a run changes. There is no clock, no randomness and
no I/O in it, so that every replica that reads the same log holds the same state to the byte.
A snapshot is a shortcut to a fold and nothing more.

A state can be trimmed: what it holds of steps long past is dropped, so that it does not grow with
the length of the run. It is a partial function then. Whatever it does and answers is what the whole
state would, to the byte; where that depends on what was dropped it raises HistoryNeeded, and
nothing has changed.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any, NamedTuple

from lrpilot.core import _canonical
from lrpilot.core._changes import Change, Multiply, Undo, change_from_mapping
from lrpilot.core._errors import HistoryNeeded
from lrpilot.core._events import (
    Acknowledged,
    Adjusted,
    Attached,
    Created,
    Declared,
    Event,
    Finished,
    Forgot,
    Imported,
    Joined,
    Opened,
    Permitted,
    Recorded,
    Reported,
    Revised,
    Waived,
    decode,
    encode,
)
from lrpilot.core._fields import LARGEST_PROGRESS
from lrpilot.core._observers import Observers
from lrpilot.core._plan import ORDER_OF_OPERATORS, Adjustment, Plan, Revision, Values
from lrpilot.core._records import Block, Records
from lrpilot.core._reporters import (
    Reporters,
    observation_from_mapping,
    observation_to_mapping,
)
from lrpilot.core._spec import RunSpec, parse_spec
from lrpilot.core.policies import Observation, Rollback

MARK_EVERY = 1024
"""Losses between two kept observer states, from which a rewind replays."""

MAX_SAVED_ADVICE = 100
"""Most pieces of advice in a saved state, the newest: no value comes of them."""

MAX_SHOWN_VALUES = 2048
"""Most learning rates before and after an adjustment that a saved state holds: they are for
people, and many groups and adjustments would make it too large."""

MAX_SAVED_VALUES = 16_384
"""Most recorded learning rates in a saved state: it must fit into one message. Those behind them
are computed again; they come out the same unless the release or the machine is another one."""

SNAPSHOT_FORMAT = 1
"""Number of the form in which a snapshot is written. Another form, also of what is in it, needs
another number: a server that does not know it folds the log instead."""

EVENT_NAME_LENGTH = 16
"""Hexadecimal digits of the digest of the log after an event that name it: 64 bits."""

_PLAIN = (
    "name", "seq", "digest", "lost_seq", "lost_digest", "may_revise", "finished", "keys",
    "attempt", "token", "holder", "begin", "key", "frontier", "in_use", "waivers", "moved",
    "origin", "permits", "declared", "rewinds", "loss_progress", "outcomes", "approved", "made",
    "imported_from", "floor", "dropped", "dropped_late", "dropped_permit",
    "log", "is_imported", "greatest_attempt", "went_on", "origins", "revised_by", "done",
)  # fmt: skip
"""Attributes that a snapshot holds as they are."""


class Permit(NamedTuple):
    """Up to where the holder may go on alone, and what it knew when it was told."""

    seq: int
    """Sequence number of the event."""
    begin: int
    """The horizon then."""
    end: int
    """First progress that it may not use alone."""
    plan: str
    """The state's `etag` then."""


class Declaration(NamedTuple):
    """A stretch over which the holder went on alone."""

    begin: int
    """First progress."""
    end: int
    """First progress behind the last one."""
    steps: int
    """Number of progresses used in it."""


class Forgotten(NamedTuple):
    """What a log has forgotten, and how far it goes itself."""

    attempt: int
    """The client's."""
    rank: int
    what: str
    """See Forgot."""
    progress: int
    """See Forgot."""
    seq: int
    """Where the log ended."""
    frontier: int
    recorded: int | None
    """Last recorded progress of the log's own attempt; None: there is none."""


class RunState:
    """Everything a log says, by name. Read anything; change it through `apply` alone."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seq = 0
        self.digest = _canonical.GENESIS
        self.log = ""
        """Digest at seq 1: names the log, since its first event holds random bits."""
        self.lost_seq = 0
        self.lost_digest = ""
        """Where a log that was lost ended, as far as the state goes that this one began from."""
        self.finished = False
        self.trainer_spec: RunSpec | None = None
        """The last spec that a trainer gave."""
        self.may_revise = False
        """Whether that trainer would rather revise a run than be refused."""
        self.pending_spec: RunSpec | None = None
        """What holds from the next attempt on."""
        self.answers: dict[str, tuple[str, int]] = {}
        """Request id to (kind, attempt or effective progress) of calls that were carried out."""
        self.keys: dict[str, int] = {}
        """Key to the attempt that was opened with it."""

        self.attempt = 0
        """Number of the current attempt; 0 before the first."""
        self.forgot: Forgotten | None = None
        """What the log has forgotten of this attempt; None: nothing that is known."""
        self.lost_attempt: Forgotten | None = None
        """The newest attempt that the log has forgotten, where that came after this one; None: none
        that is known."""
        self.went_on = False
        """Whether this attempt went on after that was known."""
        self.greatest_attempt = 0
        """Greatest number of an attempt that any client named; those after it are new."""
        self.token = ""
        """What the requests of the current attempt carry; empty: none is open."""
        self.imported_from = ""
        """Where the log was written whose attempt ended with the import; empty: an attempt was
        opened here since, or the log was not imported."""
        self.is_imported = False
        """Whether the log was imported: where it came from, attempts may open that it does not
        know."""
        self.holder = ""
        """Leader mode: token of the one who gets the values; empty: all ranks do."""
        self.begin = 0
        """Progress at which the attempt opened."""
        self.key = ""
        self.reporters = Reporters()
        self.frontier = 0
        """Least progress whose loss is not final."""
        self.in_use = 0
        """Greatest progress known to be in use."""
        self.waivers = 0
        """Waivers of this attempt, and declarations that did what one does."""
        self.moved = False
        """Whether the reporter said anything in this attempt."""

        self.permits: list[Permit] = []
        """Permits of this attempt, in order."""
        self.declared: list[Declaration] = []
        """Stretches of this attempt over which the holder went on alone, in order."""

        self.rewinds: list[tuple[int, int]] = []
        """(seq, progress) of each event from which on the losses from a progress on are others."""
        self.origin = 0
        """Above 0 once a saved state was taken over: losses below it are known only through the
        observers."""
        self.origin_observers = Observers()

        self.floor = 0
        """What lies below this progress may be dropped; 0: the state is whole."""
        self.dropped = 0
        """Number of observations that were dropped."""
        self.dropped_loss: float | None = None
        """The newest loss of those, of an update that was not skipped."""
        self.dropped_late = 0
        """Number of late losses that were dropped."""
        self.dropped_permit = 0
        """Sequence number of the last permit of the attempt that was dropped; 0: none was."""

        self.loss_progress: list[int] = []
        """Progress of each observation that is kept, in order; of skipped updates it comes
        again."""
        self.loss_values: list[float | None] = []
        self.extras: dict[int, Observation] = {}
        """Number of observations before it to each one that holds more than a loss."""
        self.late: dict[tuple[int, int], float] = {}
        """(progress, rank) to losses that came after their step was final."""

        self.observers = Observers()
        self.marks: list[tuple[int, Observers]] = []
        """(number of observations, observers then), from which a rewind replays. What was dropped
        ends at the first one."""
        self.plan = Plan([], [])
        self.advice: list[Adjustment] = []
        self.forgotten: list[Adjustment] = []
        """Adjustments and advice that a later attempt forgot; shown to people."""
        self.outcomes: dict[str, str] = {}
        """Id of each directive that was acknowledged to what became of it."""
        self.approved: dict[str, str] = {}
        """Id of each advice that was approved to that of the adjustment it became."""
        self.made: dict[str, str] = {}
        """Request id to the id of the adjustment that an operator made with it."""
        self.records = Records()

        # What operators did is known by the events that did it, also where it was taken over from
        # a part of the log that was lost.
        self.origins: dict[str, str] = {}
        """Id of each adjustment of an operator or a rollback to the name of its event."""
        self.revised_by: list[str] = []
        """Name of the event of each revision, in the plan's order."""
        self.done: list[str] = []
        """Names of all such events, also of those whose doing is gone."""

    # What follows from the state.

    @property
    def exists(self) -> bool:
        """Whether the log holds anything."""
        return self.seq > 0

    @property
    def spec(self) -> RunSpec:
        """The newest spec."""
        return self.plan.spec

    @property
    def given_spec(self) -> RunSpec:
        """The last spec that a trainer gave, or the newest where none gave any."""
        return self.trainer_spec or self.spec

    @property
    def delay(self) -> int:
        """Delay D, in the unit."""
        return self.spec.delay

    @property
    def horizon(self) -> int:
        """First progress whose values are not fixed yet."""
        if self.attempt == 0:
            return 0
        if self.spec.has_feedback:
            return self.frontier + self.delay
        return max(self.begin, self.in_use) + self.delay

    @property
    def progress(self) -> int:
        """Greatest progress that ranks are known to use."""
        return max(self.begin, self.in_use, self.frontier)

    @property
    def has_losses(self) -> bool:
        """Whether an attempt needs to be told where to begin."""
        return self.observed > 0 or self.moved or self.begin > 0

    @property
    def observed(self) -> int:
        """Number of observations of this attempt and of what it kept of those before."""
        return self.dropped + len(self.loss_progress)

    def observations_since(self, count: int) -> list[Observation]:
        """Return the observations but for the first `count`, and those that were dropped."""
        return [
            self._observation(number) for number in range(max(count, self.dropped), self.observed)
        ]

    def _observations_below(self, progress: int) -> int:
        return self.dropped + bisect_left(self.loss_progress, progress)

    @property
    def losses(self) -> int:
        """Number of losses kept."""
        return self.observers.count

    @property
    def late_losses(self) -> int:
        """Number of losses that came after their step was final."""
        return self.dropped_late + len(self.late)

    def history_differs(self, seq: int, progress: int) -> bool:
        """Return whether the losses below `progress` are others now than they were at `seq`."""
        return progress < self.origin or any(
            at > seq and first < progress for at, first in self.rewinds
        )

    @property
    def loss(self) -> float | None:
        """The newest loss, of an update that was not skipped; None before the first."""
        return self._loss_before(self.observed)

    def _loss_before(self, count: int) -> float | None:
        """Return the newest loss among the first `count` observations, or None."""
        for number in range(count - 1, self.dropped - 1, -1):
            observation = self._observation(number)
            if observation.loss is not None and not observation.is_skipped:
                return observation.loss
        return self.dropped_loss

    @property
    def alarm(self) -> Forgotten | None:
        """What people must be told that the log has forgotten: the job has to be restarted.

        An attempt that the log has forgotten had taken the place of this one, unless this one
        opened after the log was put back; then it goes on, and all is well.
        """
        return self.forgot or (None if self.went_on else self.lost_attempt)

    @property
    def etag(self) -> str:
        """What changes whenever the plan does."""
        plan = [self.attempt, self.pending_spec is not None, self.plan.tag]
        return _canonical.chain("", _canonical.to_bytes(plan))[:16]

    @property
    def permitted(self) -> int:
        """First progress that the holder may not use alone; 0: it may use none."""
        return max((item.end for item in self.permits), default=0)

    def declared_values(self, progress: int) -> Values | None:
        """Return what the holder declared at `progress` in this attempt, or None."""
        is_declared = any(item.begin <= progress < item.end for item in self.declared)
        return self.records.at(progress) if is_declared else None

    def observation(self, progress: int, tries: int = 0) -> Observation | None:
        """Return what is known of a progress after so many skipped updates, or None."""
        self.refuse_dropped(progress)
        for number in range(self._observations_below(progress), self.observed):
            found = self._observation(number)
            if found.progress != progress:
                break
            if found.tries == tries:
                return found
        return None

    def _observation(self, number: int) -> Observation:
        """Return the observation that so many came before."""
        index = number - self.dropped
        extra = self.extras.get(number)
        return extra or Observation(self.loss_progress[index], self.loss_values[index])

    def find(self, name: str) -> Adjustment | None:
        """Return the adjustment or advice with that id, or None."""
        known = (*self.plan.adjustments, *self.advice, *self.forgotten)
        return next((item for item in known if item.id == name), None)

    def values(self, progress: int) -> Values:
        """Return the values at `progress`: what is recorded, else what the plan says."""
        return self.records.at(progress) or self.plan.values(progress)

    def decided_since(self, seq: int) -> list[Adjustment]:
        """Return the adjustments and advice that events after `seq` decided, in order."""
        decided = [item for item in (*self.plan.adjustments, *self.advice) if item.seq > seq]
        return sorted(decided, key=lambda item: item.decision)

    # What is kept.

    def trim(self, progress: int) -> None:
        """Drop what lies below `progress`: it becomes the floor, as far as steps are final there.

        What is dropped are the losses, up to the last mark below, from which a rewind to the floor
        replays; and what was recorded, what came late, and the permits that ended.
        """
        # What is still to be observed must not lie below. An attempt of which no reporter said
        # anything knows of no such thing; it may never say any where the run has no feedback.
        progress = min(progress, self.frontier if self.moved else self.progress)
        if progress <= self.floor:
            return
        below = self._observations_below(progress)
        first = max((count for count, _ in self.marks if count <= below), default=self.dropped)
        self.dropped_loss = self._loss_before(first)
        del self.loss_progress[: first - self.dropped], self.loss_values[: first - self.dropped]
        self.dropped = first
        self.extras = {at: item for at, item in self.extras.items() if at >= first}
        self.marks = [mark for mark in self.marks if mark[0] >= first]
        late = {key: loss for key, loss in self.late.items() if key[0] >= progress}
        self.dropped_late += len(self.late) - len(late)
        self.late = late
        self.records = self.records.trim(progress)
        self.reporters.trim(progress)
        self.floor = progress
        self._drop_permits()

    def begin_of_last(self, steps: int) -> int:
        """Return a progress from which on lie the last `steps` steps, by values or by losses.

        0: there are not so many.
        """
        kept = self.loss_progress[-steps:]
        observed = kept[0] if len(kept) == steps else 0
        return max(observed, self.records.begin_of_last(steps))

    def _drop_permits(self) -> None:
        """Drop the permits that ended below the floor, save the last one."""
        ended = [item for item in self.permits[:-1] if item.end <= self.floor]
        if ended:
            self.dropped_permit = ended[-1].seq
            self.permits = [item for item in self.permits if item not in ended]

    def refuse_dropped(self, progress: int) -> None:
        """Raise HistoryNeeded where what lies at `progress` may have been dropped."""
        if progress < self.floor:
            raise HistoryNeeded(progress)

    def _refuse_if_dropped(self, event: Event) -> None:
        """Raise HistoryNeeded where it takes what was dropped to apply an event."""
        match event:
            case Reported():
                # The first report of an attempt that went on without any may lie below the floor.
                said = [
                    item
                    for item in event.reports
                    if item.has_metrics or item.skipped or not self.moved
                ]
                self.refuse_dropped(min((item.progress for item in said), default=self.floor))
            case Opened() if event.fold is None:
                self.refuse_dropped(event.begin)
            case Declared():
                self.refuse_dropped(event.blocks[0].begin)
                self.refuse_dropped_permit(event.offer)
                if self.spec.has_feedback:
                    stretch = self._waived_by(event)
                    self.refuse_dropped(stretch.start if stretch else self.floor)

    def refuse_dropped_permit(self, seq: int) -> None:
        """Raise HistoryNeeded where the permit with that `seq` may be one that was dropped."""
        if 0 < seq <= self.dropped_permit:
            # None of the attempt ended where it began.
            raise HistoryNeeded(self.begin)

    # The fold.

    def apply(self, event: Event, data: bytes | None = None) -> None:
        """Advance by one event; `data` is its encoding, where the caller has it already.

        Raises HistoryNeeded where the state is trimmed; then nothing has changed.
        """
        if self.floor:
            self._refuse_if_dropped(event)
        self.seq += 1
        self.digest = _canonical.chain(self.digest, data or encode(event))
        self.log = self.log or self.digest
        if isinstance(event, Reported | Recorded | Waived | Permitted | Declared | Joined):
            self.went_on = True
        match event:
            case Reported():
                self._report(event)
            case Recorded():
                self._record(event)
            case Waived():
                self._waive(event)
            case Permitted():
                self.permits.append(Permit(self.seq, event.begin, event.end, self.etag))
                self._drop_permits()
            case Declared():
                self._declare(event)
            case Joined():
                rank = self.reporters.ranks[0] if event.rank is None else event.rank
                self.reporters.incarnations[rank] = event.incarnation
            case Adjusted():
                self._adjust(event)
            case Acknowledged():
                self.outcomes.setdefault(event.directive, event.outcome)
            case Opened():
                self._open(event)
            case Forgot():
                self._forget(event)
            case Revised():
                self._revise(event)
            case Created():
                spec = parse_spec(event.spec)
                self.plan = Plan([Revision(0, 0, spec)], [])
                self._is_revision()
                self.trainer_spec = spec if event.by_trainer else None
                self.may_revise = event.may_revise
                self.answers[event.request_id] = (event.kind, 0)
            case Attached():
                self.trainer_spec = self.spec
                self.may_revise = event.may_revise
                self.answers[event.request_id] = (event.kind, 0)
            case Finished():
                self.finished = True
                self.answers[event.request_id] = (event.kind, 0)
            case Imported():
                self._import(event)

    def _report(self, event: Reported) -> None:
        reporters = self.reporters
        rank = reporters.ranks[0] if event.rank is None else event.rank
        reporters.incarnations[rank] = event.incarnation
        self.moved = True
        for report in event.reports:
            if report.progress >= max(self.frontier, reporters.positions.get(rank, self.begin)):
                self._advance(reporters.take(rank, report, self.begin))
            else:
                if report.loss is not None:
                    self.late[report.progress, rank] = report.loss
                self._advance(reporters.move(rank, report.moves_to, self.begin))

    def _advance(self, until: int) -> None:
        """Make the steps below `until` final."""
        until = max(until, self.frontier)
        for observation in self.reporters.final(until):
            self._observe(observation)
        self.frontier = until

    def _waive(self, event: Waived) -> None:
        counted = dict(event.counted)
        for at in [at for at in self.reporters.parts if at < event.until]:
            others = self.reporters.only(at, counted.get(at, ()))
            self._come_late(at, {rank: report.loss for rank, report in others.items()})
        self._advance(event.until)
        self.waivers += 1

    def _declare(self, event: Declared) -> None:
        """Take what the holder used alone for a fact, and let the rest follow from it."""
        begin, end = event.blocks[0].begin, event.blocks[-1].last + 1
        low, waived = self._first_declared(begin), self._waived_by(event)
        self.records.forget(begin)
        for block in event.blocks:
            self.records.add(block)
        self.in_use = max(self.in_use, end - 1)
        steps = sum(block.steps for block in event.blocks)
        if self.declared and self.declared[-1].end == low:
            begin, _, before = self.declared.pop()
            steps += before
        self.declared.append(Declaration(begin, end, steps))
        if self.spec.has_feedback:
            # What a waiver does; and what operators did meanwhile waits until the end.
            known = {
                (item.decided_at, item.order): item.seq
                for item in (*self.plan.adjustments, *self.advice)
            }
            seen = self._unseen(waived.start) if waived else []
            self.plan.postpone(low, end, event.offer, waived.stop)
            if waived:
                self.waivers += 1
                self._pass_over(waived.stop, seen, known)
        else:
            self.plan.postpone(low, end, event.offer, 0)
        self.plan.restate(low, self.horizon)

    def _first_declared(self, begin: int) -> int:
        """Return the first progress whose values had not arrived, where `begin` was used alone.

        With a stride it may lie below: what takes effect between the two was to show there.
        """
        last = self.records.last_below(begin)
        return self.begin if last is None else max(self.begin, last + 1)

    def _waived_by(self, event: Declared) -> range:
        """Return whose losses a declaration waives: those that would have acted in it."""
        offer = next(item for item in self.permits if item.seq == event.offer)
        low = self._first_declared(event.blocks[0].begin)
        # Below the horizon of the offer, its values were fixed.
        first = max(self.begin, max(low, offer.begin) - self.delay)
        return range(first, event.blocks[-1].last + 1 - self.delay)

    def _unseen(self, progress: int) -> list[Observation]:
        """Forget the losses from `progress` on as if they had yet to come; return them."""
        first = self._observations_below(progress)
        seen = [self._observation(number) for number in range(first, self.observed)]
        late = self.late
        self._rewind(progress)
        self.late = late
        self.rewinds.append((self.seq, progress))
        return seen

    def _pass_over(
        self, until: int, seen: Sequence[Observation], known: Mapping[tuple[int, int], int]
    ) -> None:
        """Make the losses below `until` final as absent, come or not come.

        `seen` is what had come; what is from `until` on is observed anew, since without the others
        it may decide otherwise. `known` has the names of what it decided.
        """
        for observation in seen:
            if observation.progress >= until:
                self._observe(observation, known)
            elif not observation.is_skipped:
                self._come_late(observation.progress, self.reporters.forget(observation))
        for at, losses in self.reporters.forget_below(until):
            self._come_late(at, losses)
        self._advance(until)
        # A decision that was made once more, on the same loss, keeps its name.
        made = {item.decision for item in (*self.plan.adjustments, *self.advice)}
        self.forgotten = [item for item in self.forgotten if item.decision not in made]

    def _come_late(self, progress: int, losses: Mapping[int, float | None]) -> None:
        """Keep the losses of a step that is final without them, by rank."""
        for rank, loss in losses.items():
            if loss is not None:
                self.late[progress, rank] = loss

    def _observe(
        self, observation: Observation, known: Mapping[tuple[int, int], int] | None = None
    ) -> None:
        if not observation.is_plain:
            self.extras[self.observed] = observation
        self.loss_progress.append(observation.progress)
        self.loss_values.append(observation.loss)
        self.observers, decided = self.observers.observe(self.plan, observation, self.seq, known)
        self.advice += [item for item in decided if item.mode != "act"]
        if self.observed % MARK_EVERY == 0 and not observation.is_skipped:
            self.marks.append((self.observed, self.observers))

    def _is_revision(self) -> None:
        """Note that the event in hand made the plan's last revision."""
        # An event may make an adjustment as well.
        name = f"{self._event_name}r"
        self.revised_by.append(name)
        self.done.append(name)

    def _is_origin(self, adjustment: Adjustment) -> None:
        """Note that the event in hand made an adjustment."""
        self.origins[adjustment.id] = self._event_name
        self.done.append(self._event_name)

    @property
    def _event_name(self) -> str:
        return self.digest[:EVENT_NAME_LENGTH]

    def _forget(self, event: Forgot) -> None:
        """Take note of what a client holds and the log has not."""
        forgotten = Forgotten(
            event.attempt,
            event.rank,
            event.what,
            event.progress,
            self.seq - 1,
            self.frontier,
            self.records.last_below(LARGEST_PROGRESS + 1),
        )
        if event.attempt == self.attempt:
            self.forgot = forgotten
        else:
            self.lost_attempt, self.went_on = forgotten, False
            self.greatest_attempt = event.attempt

    def _adjust(self, event: Adjusted) -> None:
        adjustment = self.made_by(event, self.seq)
        self.plan.adjust(adjustment)
        self._is_origin(adjustment)
        self.made[event.request_id] = adjustment.id
        self.answers[event.request_id] = (event.kind, event.effective)
        if event.advice:
            self.approved[event.advice] = adjustment.id

    def made_by(self, event: Adjusted, seq: int) -> Adjustment:
        """Return what an operator's event adds to the plan, as the event of that `seq`."""
        advice = self.find(event.advice)
        return self._from_outside(
            event.effective,
            change_from_mapping(event.change),
            decided_at=self.frontier,
            # What a policy advised is its own still: its next step takes the place of this one.
            kind="operator" if advice is None else advice.kind,
            source="operator",
            seq=seq,
            author=event.author,
        )

    def _from_outside(
        self,
        effective: int,
        change: Change,
        *,
        decided_at: int,
        kind: str,
        source: str,
        seq: int,
        author: str = "",
    ) -> Adjustment:
        """Return what no policy decided as part of the plan, as the event of that `seq`."""
        return self.plan.stated(
            Adjustment(
                effective=effective,
                decided_at=decided_at,
                order=ORDER_OF_OPERATORS,
                part=0,
                kind=kind,
                source=source,
                mode="act",
                change=change,
                before=(),
                after=(),
                decays_before=(),
                decays_after=(),
                seq=seq,
                author=author,
            )
        )

    def _record(self, event: Recorded) -> None:
        self.in_use = max(self.in_use, event.in_use)
        self.records.add(
            Block(
                begin=event.begin,
                stride=event.stride,
                groups=len(self.spec.group_names),
                learning_rates=event.learning_rates,
                weight_decays=event.weight_decays,
            )
        )

    def _revise(self, event: Revised) -> None:
        spec = parse_spec(event.spec)
        if event.by_trainer:
            self.trainer_spec = spec
            self.may_revise = True
        if event.effective is None or event.observes_from is None:
            self.pending_spec = spec
            self.answers[event.request_id] = (event.kind, self.horizon)
        else:
            revision = Revision(
                event.effective, event.observes_from, spec, event.by_trainer, self.seq
            )
            self.plan.revise(revision)
            self._is_revision()
            self.answers[event.request_id] = (event.kind, event.effective)

    def _import(self, event: Imported) -> None:
        """End the attempt: its ranks may still get values where the log came from."""
        self.token = self.holder = self.key = ""
        self.permits = []
        self.dropped_permit = 0
        self.imported_from, self.is_imported = event.origin, True
        self.answers[event.request_id] = (event.kind, self.attempt)

    def _open(self, event: Opened) -> None:
        if event.lost_seq:
            self.lost_seq, self.lost_digest = event.lost_seq, event.lost_digest
        if event.fold is None:
            self._rewind(event.begin)
        elif event.lost_seq:
            self._take_over(event.fold, self._foreign(event.fold, adopted=event.adopted))
        else:
            self._take_over(event.fold, self._own(event.fold))
        self.plan.reopen(event.begin)
        records = self.records
        self.records = Records(self.floor)
        if event.directive:
            self._roll_back(event)
            records = Records()
        if self.pending_spec is not None:
            self.plan.revise(
                Revision(
                    event.begin,
                    event.begin,
                    self.pending_spec,
                    by_trainer=True,
                    seq=self.seq,
                    part=len(self.plan.adjustments),
                )
            )
            self._is_revision()
            self.pending_spec = None
        else:
            for block in records.between(event.begin, event.begin + self.delay):
                self.records.add(block)
        self.rewinds.append((self.seq, event.begin))
        self.attempt = event.attempt
        self.greatest_attempt = max(self.greatest_attempt, event.attempt)
        self.forgot = self.lost_attempt = None
        self.token = event.token
        self.imported_from = ""
        self.holder = event.holder
        self.permits, self.declared = [], []
        self.dropped_permit = 0
        self.begin = event.begin
        self.key = event.key
        if event.key:
            self.keys[event.key] = event.attempt
        self.reporters = Reporters(event.reporters or (event.reporter,))
        if event.incarnation:
            opener = event.reporter if event.opener is None else event.opener
            self.reporters.incarnations[opener] = event.incarnation
        self.frontier = event.begin
        self.in_use = event.begin
        self.waivers = 0
        self.moved = False
        self.answers[event.request_id] = (event.kind, event.attempt)

    def _roll_back(self, event: Opened) -> None:
        """Cut the LR from where a rollback opened: the cut must survive the rewind."""
        rollback = Rollback(event.begin, event.before, event.asked_at, event.factor)
        self.forgotten += self.plan.rolled_back(rollback, event.directive)
        self.outcomes[event.directive] = "done"
        cut = Multiply(
            event.factor,
            f"rolled back to {event.begin}: directive {event.directive} asked for it at "
            f"{event.asked_at}, with the damage beginning at {event.before}",
        )
        adjustment = self._from_outside(
            event.begin,
            cut,
            decided_at=event.begin,
            kind="rollback",
            source="rollback",
            seq=self.seq,
        )
        self.plan.adjust(adjustment)
        self._is_origin(adjustment)

    def _rewind(self, progress: int) -> None:
        """Forget the losses from `progress` on and what was decided on them."""
        self.forgotten += [
            item
            for item in (*self.plan.adjustments, *self.advice)
            if item.decided_at >= progress and item.order < ORDER_OF_OPERATORS
        ]
        self.plan, self.observers = self._as_of(progress)
        if progress < self.origin:
            self.origin, self.origin_observers = progress, self.observers
        self.advice = [item for item in self.advice if item.decided_at < progress]
        kept = self._observations_below(progress)
        del self.loss_progress[kept - self.dropped :], self.loss_values[kept - self.dropped :]
        self.extras = {at: item for at, item in self.extras.items() if at < kept}
        self.marks = [mark for mark in self.marks if mark[0] <= kept]
        self.late = {key: loss for key, loss in self.late.items() if key[0] < progress}

    def _as_of(self, progress: int) -> tuple[Plan, Observers]:
        """Return the plan and the observers as they were before the loss at `progress`.

        Replays the losses since the last mark below it: they decide again what they decided.
        Below `origin` only the state at 0 is known.
        """
        self.refuse_dropped(progress)
        if progress < self.origin:
            return self.plan.forget(progress), Observers()
        kept = self._observations_below(progress)
        if kept == self.observed:
            return self.plan, self.observers
        first, observers = 0, self.origin_observers
        for count, marked in self.marks:
            if count <= kept:
                first, observers = count, marked
        # The decisions are in the plan already; they are made once more only for the observers,
        # each of which saw those of the others.
        begin = self._observation(first).progress
        plan, cuts = self.plan.forget(begin).before_cuts(begin)
        known = {
            (item.decided_at, item.order): item.seq
            for item in (*self.plan.adjustments, *self.advice)
        }
        for number in range(first, kept):
            observation = self._observation(number)
            while cuts and cuts[0].effective <= observation.progress:
                # Losses below where a rollback opened were observed before there was its cut.
                plan.adjust(cuts.pop(0))
            observers, _ = observers.observe(plan, observation, 0, known)
        return self.plan.forget(progress), observers

    # Saved states: what it takes to resume at one progress.

    def saved_fold(self, progress: int) -> dict[str, Any]:
        """Return what it takes to resume at `progress`, as plain data.

        It holds no loss: the observers, the plan, and the recorded values not used yet.
        Losses below `progress` must be final. Raises HistoryNeeded where the state is trimmed.
        """
        plan, observers = self._as_of(progress)
        return {
            "name": self.name,
            "log": self.log,
            "progress": progress,
            "attempt": self.attempt,
            "trainer_spec": _spec_to_mapping(self.trainer_spec),
            "pending_spec": _spec_to_mapping(self.pending_spec),
            "revisions": [item.to_mapping() for item in plan.revisions],
            "adjustments": _shortened(plan.adjustments),
            "rollbacks": [astuple(item) for item in plan.rollbacks],
            "advice": _shortened(
                [item for item in self.advice if item.decided_at < progress][-MAX_SAVED_ADVICE:]
            ),
            "observers": observers.to_mapping(),
            "records": [block.to_mapping() for block in self._unused_records(progress)],
            "origins": [
                [item.id, self.origins[item.id]]
                for item in (*plan.adjustments, *self.advice)
                if item.id in self.origins
            ],
            "revised_by": self.revised_by,
            "done": self.done,
        }

    def _unused_records(self, progress: int) -> list[Block]:
        """Return what an attempt from `progress` on inherits, as much as a saved state holds."""
        kept, room = [], MAX_SAVED_VALUES
        for block in self.records.between(progress, progress + self.delay):
            part = block.cut(progress, block.begin + room // block.groups * block.stride)
            if part is None:
                break
            kept.append(part)
            room -= part.steps * part.groups
        return kept

    def gives_other_spec(self, fold: Mapping[str, Any]) -> bool:
        """Return whether a trainer gave a spec here that a saved state does not know of."""
        revisions = zip(self.plan.revisions, self.revised_by, strict=True)
        return self.pending_spec is not None or any(
            item.by_trainer and name not in fold["done"] for item, name in revisions
        )

    def _own(self, fold: Mapping[str, Any]) -> "_Past":
        """Return the past that a saved state of this log brings, or of the lost one before it.

        What the log has, it has whole; the state may have shortened it. What operators did since
        the state was saved stays.
        """
        whole = {item.decision: item for item in self._known()}
        adjustments = map(Adjustment.from_mapping, fold["adjustments"])
        advice = map(Adjustment.from_mapping, fold["advice"])
        return _Past(
            self.plan.revisions,
            [
                *(_brought(item, whole, self.seq) for item in adjustments if _is_decision(item)),
                *(item for item in self.plan.adjustments if not _is_decision(item)),
            ],
            [_brought(item, whole, self.seq) for item in advice],
            self.plan.rollbacks,
        )

    def _foreign(self, fold: Mapping[str, Any], *, adopted: bool) -> "_Past":
        """Return the past that a saved state of a lost log brings, and take over its specs.

        What operators did here and the state does not know of stays; with `adopted`, where the
        lost log is a part of this one, also how they revised it. What both know is there once.
        """
        own, known = set(fold.get("done", ())), last_trainer_spec(fold)
        gives_own = not adopted or self.gives_other_spec(fold)
        given = self.given_spec if gives_own else known
        named = list(zip(self.plan.revisions, self.revised_by, strict=True))
        places = {name: (item.seq, item.part) for item, name in named}
        adjustments = [item for item in self.plan.adjustments if not _is_decision(item)]
        places |= {self.origins[item.id]: (item.seq, item.part) for item in adjustments}
        kept = [item for item in adjustments if adopted and self.origins[item.id] not in own]
        since = [
            (item, name)
            for item, name in named
            if adopted and not item.by_trainer and name not in own
        ]
        past = _renumbered(fold, self._known() if adopted else (), places, self.seq)
        # A state of an old release names no events: what it brings goes by the one in hand.
        names = fold.get("revised_by") or [
            f"{self._event_name}r{index}" for index in range(len(past.revisions))
        ]
        origins = {key: name or f"{self._event_name}-{key}" for key, name in past.origins.items()}
        self.revised_by = [*names, *(name for _, name in since)]
        self.origins |= origins
        told = (*fold.get("done", ()), *names, *origins.values())
        self.done += [name for name in dict.fromkeys(told) if name not in self.done]
        self.pending_spec = _spec_from_mapping(fold["pending_spec"]) if given == known else given
        if self.trainer_spec is None or (fold["trainer_spec"] is not None and not gives_own):
            self.trainer_spec = _spec_from_mapping(fold["trainer_spec"])
        rollbacks = [_rollback(item) for item in fold["rollbacks"]]
        if adopted:
            rollbacks += [item for item in self.plan.rollbacks if item not in rollbacks]
        return _Past(
            [*past.revisions, *(item for item, _ in since)],
            [*past.adjustments, *kept],
            past.advice,
            tuple(rollbacks),
        )

    def _known(self) -> tuple[Adjustment, ...]:
        """Return every adjustment and advice, those that were forgotten first."""
        return (*self.forgotten, *self.plan.adjustments, *self.advice)

    def _take_over(self, fold: Mapping[str, Any], past: "_Past") -> None:
        """Let a saved state take the place of the losses and of what was decided on them."""
        kept = {*past.adjustments, *past.advice}
        self.forgotten = [item for item in self._known() if item not in kept]
        self.plan = Plan(past.revisions, past.adjustments, past.rollbacks)
        self.advice = list(past.advice)
        self.observers = self.origin_observers = Observers.from_mapping(fold["observers"])
        self.origin = fold["progress"]
        self.loss_progress, self.loss_values, self.marks = [], [], []
        self.extras, self.late = {}, {}
        # Nothing that was dropped counts any more.
        self.floor = self.dropped = self.dropped_late = 0
        self.dropped_loss = None
        self.records = Records()
        given = [item["spec"] for item in fold["revisions"] if item["by_trainer"]]
        if given == [item.spec.to_mapping() for item in self.plan.revisions if item.by_trainer]:
            # Trainers who have given another spec since asked for other values.
            for item in fold["records"]:
                self.records.add(Block.from_mapping(item))

    # Snapshots.

    def snapshot(self) -> bytes:
        """Return the whole state as canonical bytes; equal states give equal bytes."""
        return _canonical.to_bytes(
            {
                "format": SNAPSHOT_FORMAT,
                **{name: getattr(self, name) for name in _PLAIN},
                "dropped_loss": self.dropped_loss,
                "forgot": self.forgot,
                "lost_attempt": self.lost_attempt,
                "trainer_spec": _spec_to_mapping(self.trainer_spec),
                "pending_spec": _spec_to_mapping(self.pending_spec),
                "answers": self.answers,
                "loss_values": self.loss_values,
                "extras": [
                    [index, observation_to_mapping(item)]
                    for index, item in sorted(self.extras.items())
                ],
                "late": sorted(self.late.items()),
                "reporters": self.reporters.to_mapping(),
                "observers": self.observers.to_mapping(),
                "origin_observers": self.origin_observers.to_mapping(),
                "marks": [[count, item.to_mapping()] for count, item in self.marks],
                "revisions": [item.to_mapping() for item in self.plan.revisions],
                "adjustments": [item.to_mapping() for item in self.plan.adjustments],
                "rollbacks": [astuple(item) for item in self.plan.rollbacks],
                "advice": [item.to_mapping() for item in self.advice],
                "forgotten": [item.to_mapping() for item in self.forgotten],
                "last_record_below_floor": self.records.last_below_floor,
                "records": [block.to_mapping() for block in self.records],
            }
        )


def restore_snapshot(data: bytes) -> RunState:
    """Return the state that `RunState.snapshot` wrote. Raises ValueError for an unknown format."""
    content = _canonical.from_bytes(data)
    if content["format"] != SNAPSHOT_FORMAT:
        raise ValueError(
            f"snapshot format: got {content['format']!r}; this release knows {SNAPSHOT_FORMAT}"
        )
    state = RunState(content["name"])
    for name in _PLAIN:
        setattr(state, name, content[name])
    if content["forgot"] is not None:
        state.forgot = Forgotten(*content["forgot"])
    if content["lost_attempt"] is not None:
        state.lost_attempt = Forgotten(*content["lost_attempt"])
    state.trainer_spec = _spec_from_mapping(content["trainer_spec"])
    state.pending_spec = _spec_from_mapping(content["pending_spec"])
    state.rewinds = [(seq, first) for seq, first in content["rewinds"]]
    state.permits = [Permit(*item) for item in content["permits"]]
    state.declared = [Declaration(*item) for item in content["declared"]]
    state.answers = {key: (kind, number) for key, (kind, number) in content["answers"].items()}
    state.loss_values = [_float_or_none(item) for item in content["loss_values"]]
    state.dropped_loss = _float_or_none(content["dropped_loss"])
    state.extras = {index: observation_from_mapping(item) for index, item in content["extras"]}
    state.late = {(at, rank): float(loss) for (at, rank), loss in content["late"]}
    state.reporters = Reporters.from_mapping(content["reporters"])
    state.observers = Observers.from_mapping(content["observers"])
    state.origin_observers = Observers.from_mapping(content["origin_observers"])
    state.marks = [(count, Observers.from_mapping(item)) for count, item in content["marks"]]
    state.plan = Plan(
        [Revision.from_mapping(item) for item in content["revisions"]],
        [Adjustment.from_mapping(item) for item in content["adjustments"]],
        [_rollback(item) for item in content["rollbacks"]],
    )
    state.advice = [Adjustment.from_mapping(item) for item in content["advice"]]
    state.forgotten = [Adjustment.from_mapping(item) for item in content["forgotten"]]
    state.records = Records(state.floor, content["last_record_below_floor"])
    for item in content["records"]:
        state.records.add(Block.from_mapping(item))
    return state


def last_trainer_spec(fold: Mapping[str, Any]) -> RunSpec:
    """Return the last spec that a trainer gave by the time of a saved fold, or the newest."""
    given = _spec_from_mapping(fold["trainer_spec"])
    return given or Revision.from_mapping(fold["revisions"][-1]).spec


def rows(state: RunState, events: Sequence[Event]) -> list[tuple[int, bytes, str]]:
    """Return (seq, encoded event, digest) for events to be appended to the log of `state`."""
    seq, digest = state.seq, state.digest
    result = []
    for event in events:
        data = encode(event)
        seq, digest = seq + 1, _canonical.chain(digest, data)
        result.append((seq, data, digest))
    return result


def fold(name: str, payloads: Iterable[bytes]) -> RunState:
    """Return the state after the encoded events of a log."""
    state = RunState(name)
    for payload in payloads:
        state.apply(decode(payload), payload)
    return state


def _shortened(adjustments: Sequence[Adjustment]) -> list[dict[str, Any]]:
    """Return adjustments as plain data, the older ones without what they did to each group."""
    room = MAX_SHOWN_VALUES
    kept = []
    for item in reversed(adjustments):
        room -= 2 * (len(item.before) + len(item.decays_before))
        short = replace(item, before=(), after=(), decays_before=(), decays_after=())
        kept.append((item if room >= 0 else short).to_mapping())
    return kept[::-1]


@dataclass(frozen=True)
class _Past:
    """What a saved state brings in the place of what a log decided."""

    revisions: Sequence[Revision]
    adjustments: Sequence[Adjustment]
    advice: Sequence[Adjustment]
    rollbacks: tuple[Rollback, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)
    """As RunState.origins, of its adjustments; empty where a state does not name the event."""


def _is_decision(item: Adjustment) -> bool:
    """Return whether a loss decided an adjustment, and nobody else."""
    return item.order < ORDER_OF_OPERATORS


def _renumbered(
    fold: Mapping[str, Any],
    known: Sequence[Adjustment],
    places: Mapping[str, tuple[int, int]],
    seq: int,
) -> _Past:
    """Return the specs and decisions of a lost log as the event with that `seq` brings them.

    What operators did gets positions of its own, so that no two have one name, and a revision one
    behind the changes that it came after; what was taken back goes by the new names. What this log
    knows by itself keeps its name: decisions among `known`, and the rest by `places`, the seq and
    part of what each event did.
    """
    events = dict(fold.get("origins", ()))
    whole = {item.decision: item for item in known}
    revisions = [Revision.from_mapping(item) for item in fold["revisions"]]
    decided = [Adjustment.from_mapping(item) for item in (*fold["adjustments"], *fold["advice"])]
    names: dict[str, str] = {}
    moved: list[Adjustment] = []
    origins: dict[str, str] = {}
    parts = [0] * len(revisions)
    # In the order in which they apply, which those with one effective progress keep.
    for item in sorted(decided, key=lambda item: item.key):
        if _is_decision(item):
            new = _brought(item, whole, seq)
        else:
            new_seq, part = places.get(events.get(item.id, "")) or (seq, len(moved))
            new = replace(item, seq=new_seq, part=part)
            origins[new.id] = events.get(item.id, "")
        names[item.mark] = new.mark
        moved.append(new)
        for index, revision in enumerate(revisions):
            is_later = revision.effective == item.effective and revision.came_after(item)
            if is_later and not _is_decision(item):
                parts[index] = len(moved)
    placed = []
    revised_by = fold.get("revised_by") or [""] * len(revisions)
    for revision, part, name in zip(revisions, parts, revised_by, strict=True):
        at, behind = places.get(name, (seq, part))
        placed.append(replace(revision, seq=at, part=behind))
    for index, item in enumerate(moved):
        if isinstance(item.change, Undo):
            # A decision on a loss may come again; what else is gone must not lend its name to what
            # an operator does from here on.
            targets = tuple(
                names.get(target, target)
                for target in item.change.targets
                if target in names or target.startswith("n")
            )
            moved[index] = replace(item, change=replace(item.change, targets=targets))
    return _Past(
        placed,
        [item for item in moved if item.mode == "act"],
        [item for item in moved if item.mode != "act"],
        origins=origins,
    )


def _brought(
    item: Adjustment, known: Mapping[tuple[int, int, int, int], Adjustment], seq: int
) -> Adjustment:
    """Return a decision of a saved state: as the log has it, else as that event brings it."""
    here = known.get(item.decision)
    return here if here is not None and _is_same(here, item) else replace(item, seq=seq)


def _is_same(here: Adjustment, there: Adjustment) -> bool:
    """Return whether two decisions with one name are one, but for what it did to each group."""
    return (here.kind, here.mode, here.effective, here.change) == (
        there.kind,
        there.mode,
        there.effective,
        there.change,
    )


def _rollback(data: Sequence[Any]) -> Rollback:
    begin, before, decided_at, factor = data
    return Rollback(begin, before, decided_at, float(factor))


def _float_or_none(value: Any) -> float | None:
    return None if value is None else float(value)


def _spec_to_mapping(spec: RunSpec | None) -> dict[str, Any] | None:
    return None if spec is None else spec.to_mapping()


def _spec_from_mapping(data: Mapping[str, Any] | None) -> RunSpec | None:
    return None if data is None else parse_spec(data)
