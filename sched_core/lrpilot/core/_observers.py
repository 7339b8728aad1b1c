"""Everything that watches the losses: the policies, and the averages shown to people."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from lrpilot.core._changes import Change, Direct, EndOwn, NextStage, Note, Undo
from lrpilot.core._plan import (
    ENDABLE,
    ORDER_OF_DETECTORS,
    ORDER_OF_STAGES,
    Adjustment,
    Plan,
    PlanView,
    taking_back,
)
from lrpilot.core._spec import Condition, RunSpec, StageSpec, parse_policy
from lrpilot.core._stage_end import StageEnd
from lrpilot.core.policies import (
    DETECTORS,
    Observation,
    Policy,
    PolicySpec,
    Quiet,
    Rollback,
    build_policy,
)

NEWEST_WEIGHT = 0.02
"""Weight of the newest loss in the smoothed loss."""


@dataclass(frozen=True, slots=True)
class Watch:
    """One policy, or the end of one stage, and where it stands."""

    spec: PolicySpec | StageSpec
    stage: str
    """Name of the stage in which it watches: in another one it starts afresh."""
    state: Any
    muted_until: int = 0
    """After its own decision at n a policy observes nothing in (n, n + D). Where all of it was held
    back, the policy stays as it was, and observes nothing until the interval is over."""

    @property
    def mode(self) -> str:
        """`act`, `advise` or `off`."""
        return "act" if isinstance(self.spec, StageSpec) else self.spec.mode

    @property
    def quiet(self) -> frozenset[Quiet]:
        """When it observes nothing."""
        if isinstance(self.spec, StageSpec):
            return frozenset({"hold", "dip", "stage change", "warmup"})
        return self.spec.quiet


class Standing(NamedTuple):
    """How near a policy, or the end of a stage, is to a decision. For people."""

    source: str
    """Its name, as adjustments carry it."""
    kind: str
    """Kind of the policy, or `stage`."""
    mode: str
    """`act`, `advise` or `off`."""
    bad: int | None
    """What speaks for a decision, in a row: reports without improvement, means that are too high,
    outliers, non-finite losses. None: it counts no such thing."""
    cooldown: int | None
    """Reports that it will pass over still, after a cut; None: it knows no cooldown."""


@dataclass(frozen=True, slots=True)
class Observers:
    """State after the first `count` losses; a pure function of them and of the plan."""

    count: int = 0
    watches: tuple[Watch, ...] = ()
    nonfinite: int = 0
    skipped: int = 0
    """Number of skipped updates."""
    average: float = 0.0
    average_weight: float = 0.0
    validation: tuple[tuple[str, float], ...] = ()
    """Newest validation losses, in order of name."""

    @property
    def smoothed_loss(self) -> float | None:
        """Exponential average of the finite losses, bias corrected; None before the first."""
        return self.average / self.average_weight if self.average_weight else None

    def observe(
        self,
        plan: Plan,
        observation: Observation,
        seq: int,
        known: Mapping[tuple[int, int], int] | None = None,
    ) -> tuple["Observers", list[Adjustment]]:
        """Return the state after one more observation and what the policies decide on it.

        Adjustments in mode act are added to the plan before the next policy looks at it. `seq` is
        that of the event; where it is seen once more, `known` has those of its decisions, by
        progress and order.
        """
        n = observation.progress
        spec = plan.observing(n)
        stage = plan.observed_stage(n)
        view = _Moment(plan, spec, n=n, seq=seq, known=known or {})
        watches = []
        decided: list[Adjustment] = []
        watching = self._watching(spec, stage.name)
        view.sources = {source for (_, source), _ in watching}
        for (order, source), watch in watching:
            if watch.mode == "off" or n < watch.muted_until or not view.is_heard(watch):
                watches.append(watch)
                continue
            policy = _policy(watch.spec, spec.group_names)
            if observation.is_skipped and not policy.reads_skipped:
                watches.append(watch)
                continue
            try:
                state, changes = policy.observe(watch.state, observation, view.plan_view())
            except (ArithmeticError, ValueError) as error:
                # The report is in the log: a policy that cannot take it must not end the run.
                why = f"it cannot take what was reported at {n} and passes it over: {error!r}"
                state, changes = watch.state, (Note(why),)
            made = view.decide(changes, watch, order, source)
            decided += made
            if made and all(item.mode == "held back" for item in made):
                watches.append(replace(watch, muted_until=view.free_from()))
                continue
            waits = any(not isinstance(item.change, Note) for item in made)
            watches.append(Watch(watch.spec, watch.stage, state, view.at if waits else 0))
        return self._after(observation, tuple(watches)), decided

    def standings(self, plan: Plan, progress: int) -> list[Standing]:
        """Return where each one stands that watches at `progress`, in order."""
        spec = plan.observing(progress)
        found = []
        for (_, source), watch in self._watching(spec, plan.observed_stage(progress).name):
            policy = _policy(watch.spec, spec.group_names)
            bad = getattr(watch.state, policy.counts_bad) if policy.counts_bad else None
            cooldown = getattr(watch.state, "cooldown", None)
            found.append(Standing(source, policy.kind, watch.mode, bad, cooldown))
        return found

    def to_mapping(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return {
            "count": self.count,
            "watches": [
                {
                    "spec": watch.spec.model_dump(mode="json", by_alias=True, exclude_none=True),
                    "stage": watch.stage,
                    "ends_stage": isinstance(watch.spec, StageSpec),
                    "state": _policy(watch.spec, None).encode(watch.state),
                    "muted_until": watch.muted_until,
                }
                for watch in self.watches
            ],
            "nonfinite": self.nonfinite,
            "skipped": self.skipped,
            "average": self.average,
            "average_weight": self.average_weight,
            "validation": self.validation,
        }

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> "Observers":
        """Return the state that `to_mapping` wrote."""
        watches = []
        for item in data["watches"]:
            spec: PolicySpec | StageSpec
            if item["ends_stage"]:
                spec = StageSpec.model_validate(item["spec"])
            else:
                spec = parse_policy(item["spec"])
            state = _policy(spec, None).decode(item["state"])
            watches.append(Watch(spec, item["stage"], state, item["muted_until"]))
        return cls(
            count=data["count"],
            watches=tuple(watches),
            nonfinite=data["nonfinite"],
            skipped=data["skipped"],
            average=float(data["average"]),
            average_weight=float(data["average_weight"]),
            validation=tuple((name, float(value)) for name, value in data["validation"]),
        )

    def _watching(self, spec: RunSpec, stage: str) -> list[tuple[tuple[int, str], Watch]]:
        """Return who watches in a stage, each with its order and name.

        A policy that did not change goes on, save that in another stage it starts afresh.
        """
        wanted = _wanted(spec, stage)
        if len(self.watches) == len(wanted) and all(
            watch.spec is item and watch.stage == stage
            for watch, (_, item) in zip(self.watches, wanted, strict=True)
        ):
            return [(name, watch) for (name, _), watch in zip(wanted, self.watches, strict=True)]
        left = list(self.watches)
        result = []
        for name, item in wanted:
            known = next(
                (watch for watch in left if watch.spec == item and watch.stage == stage), None
            )
            if known is None:
                known = Watch(item, stage, _policy(item, spec.group_names).initial())
            else:
                left.remove(known)
                # The very object of the spec, so that the next look is a quick one.
                known = replace(known, spec=item)
            result.append((name, known))
        return result

    def _after(self, observation: Observation, watches: tuple[Watch, ...]) -> "Observers":
        """Return the state with new watches, and with the counts and averages after a report."""
        changes: dict[str, Any] = {"watches": watches}
        loss = observation.loss
        if observation.is_skipped:
            changes["skipped"] = self.skipped + 1
        elif loss is not None:
            changes["count"] = self.count + 1
        is_broken = loss is not None and not math.isfinite(loss)
        if is_broken or observation.left_out:
            changes["nonfinite"] = self.nonfinite + observation.left_out + is_broken
        if loss is not None and not is_broken and not observation.is_skipped:
            changes["average"] = (1.0 - NEWEST_WEIGHT) * self.average + NEWEST_WEIGHT * loss
            changes["average_weight"] = (1.0 - NEWEST_WEIGHT) * self.average_weight + NEWEST_WEIGHT
        if observation.validation:
            newest = {**dict(self.validation), **observation.validation}
            changes["validation"] = tuple(sorted(newest.items()))
        return replace(self, **changes)


class _Moment:
    """One observation against the plan: who hears it, and what becomes of what they propose."""

    def __init__(
        self,
        plan: Plan,
        spec: RunSpec,
        *,
        n: int,
        seq: int,
        known: Mapping[tuple[int, int], int],
    ) -> None:
        self.at = n + spec.delay
        self.sources: set[str] = set()
        """Names of all who watch now. What one of them did under a name that nobody has any more
        is its own still: a revision may have moved it."""
        self._plan = plan
        self._n = n
        self._spec = spec
        self._seq = seq
        self._known = known
        self._quiet: set[Quiet] | None = None

    def is_heard(self, watch: Watch) -> bool:
        """Return whether a policy observes what happened now."""
        if not watch.quiet:
            return True
        if self._quiet is None:
            self._quiet = self._plan.quiet(self._n)
        return not watch.quiet & self._quiet

    def plan_view(self) -> PlanView:
        """Return what the next policy sees."""
        return PlanView(self._plan, self._n, self.at)

    def decide(
        self, changes: Sequence[Change], watch: Watch, order: int, source: str
    ) -> list[Adjustment]:
        """Return what the proposals of one policy become; those that act join the plan."""
        if not changes:
            return []
        mode = watch.mode
        kind = "stage" if isinstance(watch.spec, StageSpec) else watch.spec.kind
        held_back = mode == "act" and self._comes_too_soon(changes)
        # A decision is held back as a whole, save what only asks or says something.
        waits = (*ENDABLE, Undo) if held_back else ()
        made = []
        for part, (change, ends_own) in enumerate(self._resolved(changes, mode, kind, source)):
            adjustment = self._plan.stated(
                Adjustment(
                    effective=self.at,
                    decided_at=self._n,
                    order=order,
                    part=part,
                    kind=kind,
                    source=source,
                    mode="held back" if isinstance(change, waits) else mode,
                    change=change,
                    before=(),
                    after=(),
                    decays_before=(),
                    decays_after=(),
                    seq=self._known.get((self._n, order), self._seq),
                    expires=self.at + self._lifetime() if mode == "advise" else 0,
                    ends_own=ends_own,
                )
            )
            if adjustment.mode == "act":
                self._plan.adjust(adjustment)
            made.append(adjustment)
        return made

    def _resolved(
        self, changes: Sequence[Change], mode: str, kind: str, source: str
    ) -> Iterator[tuple[Change, bool]]:
        """Yield what the proposals are now, and of advice whether it ends what came before.

        What there is to end is known only when an advice is approved.
        """
        ends_own = False
        for change in changes:
            if isinstance(change, EndOwn):
                own = self._plan.own(kind, self.at, self.sources - {source})
                if mode != "advise" and own:
                    yield taking_back(own, change.reason), False
                elif mode == "advise" and len(changes) > 1:
                    ends_own = True
                elif own:
                    yield change, False
            elif isinstance(change, Direct) and change.directive == "rollback":
                yield limited(change, self._plan.rollbacks, self._n), False
            elif isinstance(change, NextStage) and not self._plan.can_leave(change.leaves, self.at):
                # An operator was faster, or it is the last stage and has ended already.
                continue
            else:
                yield change, ends_own

    def free_from(self) -> int:
        """Return the first progress whose loss may change LR or WD once more."""
        interval = self._spec.feedback.interval
        last = self._plan.last_change(self.at)
        if not interval or last is None:
            return self._n
        return last + interval - self._spec.delay

    def _comes_too_soon(self, changes: Sequence[Change]) -> bool:
        return self._n < self.free_from() and any(isinstance(change, ENDABLE) for change in changes)

    def _lifetime(self) -> int:
        return self._spec.feedback.advice_expires or max(1, self._spec.total // 20)


def limited(change: Direct, rollbacks: Sequence[Rollback], n: int) -> Direct:
    """Return the rollback that a loss at `n` asks for, or `stop` where there were too many.

    A region reaches from where a rollback went back to, up to as far again behind the loss that
    asked for it: damage that comes back is often met a little later.
    """
    near = [item for item in rollbacks if item.begin <= n <= 2 * item.decided_at - item.begin]
    if change.limit is None or len(near) < change.limit:
        return change
    reason = f"{change.reason}; {len(near)} rollbacks into this region did not save it"
    return Direct("stop", reason)


def _wanted(spec: RunSpec, stage: str) -> list[tuple[tuple[int, str], PolicySpec | StageSpec]]:
    """Return who is to watch in a stage, in order, each with its order and name."""
    key = (id(spec), stage)
    known = _wanted_cache.get(key)
    if known is not None and known[0] is spec:
        return known[1]
    index = next((at for at, item in enumerate(spec.stages) if item.name == stage), 0)
    own = bool(spec.stages) and spec.stages[index].policies is not None
    prefix = f"stages.{index}.policies" if own else "policies"
    policies = spec.policies_in(index)
    wanted: list[tuple[tuple[int, str], PolicySpec | StageSpec]] = [
        ((order, f"{prefix}.{order} ({item.kind})"), item) for order, item in enumerate(policies)
    ]
    if spec.stages and spec.stages[index].when is not None:
        name = f"stages.{index} (when)"
        wanted.append(((ORDER_OF_STAGES, name), spec.stages[index]))
    kinds = {item.kind for item in policies}
    wanted += [
        ((ORDER_OF_DETECTORS + order, f"detector ({item.kind})"), item)
        for order, item in enumerate(DETECTORS)
        if item.kind not in kinds
    ]
    if len(_wanted_cache) >= 256:
        _wanted_cache.clear()
    _wanted_cache[key] = (spec, wanted)
    return wanted


_wanted_cache: dict[
    tuple[int, str], tuple[RunSpec, list[tuple[tuple[int, str], PolicySpec | StageSpec]]]
] = {}
"""Specs are compared by identity: hashing one costs more than all that is cached here."""


def _policy(spec: PolicySpec | StageSpec, groups: tuple[str, ...] | None) -> Policy[Any]:
    if isinstance(spec, StageSpec):
        return StageEnd(spec.name, spec.when or Condition(), spec.earliest)
    return _built(spec, groups)


@lru_cache(maxsize=1024)
def _built(spec: PolicySpec, groups: tuple[str, ...] | None) -> Policy[Any]:
    return build_policy(spec, groups or ("",))
