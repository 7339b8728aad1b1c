"""What operators do to the plan of a run, from the horizon on.

Each function is pure, as those of `_requests` are. Everything that an action depends on is resolved
when it is evaluated and stands in the event, so that a fold needs nothing else.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, TypeAlias, get_args

from lrpilot.core._changes import (
    AnnealStyle,
    BeginDecay,
    Change,
    Direct,
    DirectiveKind,
    EndOwn,
    Hold,
    Multiply,
    NextStage,
    Note,
    ScaleWeightDecay,
    SetRate,
    StretchWarmup,
    Undo,
    change_to_mapping,
)
from lrpilot.core._errors import (
    AdjustmentRefused,
    AdviceExpired,
    InvalidRequest,
    RunFinished,
    Violation,
)
from lrpilot.core._events import Adjusted, Event, Revised
from lrpilot.core._fields import LARGEST_RATE, LENGTH, length_of
from lrpilot.core._observers import limited
from lrpilot.core._plan import ENDABLE, Adjustment, Plan, Revision, bounds_of, taking_back
from lrpilot.core._requests import (
    adjustment_not_found,
    check_signature,
    refuse_changed_plan,
    revise_run,
    run_not_found,
)
from lrpilot.core._spec import RunSpec, parse_spec
from lrpilot.core._state import RunState


@dataclass(frozen=True, slots=True)
class ScaleLearningRate:
    """Multiply the LR of every group by a factor above 0."""

    factor: float


@dataclass(frozen=True, slots=True)
class SetLearningRate:
    """Set the LR of the first group, above 0, and scale the others alike."""

    lr: float


@dataclass(frozen=True, slots=True)
class ScaleDecay:
    """Multiply the WD of every group by a factor from 0 on."""

    factor: float


@dataclass(frozen=True, slots=True)
class DecayNow:
    """Begin the anneal."""

    length: int | float | str
    """A count in the unit, or a share of the progress so far."""
    style: str = "minus_sqrt"


@dataclass(frozen=True, slots=True)
class EnterNextStage:
    """Leave the stage in force."""


@dataclass(frozen=True, slots=True)
class SetTotal:
    """Extend or shorten the run; what ended with it ends with it still."""

    total: int


@dataclass(frozen=True, slots=True)
class HoldValues:
    """Freeze LR and WD."""


@dataclass(frozen=True, slots=True)
class ReleaseValues:
    """End every hold."""


@dataclass(frozen=True, slots=True)
class TakeBack:
    """Undo one adjustment."""

    id: str


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the trainers for something."""

    directive: str
    before: int = 0
    factor: float = 0.5
    until: int = 0


Action: TypeAlias = (
    ScaleLearningRate
    | SetLearningRate
    | ScaleDecay
    | DecayNow
    | EnterNextStage
    | SetTotal
    | HoldValues
    | ReleaseValues
    | TakeBack
    | Ask
)


def adjust_run(
    state: RunState, action: Action, *, reason: str, author: str, request_id: str, etag: str = ""
) -> list[Event]:
    """Change the plan from the horizon on; nothing where it is so already.

    Raises RunNotFound, RunFinished, InvalidRequest, InvalidSpec, AdjustmentRefused,
    AdjustmentNotFound, RevisionRefused, PlanChanged.
    """
    if _is_done(state, request_id):
        return []
    _check(state, reason, author, etag)
    if isinstance(action, SetTotal):
        spec = with_total(state.spec, action.total)
        return revise_run(state, spec, request_id, author=author, reason=reason)
    change = _resolved(state, action, reason)
    if change is None:
        return []
    return [Adjusted(change_to_mapping(change), state.horizon, author, request_id)]


def approve_advice(
    state: RunState, advice: str, *, reason: str, author: str, request_id: str, etag: str = ""
) -> list[Event]:
    """Turn an advice into an adjustment at the horizon.

    Raises RunNotFound, RunFinished, InvalidRequest, AdjustmentRefused, AdjustmentNotFound,
    AdviceExpired, PlanChanged.
    """
    if _is_done(state, request_id):
        return []
    _check(state, reason or "approved", author, etag)
    found = state.find(advice)
    if found is None:
        raise adjustment_not_found(state, advice, "advice")
    changes: list[Change] = []
    change = _approved(state, found)
    if found.ends_own or isinstance(change, EndOwn):
        own = state.plan.own(found.kind, state.horizon)
        changes += [taking_back(own, change.reason)] if own else []
    if not isinstance(change, EndOwn):
        changes.append(change)
    if reason:
        changes = [replace(item, reason=f"{item.reason}; approved: {reason}") for item in changes]
    return [
        Adjusted(change_to_mapping(item), state.horizon, author, request_id, advice)
        for item in changes
    ]


def planned(state: RunState, events: Sequence[Event]) -> Plan:
    """Return the plan as it would be after the events of an operator; the state stays as it is."""
    plan = Plan(state.plan.revisions, state.plan.adjustments, state.plan.rollbacks)
    for offset, event in enumerate(events):
        if isinstance(event, Adjusted):
            plan.adjust(plan.stated(made_next(state, event, offset)))
        elif isinstance(event, Revised) and event.effective is not None:
            spec = parse_spec(event.spec)
            begin = event.observes_from or 0
            plan.revise(Revision(event.effective, begin, spec, seq=state.seq + 1))
    return plan


def made_next(state: RunState, event: Adjusted, offset: int = 0) -> Adjustment:
    """Return what an operator's event makes where it is the next one of the log, or one later."""
    return state.made_by(event, state.seq + 1 + offset)


def with_total(spec: RunSpec, total: int) -> RunSpec:
    """Return the spec with another total; decays and ramps that ended with it end with it still.

    A warmup that was given as a share keeps its length: it may be over. Raises InvalidSpec.
    """
    old = spec.total
    data = spec.to_mapping()
    data["total"] = total
    begin = 0
    for rates, decays, ends in _parts(data):
        if rates is not None:
            decay = rates["decay"]
            end = decay["end"]
            rates["warmup"] = length_of(rates["warmup"], end)
            if end == old:
                decay["end"] = total
        if isinstance(decays, dict) and decays.get("over") == old - begin:
            decays["over"] = total - begin
        if ends is not None:
            for name in ("until", "latest"):
                if ends.get(name) == old:
                    ends[name] = total
            begin = ends.get("until") or ends.get("latest") or begin
    return parse_spec(data)


def _parts(data: Mapping[str, Any]) -> list[tuple[Any, Any, Any]]:
    """Return (learning_rate, weight_decay, stage) of the run and of each stage."""
    stages = data.get("stages", [])
    return [
        (data.get("learning_rate"), data.get("weight_decay"), None),
        *((stage["learning_rate"], stage.get("weight_decay"), stage) for stage in stages),
    ]


def _is_done(state: RunState, request_id: str) -> bool:
    if not state.exists:
        raise run_not_found(state.name, [])
    return request_id in state.answers


def _check(state: RunState, reason: str, author: str, etag: str) -> None:
    if state.finished:
        raise RunFinished(
            f"run {state.name!r} is finished; its plan can no longer change", run=state.name
        )
    check_signature(author, reason)
    refuse_changed_plan(state, etag)


def _resolved(state: RunState, action: Action, reason: str) -> Change | None:
    """Return the change that an action is now; None: nothing is to be done."""
    plan, at = state.plan, state.horizon
    match action:
        case ScaleLearningRate(factor):
            _check_number("scale_lr", factor, "a number above 0")
            if factor == 1.0:
                return None
            return Multiply(factor, reason)
        case SetLearningRate(lr):
            low, high = bounds_of(state.spec)
            _check_number("set_lr", lr, "a number above 0", low, high)
            first = plan.values(at)[0][0]
            if first <= 0.0:
                raise _refused(
                    state,
                    f"the LR of the first group is {first!r} at progress {at}, from where on it "
                    "would be set, so that there is nothing to scale; wait until warmup has begun",
                )
            return SetRate(lr, reason)
        case ScaleDecay(factor):
            if not state.spec.has_weight_decay:
                raise _refused(state, "the run sets no weight decay")
            _check_number("scale_weight_decay", factor, "a number from 0", zero=True)
            return None if factor == 1.0 else ScaleWeightDecay(factor, reason)
        case DecayNow():
            return _decay(state, action, reason)
        case EnterNextStage():
            stage = plan.stage(at)
            if stage.until is None:
                what = f"stage {stage.name!r} is the last one" if stage.name else "it has no stages"
                raise _refused(state, f"no stage comes next at progress {at}: {what}")
            if stage.begin == at:
                raise _refused(state, f"stage {stage.name!r} only begins at progress {at}")
            return NextStage(stage.name, reason)
        case HoldValues():
            # One that ends by itself is not what is asked for.
            changes = (item.change for item in plan.in_force(at))
            if any(isinstance(item, Hold) and item.length is None for item in changes):
                return None
            return Hold(None, reason)
        case ReleaseValues():
            held = _in_force(plan, at, Hold)
            return taking_back(held, reason) if held else None
        case TakeBack(name):
            return _undo(state, name, reason)
        case Ask():
            return _directive(state, action, reason)
        case _:
            raise TypeError(f"no change comes of {action!r}")


def _decay(state: RunState, action: DecayNow, reason: str) -> BeginDecay:
    plan, at = state.plan, state.horizon
    styles = get_args(AnnealStyle)
    if action.style not in styles:
        wanted = f"one of {', '.join(styles)}"
        raise InvalidRequest(
            "the anneal is invalid", [Violation("begin_decay.style", repr(action.style), wanted)]
        )
    length = 0
    with suppress(ValueError):
        length = int(length_of(LENGTH.read(action.length), at))
    if length < 1:
        wanted = "a length of at least 1 in the unit, or a share of the progress so far, as 10%"
        raise InvalidRequest(
            "the anneal is invalid", [Violation("begin_decay.length", repr(action.length), wanted)]
        )
    if begun := _in_force(plan, at, BeginDecay):
        raise _refused(
            state,
            f"an anneal is in force since progress {begun[0].effective}: take it back first "
            f"(undo {begun[0].id})",
        )
    return BeginDecay(length, action.style, reason)  # type: ignore[arg-type]


def _undo(state: RunState, name: str, reason: str) -> Undo | None:
    found = state.find(name)
    if found is None:
        raise adjustment_not_found(state, name, "adjustment")
    if state.plan.find(name) is None:
        what = "is forgotten already: a later attempt began before it"
        if name in state.approved:
            what = f"is an advice; take back what it became, {state.approved[name]}"
        elif found in state.advice:
            what = "is an advice: it changed nothing"
        raise _refused(state, f"adjustment {name} {what}")
    if not isinstance(found.change, ENDABLE):
        kinds = ", ".join(kind.action for kind in ENDABLE)
        raise _refused(
            state,
            f"adjustment {name} is of the kind {found.change.action!r}; only these can be taken "
            f"back: {kinds}",
        )
    at = state.horizon
    return None if found.mark in state.plan.undone(at) else taking_back([found], reason)


def _directive(state: RunState, action: Ask, reason: str) -> Direct:
    _refuse_unopened(state)
    kinds = get_args(DirectiveKind)
    violations = []
    if action.directive not in kinds:
        wanted = f"one of {', '.join(kinds)}"
        violations.append(Violation("directive.kind", repr(action.directive), wanted))
    if action.directive == "rollback":
        if not 0 < action.before <= state.frontier:
            wanted = f"1 to {state.frontier}, the progress reached"
            violations.append(Violation("directive.before", str(action.before), wanted))
        if not 0.0 < action.factor <= 1.0:
            wanted = "a number above 0 and up to 1"
            violations.append(Violation("directive.factor", repr(action.factor), wanted))
    least = {"skip": state.horizon + 1, "rollback": action.before}.get(action.directive, 0)
    if action.until < least and (action.until or action.directive == "skip"):
        wanted = f"{least} or above: the data up to there is passed over"
        violations.append(Violation("directive.until", str(action.until), wanted))
    if violations:
        raise InvalidRequest("the directive is invalid", violations)
    rolls_back = action.directive == "rollback"
    return Direct(
        action.directive,  # type: ignore[arg-type]
        reason,
        before=action.before if rolls_back else None,
        factor=action.factor if rolls_back else None,
        until=action.until or None,
    )


def _approved(state: RunState, advice: Adjustment) -> Change:
    """Return the change that an advice is now."""
    name, at = advice.id, state.horizon
    if advice.mode != "advise":
        raise _refused(state, f"adjustment {name} is no advice (its mode is {advice.mode!r})")
    problem = ""
    if name in state.approved:
        problem = f"it was approved already, as adjustment {state.approved[name]}"
    elif advice not in state.advice:
        problem = "a later attempt has forgotten the losses that led to it"
    elif at >= advice.expires:
        problem = (
            f"it could be approved up to horizon {advice.expires - 1}, which is {at} now; wait for "
            "the next one, or adjust the run by hand"
        )
    if problem:
        raise AdviceExpired(
            f"advice {name} of run {state.name!r} cannot be approved: {problem}",
            run=state.name,
            id=name,
            horizon=at,
            expires=advice.expires,
        )
    change = advice.change
    match change:
        case Note():
            raise _refused(state, f"advice {name} is a note; there is nothing to approve")
        case Direct():
            _refuse_unopened(state)
            return limited(change, state.plan.rollbacks, advice.decided_at)
        case NextStage() if state.plan.stage(at).name != change.leaves:
            raise _refused(state, f"stage {change.leaves!r} is not in force at progress {at}")
        case StretchWarmup() if state.plan.phase(at).name != "warmup":
            raise _refused(state, f"the warmup is over at progress {at}")
        case BeginDecay() if _in_force(state.plan, at, BeginDecay):
            raise _refused(state, f"an anneal is in force at progress {at}")
        case ScaleWeightDecay() if not state.spec.has_weight_decay:
            raise _refused(state, "the run sets no weight decay")
    return change


def _in_force(plan: Plan, at: int, kind: type[Change]) -> list[Adjustment]:
    """Return the adjustments of one kind that count at a progress."""
    return [item for item in plan.in_force(at) if isinstance(item.change, kind)]


def _refuse_unopened(state: RunState) -> None:
    if not state.attempt:
        raise _refused(state, "no attempt is open, so that there is nobody to ask")


def _refused(state: RunState, why: str) -> AdjustmentRefused:
    return AdjustmentRefused(f"run {state.name!r}: {why}", run=state.name, horizon=state.horizon)


def _check_number(
    field: str,
    value: float,
    from_on: str,
    low: float = 0.0,
    high: float = LARGEST_RATE,
    *,
    zero: bool = False,
) -> None:
    """Raise InvalidRequest unless a number is finite, above 0 (or from 0 on), and in a range."""
    is_above = value > 0.0 or (zero and value == 0.0)
    if not (isfinite(value) and is_above and low <= value <= high):
        wanted = f"{from_on} and up to {high:g}"
        if low > 0.0:
            wanted = f"a number from {low:g} to {high:g}, the bounds of the run"
        raise InvalidRequest("the change is invalid", [Violation(field, repr(value), wanted)])
