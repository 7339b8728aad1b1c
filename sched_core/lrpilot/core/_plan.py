"""The plan: base schedule plus adjustments, a pure function of the event log."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lrpilot.core._changes import Multiply
from lrpilot.core._schedules import StageSchedule, stage_at, stage_schedules
from lrpilot.core._spec import RunSpec, parse_spec

INFINITY = float("inf")


@dataclass(frozen=True, slots=True)
class Adjustment:
    """A recorded change of the plan from a progress on."""

    effective: int
    """First progress at which it shows."""
    decided_at: int
    """Progress of the loss that decided it."""
    order: int
    """Position of the policy in the spec: breaks ties between equal `effective`."""
    source: str
    """Who decided, such as `policies.0 (plateau)`."""
    mode: str
    """`act`: part of the plan; `advise`: recorded only."""
    multiply: Multiply
    """What it does to the learning rate."""
    before: tuple[float, ...]
    """Learning rate at `effective` per group, without it."""
    after: tuple[float, ...]
    """Learning rate at `effective` per group, with it."""
    seq: int
    """Sequence number of the event whose fold decided it."""

    @property
    def key(self) -> tuple[int, int, int]:
        """What adjustments apply in order of."""
        return (self.effective, self.order, self.seq)

    @property
    def decision(self) -> tuple[int, int, int]:
        """What tells it from all others of its log, and what people see them in order of."""
        return (self.seq, self.decided_at, self.order)

    def to_mapping(self) -> dict[str, Any]:
        """Return the adjustment as plain data."""
        return {
            "effective": self.effective,
            "decided_at": self.decided_at,
            "order": self.order,
            "source": self.source,
            "mode": self.mode,
            "factor": self.multiply.factor,
            "min_lr": self.multiply.min_lr,
            "max_lr": self.multiply.max_lr,
            "eps": self.multiply.eps,
            "reason": self.multiply.reason,
            "before": self.before,
            "after": self.after,
            "seq": self.seq,
        }

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> "Adjustment":
        """Return the adjustment that `to_mapping` wrote."""
        max_lr = data["max_lr"]
        return cls(
            effective=data["effective"],
            decided_at=data["decided_at"],
            order=data["order"],
            source=data["source"],
            mode=data["mode"],
            multiply=Multiply(
                factor=float(data["factor"]),
                min_lr=_floats(data["min_lr"]),
                max_lr=None if max_lr is None else _floats(max_lr),
                eps=float(data["eps"]),
                reason=data["reason"],
            ),
            before=_floats(data["before"]),
            after=_floats(data["after"]),
            seq=data["seq"],
        )


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

    @cached_property
    def stages(self) -> tuple[StageSchedule, ...]:
        """The base schedule of each stage."""
        return stage_schedules(self.spec)

    def to_mapping(self) -> dict[str, Any]:
        """Return the revision as plain data."""
        return {
            "effective": self.effective,
            "observes_from": self.observes_from,
            "spec": self.spec.to_mapping(),
            "by_trainer": self.by_trainer,
        }

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> "Revision":
        """Return the revision that `to_mapping` wrote."""
        spec = parse_spec(data["spec"])
        return cls(data["effective"], data["observes_from"], spec, data["by_trainer"])

    def reopened(self, begin: int) -> "Revision":
        """Return the revision as an attempt from `begin` on has it."""
        if not self.by_trainer or self.effective <= begin:
            return self
        return replace(self, effective=begin, observes_from=begin)


def clamped_multiply(
    lr: float, change: Multiply, group: int, low: float = 0.0, high: float = INFINITY
) -> float:
    """Return `lr` after one multiplication under its clamps and the run's bounds.

    Down, more precisely: `new = max(lr * factor, floor)`, taken if `lr - new > eps`, where
    `floor` is the greater of the change's own `min_lr` and the bound `low`; up is mirrored.
    A learning rate outside the bounds stays where the base put it: a cut never raises, and a
    raise never lowers. Source: `torch.optim.lr_scheduler.ReduceLROnPlateau`.
    """
    scaled = lr * change.factor
    if change.factor < 1.0:
        new = max(scaled, _of_group(change.min_lr, group), low)
        return new if lr - new > change.eps else lr
    ceiling = high if change.max_lr is None else min(_of_group(change.max_lr, group), high)
    new = min(scaled, ceiling)
    return new if new - lr > change.eps else lr


class Plan:
    """Revisions of the spec and the adjustments on top of them.

    Values come from `values`; nothing else here is needed to hand out learning rates.
    """

    def __init__(self, revisions: Sequence[Revision], adjustments: Iterable[Adjustment]) -> None:
        self._revisions = list(revisions)
        self._adjustments = sorted(adjustments, key=lambda item: item.key)
        self._effectives = [item.effective for item in self._adjustments]
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

    def revise(self, revision: Revision) -> None:
        """Let a revision hold from its effective progress on, in place of every older one."""
        self._revisions.append(revision)
        self._memo.clear()

    def reopen(self, begin: int) -> None:
        """Let the trainers' revisions hold from `begin` on, where their new attempt starts.

        Otherwise an attempt that goes back behind one would meet the groups and the delay of a
        spec that its trainers no longer have.
        """
        self._revisions = [revision.reopened(begin) for revision in self._revisions]
        self._memo.clear()

    def forget(self, progress: int) -> "Plan":
        """Return the plan without what was decided on losses from `progress` on."""
        kept = (item for item in self._adjustments if item.decided_at < progress)
        return Plan(self._revisions, kept)

    def adjust(self, adjustment: Adjustment) -> None:
        """Add one adjustment."""
        insort(self._adjustments, adjustment, key=lambda item: item.key)
        self._effectives = [item.effective for item in self._adjustments]
        self._memo.clear()

    def observing(self, progress: int) -> RunSpec:
        """Return the spec whose policies see the loss at `progress`."""
        for revision in reversed(self._revisions):
            if revision.observes_from <= progress:
                return revision.spec
        return self._revisions[0].spec

    def values(self, progress: int) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
        """Return the learning rates and the weight decays at `progress`, one per group.

        The weight decays are None when the run sets none.
        """
        revision = self._revision_at(progress)
        index = stage_at(revision.stages, progress)
        stage = revision.stages[index]
        groups = range(len(revision.spec.group_names))
        lrs = tuple(self._learning_rate(revision, index, group, progress) for group in groups)
        if not revision.spec.has_weight_decay:
            return lrs, None
        decays = tuple(stage.weight_decay(group, progress) or 0.0 for group in groups)
        return lrs, decays

    def base(self, progress: int) -> tuple[float, ...]:
        """Return the learning rates at `progress` without adjustments, one per group."""
        revision = self._revision_at(progress)
        index = stage_at(revision.stages, progress)
        return tuple(
            self._base(revision, index, group, progress, adjusted=False)
            for group in range(len(revision.spec.group_names))
        )

    def preview(
        self, change: Multiply, progress: int
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the learning rates at `progress` before and after a further multiplication."""
        before, _ = self.values(progress)
        low, high = _bounds(self._revision_at(progress).spec)
        after = tuple(
            clamped_multiply(lr, change, group, low, high) for group, lr in enumerate(before)
        )
        return before, after

    def _revision_at(self, progress: int) -> Revision:
        for revision in reversed(self._revisions):
            if revision.effective <= progress:
                return revision
        return self._revisions[0]

    def _base(
        self, revision: Revision, index: int, group: int, progress: int, *, adjusted: bool
    ) -> float:
        stage = revision.stages[index]
        init = None
        if stage.init_current and index > 0:
            if adjusted:
                init = self._learning_rate(revision, index - 1, group, stage.begin, ended=True)
            else:
                init = self._base(revision, index - 1, group, stage.begin, adjusted=False)
        return stage.learning_rate(group, progress, init)

    def _learning_rate(
        self, revision: Revision, index: int, group: int, progress: int, *, ended: bool = False
    ) -> float:
        """Return the adjusted learning rate; `ended`: just before the next stage begins."""
        stage = revision.stages[index]
        base = self._base(revision, index, group, progress, adjusted=True)
        # Entering a stage ends all scales: only what takes effect inside it applies.
        first = bisect_left(self._effectives, stage.begin) if index else 0
        find = bisect_left if ended else bisect_right
        last = find(self._effectives, progress)
        if first >= last:
            return base
        memo = self._memo.get(group)
        if memo is not None and memo[:4] == (revision.effective, first, last, base):
            return memo[4]
        low, high = _bounds(revision.spec)
        lr = base
        for adjustment in self._adjustments[first:last]:
            lr = clamped_multiply(lr, adjustment.multiply, group, low, high)
        self._memo[group] = (revision.effective, first, last, base, lr)
        return lr


@dataclass(frozen=True)
class PlanView:
    """What a policy may look at: the values where its decision would show."""

    plan: Plan
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


def decide(
    plan: Plan,
    change: Multiply,
    *,
    order: int,
    kind: str,
    mode: str,
    loss_at: int,
    at: int,
    seq: int,
) -> Adjustment:
    """Return the adjustment that a policy's proposal becomes."""
    before, after = plan.preview(change, at)
    return Adjustment(
        effective=at,
        decided_at=loss_at,
        order=order,
        source=f"policies.{order} ({kind})",
        mode=mode,
        multiply=change,
        before=before,
        after=after,
        seq=seq,
    )


def _bounds(spec: RunSpec) -> tuple[float, float]:
    if spec.bounds is None:
        return 0.0, INFINITY
    low, high = spec.bounds.min_lr, spec.bounds.max_lr
    return (0.0 if low is None else low), (INFINITY if high is None else high)


def _of_group(limits: tuple[float, ...], group: int) -> float:
    """Return the limit of a group; those that a later spec added have the last one's."""
    return limits[min(group, len(limits) - 1)]


def _floats(values: Iterable[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
