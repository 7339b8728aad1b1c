"""The plan: base schedule plus adjustments, a pure function of the event log."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, TypeAlias

from lrpilot.core import _canonical
from lrpilot.core._changes import (
    BeginDecay,
    Change,
    Curve,
    Direct,
    Divide,
    Hold,
    Multiply,
    NextStage,
    ScaleWeightDecay,
    SetRate,
    StretchWarmup,
    Undo,
    change_from_mapping,
    change_to_mapping,
    summary_of,
)
from lrpilot.core._fields import LARGEST_RATE
from lrpilot.core._schedules import StageSchedule, anneal_factor, stage_at, stage_schedules
from lrpilot.core._spec import RunSpec, parse_spec
from lrpilot.core.policies import Phase, Quiet, Rollback

ORDER_OF_STAGES = 1000
"""Order of what the end of a stage decides: behind every policy of the spec."""

ORDER_OF_DETECTORS = 2000
"""Order of the first policy that watches although no spec names it."""

ORDER_OF_OPERATORS = 3000
"""Order of what operators do, and of a rollback's cut: behind everything else."""

RATE_CHANGES = (Multiply, Divide, SetRate, Curve, Hold, BeginDecay)
"""Changes that are links of the chain of LRs."""

DECAY_CHANGES = (ScaleWeightDecay, Hold)
"""Changes that are links of the chain of WDs."""

ENDABLE = (Multiply, Divide, SetRate, Curve, Hold, BeginDecay, ScaleWeightDecay)
"""Changes that can be taken back."""

STAGE_CHANGES = (NextStage, StretchWarmup)
"""Changes of the base schedule itself."""

Values: TypeAlias = tuple[tuple[float, ...], tuple[float, ...] | None]
"""Learning rates and weight decays of one progress, one per group; None: the run sets none."""


@dataclass(frozen=True, slots=True)
class Adjustment:
    """A recorded change of the plan from a progress on."""

    effective: int
    """First progress at which it shows."""
    decided_at: int
    """Progress of the loss that decided it; of an operator's, that of the next loss then."""
    order: int
    """Position of the policy in the spec: breaks ties between equal `effective`."""
    part: int
    """Position among what the same one decided on the same loss."""
    kind: str
    """Kind of the policy, else `stage`, `operator` or `rollback`."""
    source: str
    """Who decided, such as `policies.0 (plateau)`."""
    mode: str
    """`act`: part of the plan; `advise`: recorded only; `held back`: not applied, since the least
    interval between adjustments was not over."""
    change: Change
    """What it does."""
    before: tuple[float, ...]
    """Learning rate at `effective` per group, without it."""
    after: tuple[float, ...]
    """Learning rate at `effective` per group, with it."""
    decays_before: tuple[float, ...]
    """Weight decay likewise; empty: the run sets none."""
    decays_after: tuple[float, ...]
    seq: int
    """Sequence number of the event whose fold decided it."""
    author: str = ""
    """Who made it, of an operator."""
    expires: int = 0
    """Of an advice: horizon from which on it can no longer be approved."""
    ends_own: bool = False
    """Of an advice: it takes the place of what the same policy did before."""

    @property
    def key(self) -> tuple[int, int, int, int]:
        """What adjustments apply in order of."""
        return (self.effective, self.order, self.seq, self.part)

    @property
    def decision(self) -> tuple[int, int, int, int]:
        """What tells it from all others of its log, and what people see them in order of."""
        return (self.seq, self.decided_at, self.order, self.part)

    @property
    def id(self) -> str:
        """Name within the run."""
        name = f"{self.seq}-{self.decided_at}-{self.order}"
        return f"{name}-{self.part}" if self.part else name

    @property
    def mark(self) -> str:
        """What tells a decision apart in whatever attempt it is made: the loss and who decides.

        Of an operator's it is the id: that one is made once.
        """
        if self.order >= ORDER_OF_OPERATORS:
            return self.id
        return f"n{self.decided_at}-{self.kind}-{self.order}-{self.part}"

    @property
    def reason(self) -> str:
        """Why, as one phrase with the numbers."""
        return self.change.reason

    @property
    def summary(self) -> str:
        """What it does, as one phrase."""
        return summary_of(self.change)

    def postponed(self, begin: int, end: int, seq: int) -> "Adjustment":
        """Return it as it is where what operators did after `seq` waits until `end`."""
        waits = self.order >= ORDER_OF_OPERATORS and self.seq > seq
        return replace(self, effective=end) if waits and begin <= self.effective < end else self

    def to_mapping(self) -> dict[str, Any]:
        """Return the adjustment as plain data."""
        return {
            "effective": self.effective,
            "decided_at": self.decided_at,
            "order": self.order,
            "part": self.part,
            "kind": self.kind,
            "source": self.source,
            "mode": self.mode,
            "change": change_to_mapping(self.change),
            "before": self.before,
            "after": self.after,
            "decays_before": self.decays_before,
            "decays_after": self.decays_after,
            "seq": self.seq,
            "author": self.author,
            "expires": self.expires,
            "ends_own": self.ends_own,
        }

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> "Adjustment":
        """Return the adjustment that `to_mapping` wrote."""
        values = dict(data)
        values["change"] = change_from_mapping(data["change"])
        for name in ("before", "after", "decays_before", "decays_after"):
            values[name] = tuple(float(value) for value in data[name])
        return cls(**values)


@dataclass(frozen=True)
class Revision:
    """One version of the spec and where it holds."""

    effective: int
    """First progress whose values follow it."""
    observes_from: int
    """First progress whose loss its policies see."""
    spec: RunSpec
    by_trainer: bool = False
    """Whether a trainer gave it: then it holds from wherever its trainers start."""
    seq: int = 0
    """Sequence number of the event that brought it."""
    part: int = 0
    """Of what was restored from a lost log: how many of the changes came before it there."""

    @cached_property
    def stages(self) -> tuple[StageSchedule, ...]:
        """The base schedule of each stage, as the spec plans it."""
        return stage_schedules(self.spec)

    def to_mapping(self) -> dict[str, Any]:
        """Return the revision as plain data."""
        return {
            "effective": self.effective,
            "observes_from": self.observes_from,
            "spec": self.spec.to_mapping(),
            "by_trainer": self.by_trainer,
            "seq": self.seq,
            "part": self.part,
        }

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> "Revision":
        """Return the revision that `to_mapping` wrote."""
        spec = parse_spec(data["spec"])
        by_trainer, seq, part = data["by_trainer"], data["seq"], data["part"]
        return cls(data["effective"], data["observes_from"], spec, by_trainer, seq, part)

    def came_after(self, item: Adjustment) -> bool:
        """Return whether it was made after an adjustment with the same `effective`."""
        if self.seq != item.seq:
            return self.seq > item.seq
        # One event restored both. A policy decides on the loss D before, which no revision that an
        # operator makes at that progress can follow, and each that a trainer brings there does.
        return self.part > item.part if item.order >= ORDER_OF_OPERATORS else self.by_trainer

    def reopened(self, begin: int) -> "Revision":
        """Return the revision as an attempt from `begin` on has it."""
        if not self.by_trainer or self.effective <= begin:
            return self
        return replace(self, effective=begin, observes_from=begin)

    def postponed(self, begin: int, end: int, seq: int, observes_from: int) -> "Revision":
        """Return the revision as it is where what came after `seq` waits until `end`."""
        if self.seq <= seq or not begin <= self.effective < end:
            return self
        observes_from = max(self.observes_from, observes_from)
        return replace(self, effective=end, observes_from=observes_from)


Scale: TypeAlias = tuple[Literal["cut", "raise", "divide"], float, float, float]
"""(kind, factor or divisor, limit, eps) of one multiplication or division of an LR."""


def scaled(lr: float, scales: Iterable[Scale]) -> float:
    """Return `lr` after multiplications and divisions, each under its limit.

    Down: `x' = max(x * factor, limit)` if `x - x' > eps`, else x; up is mirrored. An LR at or
    beyond the limit stays where the base put it: a cut never raises, and a raise never lowers.
    Source: `torch.optim.lr_scheduler.ReduceLROnPlateau`.
    """
    for kind, factor, limit, eps in scales:
        new = lr / factor if kind == "divide" else lr * factor
        if kind == "cut":
            new = max(new, limit)
            if lr - new > eps:
                lr = new
        else:
            new = min(new, limit)
            if new - lr > eps:
                lr = new
    return lr


def lowered(lr: float, new: float, low: float) -> float:
    """Return the lower one of `lr` and `new`, but nothing between `low` and `lr` is passed."""
    return min(lr, max(new, low))


def raised(lr: float, new: float, high: float) -> float:
    """Return the higher one of `lr` and `new`; the mirror of `lowered`."""
    return max(lr, min(new, high))


def counting(chain: Iterable[Adjustment], progress: int) -> Iterator[Adjustment]:
    """Yield the links of a chain that count at `progress`.

    They are those that are not over by themselves, and under a hold no policy's later ones.
    """
    is_held = False
    for item in chain:
        if is_over(item, progress) or (is_held and item.order < ORDER_OF_OPERATORS):
            continue
        yield item
        is_held = is_held or isinstance(item.change, Hold)


class Plan:
    """Revisions of the spec and the adjustments on top of them.

    Values come from `values`; nothing else here is needed to hand out learning rates.
    """

    def __init__(
        self,
        revisions: Sequence[Revision],
        adjustments: Iterable[Adjustment],
        rollbacks: Sequence[Rollback] = (),
    ) -> None:
        self._revisions = list(revisions)
        self._adjustments = sorted(adjustments, key=lambda item: item.key)
        self.rollbacks = tuple(rollbacks)
        """What was undone so far; no later attempt forgets it."""
        self._changed()

    def _changed(self) -> None:
        self._effectives = [item.effective for item in self._adjustments]
        self._moves_stages = any(
            isinstance(item.change, STAGE_CHANGES) for item in self._adjustments
        )
        self._directives = [item for item in self._adjustments if isinstance(item.change, Direct)]
        self._has_spells = any(
            isinstance(item.change, (Hold, Curve, BeginDecay)) for item in self._adjustments
        )
        # Everything below is found again when it is needed.
        self._stage_lists: dict[int, tuple[StageSchedule, ...]] = {}
        self._chains: dict[tuple[int, int, bool], tuple[Adjustment, ...]] = {}
        self._anchors: dict[tuple[Adjustment, int, bool], float] = {}
        self._tag = ""
        self._compiled: dict[tuple[float, ...], tuple[Scale, ...] | None] = {}
        self._inits: dict[tuple[int, int, bool], dict[int, float]] = {}
        # The last chain evaluated per group: on a constant piece of the base a finished chain
        # is looked up instead of being multiplied again at every step.
        self._memo: dict[int, tuple[int, int, int, float, float]] = {}

    @property
    def revisions(self) -> tuple[Revision, ...]:
        """The revisions in the order in which they were made."""
        return tuple(self._revisions)

    @property
    def adjustments(self) -> tuple[Adjustment, ...]:
        """The adjustments in the order in which they apply."""
        return tuple(self._adjustments)

    @property
    def spec(self) -> RunSpec:
        """The newest spec."""
        return self._revisions[-1].spec

    @property
    def tag(self) -> str:
        """What changes whenever the revisions or the adjustments do."""
        if not self._tag:
            revisions = [item.effective for item in self._revisions]
            names = [[item.id, item.effective] for item in self._adjustments]
            self._tag = _canonical.chain("", _canonical.to_bytes([revisions, names]))
        return self._tag

    # Changing the plan.

    def revise(self, revision: Revision) -> None:
        """Let a revision hold from its effective progress on, in place of every older one."""
        self._revisions.append(revision)
        self._changed()

    def reopen(self, begin: int) -> None:
        """Let the trainers' revisions hold from `begin` on, where their new attempt starts.

        Otherwise an attempt that goes back behind one would meet the groups and the delay of a
        spec that its trainers no longer have.
        """
        self._revisions = [revision.reopened(begin) for revision in self._revisions]
        self._changed()

    def forget(self, progress: int) -> "Plan":
        """Return the plan without what was decided on losses from `progress` on.

        What operators did stays, and so does the cut of a rollback.
        """
        kept = (
            item
            for item in self._adjustments
            if item.decided_at < progress or item.order >= ORDER_OF_OPERATORS
        )
        return Plan(self._revisions, kept, self.rollbacks)

    def adjust(self, adjustment: Adjustment) -> None:
        """Add one adjustment."""
        insort(self._adjustments, adjustment, key=lambda item: item.key)
        self._changed()
        # What was planned at the same progress by those that come behind it changes with it.
        for index, item in enumerate(self._adjustments):
            if item.effective == adjustment.effective and item.key > adjustment.key:
                self._restate(index)

    def restate(self, begin: int, last: int) -> None:
        """State anew what operators did with effect from `begin` up to and with `last`."""
        for index, item in enumerate(self._adjustments):
            if item.order >= ORDER_OF_OPERATORS and begin <= item.effective <= last:
                self._restate(index)
        self._changed()

    def _restate(self, index: int) -> None:
        others = [*self._adjustments[:index], *self._adjustments[index + 1 :]]
        self._adjustments[index] = Plan(self._revisions, others).stated(self._adjustments[index])

    def postpone(self, begin: int, end: int, seq: int, observes_from: int) -> None:
        """Let what operators did after the event with that `seq` wait until `end`.

        It is what would take effect from `begin` on. The policies of a new spec see the losses
        from `observes_from` on. What it does is to be stated anew.
        """
        self._adjustments = sorted(
            (item.postponed(begin, end, seq) for item in self._adjustments),
            key=lambda item: item.key,
        )
        self._revisions = [
            item.postponed(begin, end, seq, observes_from) for item in self._revisions
        ]
        self._changed()

    def rolled_back(self, rollback: Rollback, directive: str) -> list[Adjustment]:
        """Note a rollback; return what it takes the place of: the cuts of earlier ones, and the
        directive that asked for it, lest a restarted job meet it once more."""
        self.rollbacks += (rollback,)
        replaced = self.cuts_from(rollback.begin)
        replaced += [item for item in self._adjustments if item.id == directive]
        if replaced:
            self._adjustments = [item for item in self._adjustments if item not in replaced]
            self._changed()
        return replaced

    def before_cuts(self, progress: int) -> "tuple[Plan, list[Adjustment]]":
        """Return the plan without the cuts of rollbacks past `progress`, and these in order."""
        cuts = self.cuts_from(progress + 1)
        others = (item for item in self._adjustments if item not in cuts)
        return Plan(self._revisions, others, self.rollbacks), cuts

    def cuts_from(self, progress: int) -> list[Adjustment]:
        """Return the cuts of rollbacks that show from `progress` on or later."""
        return [
            item
            for item in self._adjustments
            if item.kind == "rollback" and item.effective >= progress
        ]

    def stated(self, adjustment: Adjustment) -> Adjustment:
        """Return an adjustment that is not in the plan with what it does at its first progress."""
        at = adjustment.effective
        before, decays_before = self.values(at)
        with_it = Plan(self._revisions, [*self._adjustments, adjustment])
        after, decays_after = with_it.values(at)
        return replace(
            adjustment,
            before=before,
            after=after,
            decays_before=decays_before or (),
            decays_after=decays_after or (),
        )

    # Reading it.

    def find(self, name: str) -> Adjustment | None:
        """Return the adjustment with that id, or None."""
        return next((item for item in self._adjustments if item.id == name), None)

    def undone(self, progress: int) -> set[str]:
        """Return the marks of the adjustments that are taken back at `progress`."""
        return self._undone(bisect_right(self._effectives, progress))

    def in_force(self, progress: int) -> tuple[Adjustment, ...]:
        """Return the changes of LR and WD that count at `progress`, in order."""
        if not self._adjustments:
            return ()
        revision = self._revision_at(progress)
        stages = self._stages(revision)
        begin, last = self._span(stages[stage_at(stages, progress)], progress)
        links = (*self._chain(begin, last, decays=False), *self._chain(begin, last, decays=True))
        ids = {id(item) for item in links}
        return tuple(
            item
            for item in self._adjustments[:last]
            if id(item) in ids and not is_over(item, progress)
        )

    def changes(self, begin: int, last: int) -> list[Adjustment]:
        """Return what changes LR or WD from `begin` up to and with `last`, in order."""
        first = bisect_left(self._effectives, begin)
        end = bisect_right(self._effectives, last)
        kinds = (*ENDABLE, *STAGE_CHANGES, Undo)
        return [item for item in self._adjustments[first:end] if isinstance(item.change, kinds)]

    def departures(self, progress: int) -> list[Adjustment]:
        """Return what makes the values at `progress` others than the base schedule's, in order."""
        counting = {item.id for item in self.in_force(progress)}
        return [
            item
            for item in self._adjustments[: bisect_right(self._effectives, progress)]
            if item.id in counting
            or (isinstance(item.change, STAGE_CHANGES) and self._shows(item, progress))
        ]

    def _shows(self, adjustment: Adjustment, progress: int) -> bool:
        """Return whether the values at `progress` are others without an adjustment."""
        others = (item for item in self._adjustments if item is not adjustment)
        return Plan(self._revisions, others).values(progress) != self.values(progress)

    def own(self, kind: str, progress: int, others: Set[str] = frozenset()) -> list[Adjustment]:
        """Return what a kind of policy has in force at `progress` that can be taken back.

        `others` are the sources that are not meant, although of that kind.
        """
        return [
            item
            for item in self.in_force(progress)
            if item.kind == kind and item.source not in others and isinstance(item.change, ENDABLE)
        ]

    def last_change(self, progress: int) -> int | None:
        """Return where the last change of LR or WD up to `progress` took effect, or None."""
        last = bisect_right(self._effectives, progress)
        for item in reversed(self._adjustments[:last]):
            if isinstance(item.change, ENDABLE):
                return item.effective
        return None

    def _spells(self, progress: int) -> Iterator[Change]:
        """Yield the holds, curves and anneals in force at `progress`; seldom is there any."""
        if not self._has_spells:
            return
        for item in self.in_force(progress):
            if isinstance(item.change, (Hold, Curve, BeginDecay)):
                yield item.change

    def directives(self, begin: int, last: int) -> list[Adjustment]:
        """Return the directives that take effect from `begin` up to and with `last`."""
        return [item for item in self._directives if begin <= item.effective <= last]

    def observing(self, progress: int) -> RunSpec:
        """Return the spec whose policies see the loss at `progress`."""
        return self._observing(progress).spec

    def observed_stage(self, progress: int) -> StageSchedule:
        """Return the stage whose policies see the loss at `progress`."""
        stages = self._stages(self._observing(progress))
        return stages[stage_at(stages, progress)]

    def stage(self, progress: int) -> StageSchedule:
        """Return the stage that holds `progress`."""
        stages = self._stages(self._revision_at(progress))
        return stages[stage_at(stages, progress)]

    def can_leave(self, name: str, progress: int) -> bool:
        """Return whether a stage is in force at `progress` and could be left there."""
        stage = self.stage(progress)
        has_ended = stage.stays_from is not None and stage.stays_from <= progress
        return stage.name == name and stage.begin < progress and not has_ended

    def stages(self) -> tuple[StageSchedule, ...]:
        """Return the stages of the newest spec as they are planned now."""
        return self._stages(self._revisions[-1])

    def phase(self, progress: int, known_until: int | None = None) -> Phase:
        """Return where in the base schedule `progress` lies.

        A stage that is left behind `known_until` counts as if it ended where the spec says: in
        an attempt that comes by once more, an operator's step is in the plan beforehand.
        """
        revision = self._revision_at(progress)
        stages = self._stages(revision)
        index = stage_at(stages, progress)
        stage = stages[index]
        end = stage.decay_end
        until = stage.until
        if until is not None and known_until is not None and until > known_until:
            until = revision.stages[index].until
        if until is not None:
            end = min(end, until)
        decays = any(isinstance(change, BeginDecay) for change in self._spells(progress))
        if progress > end:
            name = "ended"
        elif stage.warmup_end > stage.begin and progress <= stage.warmup_end:
            name = "warmup"
        elif decays:
            name = "decay"
        elif stage.style == "constant":
            name = "constant"
        else:
            is_stable = stage.style == "wsd" and progress <= stage.decay_begin
            name = "stable" if is_stable else "decay"
        return Phase(
            stage=stage.name,
            index=index,
            name=name,  # type: ignore[arg-type]
            begin=stage.begin,
            warmup_end=stage.warmup_end,
            decay_begin=stage.decay_begin,
            end=end,
        )

    def quiet(self, progress: int) -> set[Quiet]:
        """Return why some policies observe nothing at `progress`."""
        reasons: set[Quiet] = set()
        for change in self._spells(progress):
            if isinstance(change, Hold):
                reasons.add("hold")
            elif isinstance(change, Curve):
                reasons.add("dip")
        phase = self.phase(progress)
        if phase.index:
            settled = max(phase.warmup_end, phase.begin + self.observing(progress).delay)
            if progress < settled:
                reasons.add("stage change")
        elif phase.name == "warmup":
            reasons.add("warmup")
        if phase.name == "stable":
            reasons.add("stable phase")
        return reasons

    def values(self, progress: int, groups: Sequence[int] | None = None) -> Values:
        """Return the learning rates and the weight decays at `progress`, one per group.

        The weight decays are None when the run sets none. `groups`: positions of those wanted;
        None: all.
        """
        revision = self._revision_at(progress)
        stages = self._stages(revision)
        index = stage_at(stages, progress)
        span = self._span(stages[index], progress)
        groups = range(len(revision.spec.group_names)) if groups is None else groups
        lrs = tuple(self._learning_rate(revision, index, group, progress, span) for group in groups)
        if not revision.spec.has_weight_decay:
            return lrs, None
        return lrs, tuple(
            self._weight_decay(revision, index, group, progress, span) for group in groups
        )

    def base(self, progress: int, groups: Sequence[int] | None = None) -> tuple[float, ...]:
        """Return the learning rates at `progress` without adjustments, one per group.

        `groups`: positions of those wanted; None: all.
        """
        revision = self._revision_at(progress)
        index = stage_at(self._stages(revision), progress)
        groups = range(len(revision.spec.group_names)) if groups is None else groups
        return tuple(
            self._base(revision, index, group, progress, adjusted=False) for group in groups
        )

    def copy(self) -> "Plan":
        """Return a plan that gives the same values, for use on another thread."""
        return Plan(self._revisions, self._adjustments, self.rollbacks)

    def spec_at(self, progress: int) -> RunSpec:
        """Return the spec that the values at `progress` follow."""
        return self._revision_at(progress).spec

    def corners(self, begin: int, last: int) -> list[int]:
        """Return where in [begin, last] LR and WD may jump or bend, in order.

        It is the last progress before each such place and the first one behind it, so that between
        two of them a schedule of straight lines is straight, and any other one smooth. Where a
        change meets a limit on the way, it may bend as well.
        """
        found: set[int] = set()
        for index, revision in enumerate(self._revisions):
            if all(item.effective > revision.effective for item in self._revisions[index + 1 :]):
                found |= {revision.effective - 1, revision.effective}
            for stage in self._stages(revision):
                found |= {at for at in stage.corners() if self._revision_at(max(0, at)) is revision}
        for item in self._adjustments:
            found |= {item.effective - 1, item.effective}
            match item.change:
                case Hold() as change if change.length is not None:
                    found |= {item.effective + change.length - 1, item.effective + change.length}
                case BeginDecay() as change:
                    found |= {item.effective + change.length, item.effective + change.length + 1}
                case Curve() as change:
                    for offset, _ in change.points:
                        found |= {item.effective + offset - 1, item.effective + offset}
        return sorted(at for at in found if begin <= at <= last)

    def _revision_at(self, progress: int) -> Revision:
        for revision in reversed(self._revisions):
            if revision.effective <= progress:
                return revision
        return self._revisions[0]

    def _revision_met_by(self, item: Adjustment) -> Revision:
        """Return the revision at an adjustment's progress, without one that came there later."""
        for revision in reversed(self._revisions):
            is_later = revision.effective == item.effective and revision.came_after(item)
            if revision.effective <= item.effective and not is_later:
                return revision
        return self._revisions[0]

    def _observing(self, progress: int) -> Revision:
        for revision in reversed(self._revisions):
            if revision.observes_from <= progress:
                return revision
        return self._revisions[0]

    def _stages(self, revision: Revision) -> tuple[StageSchedule, ...]:
        if not self._moves_stages:
            return revision.stages
        known = self._stage_lists.get(id(revision))
        if known is None:
            left: dict[str, list[int]] = {}
            stretches = []
            for item in self._adjustments:
                if isinstance(item.change, NextStage):
                    left.setdefault(item.change.leaves, []).append(item.effective)
                elif isinstance(item.change, StretchWarmup):
                    stretches.append((item.effective, item.change.factor))
            known = stage_schedules(revision.spec, left, tuple(stretches))
            self._stage_lists[id(revision)] = known
        return known

    def _base(
        self, revision: Revision, index: int, group: int, progress: int, *, adjusted: bool
    ) -> float:
        stages = self._stages(revision)
        stage = stages[index]
        init = None
        if stage.init_current and index > 0:
            init = self._init(revision, index, group, adjusted=adjusted)
        return stage.learning_rate(group, progress, init)

    def _init(self, revision: Revision, index: int, group: int, *, adjusted: bool) -> float:
        """Return the LR just before a stage begins that starts from it."""
        stages = self._stages(revision)
        known = self._inits.setdefault((id(revision), group, adjusted), {})
        first = index
        while first > 1 and stages[first - 1].init_current and first - 1 not in known:
            first -= 1
        # From the first that is not known on, so that a long row of such stages does not nest.
        for at in range(first, index + 1):
            if at in known:
                continue
            begin = stages[at].begin
            if adjusted:
                span = (stages[at - 1].begin, bisect_left(self._effectives, begin))
                known[at] = self._learning_rate(revision, at - 1, group, begin, span)
            else:
                known[at] = self._base(revision, at - 1, group, begin, adjusted=False)
        return known[index]

    def _span(self, stage: StageSchedule, progress: int) -> tuple[int, int]:
        """Return where a stage begins, and the index of the first adjustment behind `progress`."""
        return stage.begin, bisect_right(self._effectives, progress)

    def _chain(self, begin: int, last: int, *, decays: bool) -> tuple[Adjustment, ...]:
        """Return the links of a chain in order, without those that were taken back.

        Entering a stage at `begin` ends all that came before, save a hold. What a policy decided
        less than D before it shows inside the stage, as any decision shows at n + D.
        """
        known = self._chains.get((begin, last, decays))
        if known is None:
            kinds: tuple[type[Any], ...] = DECAY_CHANGES if decays else RATE_CHANGES
            undone = self._undone(last)
            known = tuple(
                item
                for item in self._adjustments[:last]
                if isinstance(item.change, kinds)
                and (item.effective >= begin or isinstance(item.change, Hold))
                and not (undone and item.mark in undone)
            )
            self._chains[begin, last, decays] = known
        return known

    def _undone(self, last: int) -> set[str]:
        """Return the marks of what the first `last` adjustments take back."""
        return {
            target
            for item in self._adjustments[:last]
            if isinstance(item.change, Undo)
            for target in item.change.targets
        }

    def _learning_rate(
        self, revision: Revision, index: int, group: int, progress: int, span: tuple[int, int]
    ) -> float:
        """Return the adjusted learning rate, with the adjustments in `span`."""
        begin, last = span
        lr = base = self._base(revision, index, group, progress, adjusted=True)
        chain = self._chain(begin, last, decays=False)
        if not chain:
            return base
        memo = self._memo.get(group)
        if memo is not None and memo[:4] == (revision.effective, begin, last, base):
            return memo[4]
        bounds = bounds_of(revision.spec)
        scales = self._scales(span, group, bounds, chain)
        if scales is not None:
            lr = scaled(base, scales)
        else:
            for item in counting(chain, progress):
                lr = self._changed_rate(item, lr, group, progress, bounds)
        if not (self._has_spells and any(_moves(item.change) for item in chain)):
            self._memo[group] = (revision.effective, begin, last, base, lr)
        return lr

    def _scales(
        self,
        span: tuple[int, int],
        group: int,
        bounds: tuple[float, float],
        chain: tuple[Adjustment, ...],
    ) -> "tuple[Scale, ...] | None":
        """Return a chain that only multiplies and divides in a form that is quickly evaluated.

        A policy that acts often makes long ones, and on a moving base each is evaluated at each
        progress. None: there are other links.
        """
        key = (*span, group, *bounds)
        if key not in self._compiled:
            scales = [_scale_of(item.change, group, bounds) for item in chain]
            known = [scale for scale in scales if scale is not None]
            self._compiled[key] = tuple(known) if len(known) == len(scales) else None
        return self._compiled[key]

    def _changed_rate(
        self,
        item: Adjustment,
        lr: float,
        group: int,
        progress: int,
        bounds: tuple[float, float],
    ) -> float:
        """Return `lr` after one link of the chain, within the run's bounds."""
        low, high = bounds
        scale = _scale_of(item.change, group, bounds)
        if scale is not None:
            return scaled(lr, (scale,))
        match item.change:
            case SetRate() as change:
                reference = self._anchor(item, 0)
                new = change.lr * (lr / reference) if reference > 0.0 else lr
            case Curve() as change:
                new = lr * curve_factor(change, progress - item.effective)
            case Hold():
                return self._anchor(item, group)
            case BeginDecay() as change:
                start, floor = self._anchor(item, group), self._floor(item, group)
                if start <= floor:
                    return min(lr, start)
                ratio = min(float(progress - item.effective) / float(change.length), 1.0)
                k = anneal_factor(change.style, ratio)
                # The base may be on its way down already: an anneal never raises.
                return lowered(lr, floor + k * (start - floor), low)
            case _:
                return lr
        return lowered(lr, new, low) if new < lr else raised(lr, new, high)

    def _weight_decay(
        self, revision: Revision, index: int, group: int, progress: int, span: tuple[int, int]
    ) -> float:
        stage = self._stages(revision)[index]
        decay = stage.weight_decay(group, progress) or 0.0
        for item in counting(self._chain(*span, decays=True), progress):
            if isinstance(item.change, Hold):
                decay = self._anchor(item, group, decays=True)
            elif isinstance(item.change, ScaleWeightDecay):
                bound = item.change.max_weight_decay
                bound = LARGEST_RATE if bound is None else bound
                decay = min(decay * item.change.factor, max(decay, bound))
        return decay

    def _anchor(self, item: Adjustment, group: int, *, decays: bool = False) -> float:
        """Return the LR or WD of a group where a link takes effect, just before it."""
        key = (item, group, decays)
        known = self._anchors.get(key)
        if known is None:
            at = item.effective
            revision = self._revision_met_by(item)
            stages = self._stages(revision)
            index = stage_at(stages, at)
            last = bisect_left(self._adjustments, item.key, key=lambda other: other.key)
            span = (stages[index].begin, last)
            evaluate = self._weight_decay if decays else self._learning_rate
            group = min(group, len(revision.spec.group_names) - 1)
            known = self._anchors[key] = evaluate(revision, index, group, at, span)
        return known

    def _floor(self, item: Adjustment, group: int) -> float:
        return _of_group(self.stage(item.effective).floors, group)


@dataclass(frozen=True)
class PlanView:
    """What a policy may look at: the values where its decision would show."""

    plan: Plan
    now: int
    """The progress n."""
    at: int
    """The progress n + D."""

    @cached_property
    def base(self) -> tuple[float, ...]:
        """Learning rates at `at` without adjustments, one per group."""
        return self.plan.base(self.at)

    @cached_property
    def adjusted(self) -> tuple[float, ...]:
        """Learning rates at `at` with the adjustments decided so far, one per group."""
        return self.plan.values(self.at)[0]

    @cached_property
    def weight_decay(self) -> tuple[float, ...] | None:
        """Weight decays at `at` with the adjustments decided so far, one per group."""
        return self.plan.values(self.at)[1]

    @property
    def peak(self) -> tuple[float, ...]:
        """Peak of the base LR in the stage that holds `at`."""
        return self.plan.stage(self.at).peaks

    @cached_property
    def phase(self) -> Phase:
        """Where in the base schedule n lies."""
        return self.plan.phase(self.now, self.at)

    @property
    def total(self) -> int:
        """Planned length of the run."""
        return self.plan.observing(self.now).total


def taking_back(adjustments: Sequence[Adjustment], reason: str) -> Undo:
    """Return the change that takes adjustments back."""
    marks = tuple(item.mark for item in adjustments)
    return Undo(marks, reason, ids=tuple(item.id for item in adjustments))


def curve_factor(curve: Curve, offset: int) -> float:
    """Return the factor of a curve at `offset` past the progress where it took effect."""
    points = curve.points
    if offset <= points[0][0]:
        return points[0][1]
    for (begin, start), (end, stop) in pairwise(points):
        if offset < end:
            return start + (stop - start) * (float(offset - begin) / float(end - begin))
    return points[-1][1]


def is_over(adjustment: Adjustment, progress: int) -> bool:
    """Return whether a change that ends by itself has done so at `progress`."""
    past = progress - adjustment.effective
    match adjustment.change:
        case Hold() as change:
            return change.length is not None and past >= change.length
        case Curve() as change:
            return past >= change.points[-1][0] and change.points[-1][1] == 1.0
        case _:
            return False


def _moves(change: Change) -> bool:
    """Return whether a link gives other values on a constant base."""
    return isinstance(change, (Curve, BeginDecay)) or (
        isinstance(change, Hold) and change.length is not None
    )


def _scale_of(change: Change, group: int, bounds: tuple[float, float]) -> Scale | None:
    """Return a multiplication or division as it is for one group, within the run's bounds."""
    low, high = bounds
    match change:
        case Multiply() if change.factor < 1.0:
            return "cut", change.factor, max(_of_group(change.min_lr, group), low), change.eps
        case Multiply():
            ceiling = high if change.max_lr is None else _of_group(change.max_lr, group)
            return "raise", change.factor, min(ceiling, high), change.eps
        case Divide():
            return "divide", change.divisor, min(_of_group(change.max_lr, group), high), change.eps
        case _:
            return None


def bounds_of(spec: RunSpec) -> tuple[float, float]:
    """Return the limits of adjusted LRs."""
    if spec.bounds is None:
        return 0.0, LARGEST_RATE
    high = spec.bounds.max_lr
    return spec.bounds.min_lr, LARGEST_RATE if high is None else high


def _of_group(limits: tuple[float, ...], group: int) -> float:
    """Return the limit of a group; those that a later spec added have the last one's."""
    return limits[min(group, len(limits) - 1)]
