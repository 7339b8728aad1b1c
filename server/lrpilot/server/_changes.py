"""What an operator asks for, read from the wire, and what it does, to be shown before and after."""

from collections.abc import Sequence
from dataclasses import dataclass

from lrpilot import core
from lrpilot.server._live_run import LiveRun
from lrpilot.server._messages import adjustment_message
from lrpilot.v1 import runs_pb2 as pb

PREVIEW_POINTS = 240
"""Most points of a preview; fewer where there are many groups or adjustments."""

MAX_PREVIEW_VALUES = 16_000
"""Most numbers in a preview: it must fit into one message."""

MAX_PREVIEW_LINKS = 400_000
"""About the most adjustments evaluated for a preview, each once per value: some tenths of a second,
in which the server does nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What became, or would become, of an operator's request."""

    run: LiveRun
    effective: int
    """First progress at which it shows."""
    adjustment: pb.Adjustment | None = None
    preview: Sequence[pb.PreviewPoint] = ()
    changes: Sequence[pb.SpecChange] = ()
    unchanged: bool = False
    repeated: bool = False
    pending: bool = False
    """Whether it takes effect behind what a job in leader mode may use alone meanwhile."""


def read_action(request: pb.AdjustRunRequest) -> core.Action:
    """Return the action of a request. Raises InvalidRequest."""
    match request.WhichOneof("action"):
        case "scale_lr":
            return core.ScaleLearningRate(request.scale_lr)
        case "set_lr":
            return core.SetLearningRate(request.set_lr)
        case "scale_weight_decay":
            return core.ScaleDecay(request.scale_weight_decay)
        case "begin_decay":
            wanted = request.begin_decay
            return core.DecayNow(_length(wanted.length), wanted.style or "minus_sqrt")
        case "next_stage" if request.next_stage:
            return core.EnterNextStage()
        case "total":
            return core.SetTotal(request.total)
        case "hold" if request.hold:
            return core.HoldValues()
        case "release" if request.release:
            return core.ReleaseValues()
        case "undo":
            return core.TakeBack(request.undo)
        case "directive":
            asked = request.directive
            return core.Ask(asked.kind, asked.before, asked.factor or 0.5, asked.until)
    wanted_actions = ", ".join(
        field.name for field in request.DESCRIPTOR.oneofs_by_name["action"].fields
    )
    raise core.InvalidRequest(
        "the request says nothing to do",
        [core.Violation("action", "nothing", f"one of {wanted_actions}")],
    )


def _length(text: str) -> int | str:
    # No progress has more digits than 19, and Python refuses to read thousands.
    is_count = text.isascii() and text.isdigit() and len(text) < 20
    return int(text) if is_count else text


def shown_change(run: LiveRun, state: core.RunState, events: Sequence[core.Event]) -> Change:
    """Return what the events of an operator do to the plan of a state."""
    at = state.horizon
    if not events:
        return Change(run=run, effective=at, unchanged=True)
    pending = _is_pending(state, at)
    plan = core.planned(state, events)
    event = events[-1]
    adjustment, changes = None, []
    if isinstance(event, core.Adjusted):
        # The events are to be the next ones of the log, each on top of those before it.
        made = core.made_next(state, event, len(events) - 1)
        made = plan.find(made.id) or made
        adjustment = adjustment_message(made, "planned")
    elif isinstance(event, core.Revised):
        changes = [
            pb.SpecChange(field=field, before=before, after=after)
            for field, before, after in core.spec_difference(state.spec, plan.spec)
        ]
    return Change(
        run=run,
        effective=at,
        adjustment=adjustment,
        preview=preview(state, plan, at),
        changes=changes,
        pending=pending,
    )


def repeated_change(run: LiveRun, state: core.RunState, request_id: str, effective: int) -> Change:
    """Return the first answer once more, without its preview."""
    made = state.find(state.made.get(request_id, ""))
    return Change(
        run=run,
        effective=effective,
        adjustment=None if made is None else adjustment_message(made, "planned"),
        repeated=True,
        pending=_is_pending(state, effective),
    )


def _is_pending(state: core.RunState, effective: int) -> bool:
    """Return whether a job in leader mode may use values from `effective` on without a change."""
    return bool(state.holder) and effective < state.permitted


def preview(state: core.RunState, plan: core.Plan, at: int) -> list[pb.PreviewPoint]:
    """Return the values of the run before and after, from its attempt's begin to its end.

    Where a change shows, the progress just before it and its first one are both there. Values below
    it are fixed: they are those that were handed out.
    """
    end = max(state.spec.total, plan.spec.total, at + 1)
    groups = max(len(spec.group_names) for spec in (state.spec, plan.spec))
    links = 2 * groups * (1 + len(plan.adjustments))
    most = min(MAX_PREVIEW_VALUES // (4 * groups), MAX_PREVIEW_LINKS // links)
    count = max(2, min(PREVIEW_POINTS, most))
    begin = min(state.begin, at)
    points = {begin + (end - begin) * index // (count - 1) for index in range(count)}
    points |= {at - 1, at} if at > begin else {at}
    return [_point(state, plan, progress, at) for progress in sorted(points)]


def _point(state: core.RunState, plan: core.Plan, progress: int, at: int) -> pb.PreviewPoint:
    old, old_decays = state.values(progress)
    new, new_decays = (old, old_decays) if progress < at else plan.values(progress)
    return pb.PreviewPoint(
        progress=progress,
        before=old,
        after=new,
        weight_decay_before=old_decays or (),
        weight_decay_after=new_decays or (),
    )
