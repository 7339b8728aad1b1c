"""Runs, adjustments and events as people see them on the wire."""

import time
from collections.abc import Set

from google.protobuf.timestamp_pb2 import Timestamp

from lrpilot import core
from lrpilot.server._documents import dump_document
from lrpilot.server._live_run import LiveRun
from lrpilot.server._store import LogRow
from lrpilot.v1 import runs_pb2 as pb

MAX_ADJUSTMENTS_BYTES = 256 * 1024
"""A run shows its newest adjustments, as many as fit in this; its history has all of them."""

SLOWEST_RANKS = 16
"""Ranks that a run names, those farthest behind."""


def run_message(run: LiveRun) -> pb.Run:
    """Return a run as people see it."""
    message = run_summary(run)
    message.spec_document = dump_document(run.state.spec.to_mapping())
    put_adjustments(message, run.state)
    return message


def run_summary(run: LiveRun) -> pb.Run:
    """Return a run as a list shows it: without its spec and its adjustments, which take long."""
    state = run.state
    spec = state.spec
    rates, decays = state.values(state.progress)
    return pb.Run(
        name=state.name,
        state=_run_state(state),
        unit=spec.unit,
        total=spec.total,
        attempt=state.attempt,
        begin=state.begin,
        progress=state.progress,
        frontier=state.frontier,
        horizon=state.horizon,
        delay=state.delay,
        values=[
            pb.GroupValues(
                name=name,
                learning_rate=rates[index],
                weight_decay=None if decays is None else decays[index],
            )
            for index, name in enumerate(spec.group_names)
        ],
        loss=state.loss,
        smoothed_loss=state.observers.smoothed_loss,
        losses=state.losses,
        nonfinite_losses=state.observers.nonfinite,
        waivers=state.waivers,
        late_losses=state.late_losses,
        seq=state.seq,
        digest=state.digest,
        created_at=timestamp(run.created_ns),
        updated_at=timestamp(run.updated_ns),
        stage=state.plan.stage(state.progress).name,
        held="hold" in state.plan.quiet(state.progress),
        validation_losses=dict(state.observers.validation),
        skipped=state.observers.skipped,
        rollbacks=len(state.plan.rollbacks),
        etag=state.etag,
        leader=bool(state.holder),
        permitted=state.permitted,
        declaration=_declaration(state.declared[-1]) if state.declared else None,
        declared_steps=sum(item.steps for item in state.declared),
        imported_from=state.imported_from,
        forgotten=(
            core.log_forgotten(state, state.alarm).message if state.alarm is not None else ""
        ),
        ranks=_ranks(run),
    )


def _ranks(run: LiveRun) -> pb.Ranks | None:
    now_s = time.monotonic()
    active = run.ranks.count(now_s)
    if not active and not run.ranks_waiting:
        return None
    return pb.Ranks(
        active=active,
        waiting=run.ranks_waiting,
        blocked_s=run.blocked_s(),
        slowest=[
            pb.RankLag(
                rank=item.rank,
                progress=item.progress,
                lag=item.lag,
                asked_s_ago=now_s - item.at_s,
            )
            for item in run.ranks.slowest(SLOWEST_RANKS)
        ],
    )


def _declaration(item: core.Declaration) -> pb.Declaration:
    return pb.Declaration(begin=item.begin, end=item.end, steps=item.steps)


def pending_advice(state: core.RunState) -> int:
    """Return the number of pieces of advice that can be approved now."""
    return sum(
        item.mode == "advise" and item.id not in state.approved and state.horizon < item.expires
        for item in state.advice
    )


def adjustment_messages(state: core.RunState) -> list[pb.Adjustment]:
    """Return every adjustment and advice of a run in order of decision."""
    every = (*state.plan.adjustments, *state.advice, *state.forgotten)
    status = _Status(state)
    return [
        adjustment_message(item, status.of(item), forgotten=status.is_forgotten(item))
        for item in sorted(every, key=lambda item: item.decision)
    ]


def adjustment_message(
    item: core.Adjustment, status: str, *, forgotten: bool = False
) -> pb.Adjustment:
    """Return one adjustment as people see it."""
    return pb.Adjustment(
        effective=item.effective,
        decided_at=item.decided_at,
        source=item.source,
        action=item.change.action,
        factor=getattr(item.change, "factor", None) or 0.0,
        reason=item.reason,
        before=item.before,
        after=item.after,
        mode=item.mode,
        seq=item.seq,
        forgotten=forgotten,
        id=item.id,
        summary=item.summary,
        weight_decay_before=item.decays_before,
        weight_decay_after=item.decays_after,
        author=item.author,
        expires=item.expires,
        status=status,
    )


class _Status:
    """Where each adjustment of a run stands, in one word."""

    def __init__(self, state: core.RunState) -> None:
        self._state = state
        plan, at = state.plan, state.progress
        self._forgotten = {item.id for item in state.forgotten}
        self._undone = plan.undone(at)
        self._in_force = {item.id for item in plan.in_force(at)}

    def is_forgotten(self, item: core.Adjustment) -> bool:
        """Return whether a later attempt began before the loss that decided it."""
        return item.id in self._forgotten

    def of(self, item: core.Adjustment) -> str:
        """Return the word for one of the run's adjustments."""
        state = self._state
        if isinstance(item.change, core.Direct) and item.id in state.outcomes:
            # A rollback that was carried out has forgotten its own directive.
            return state.outcomes[item.id]
        if self.is_forgotten(item):
            return "forgotten"
        if item.mode == "held back":
            return item.mode
        if item.mode == "advise":
            if item.id in state.approved:
                return "approved"
            return "expired" if state.horizon >= item.expires else "advice"
        if isinstance(item.change, core.Direct):
            return "asked"
        if isinstance(item.change, core.Note):
            return "noted"
        if item.mark in self._undone:
            return "undone"
        if item.effective > state.progress:
            return "planned"
        if item.id in self._in_force or not isinstance(item.change, core.ENDABLE):
            return "in force"
        return "ended"


def put_adjustments(message: pb.Run, state: core.RunState) -> None:
    """Put into a run the adjustments that it shows: the newest ones, in order of decision."""
    every = adjustment_messages(state)
    kept: list[pb.Adjustment] = []
    room = MAX_ADJUSTMENTS_BYTES
    for item in reversed(every):
        room -= item.ByteSize()
        if room < 0:
            break
        kept.append(item)
    message.adjustments.extend(reversed(kept))
    message.older_adjustments = len(every) - len(kept)


def event_message(row: LogRow, late: Set[tuple[int, int]]) -> pb.Event:
    """Return one row of a log as people see it; `late` is that of LiveRun."""
    event = core.decode(row.payload)
    message = pb.Event(
        seq=row.seq,
        digest=row.digest,
        recorded_at=timestamp(row.recorded_at_ns),
        kind=event.kind,
        attempt=getattr(event, "attempt", 0),
    )
    match event:
        case core.Created():
            message.summary = "created by a trainer" if event.by_trainer else "created"
        case core.Attached():
            message.summary = "a trainer gave the spec of the run"
        case core.Opened():
            message.progress = event.begin
            message.summary = f"attempt {event.attempt} opened at progress {event.begin}"
            if event.adopted:
                message.summary += (
                    f", with a part of this log that was lost, from the state at its seq "
                    f"{event.lost_seq}, digest {event.lost_digest[:12]}"
                )
            elif event.lost_seq:
                message.summary += (
                    f", restored from a state of a lost log (seq {event.lost_seq}, digest "
                    f"{event.lost_digest[:12]})"
                )
            elif event.fold is not None:
                message.summary += ", from a state whose past is not the log's"
            if event.holder:
                message.summary += ", in leader mode"
            if event.directive:
                message.summary += (
                    f", rolled back as directive {event.directive} asked: LR x {event.factor:g}"
                )
        case core.Joined():
            message.summary = (
                "the reporter joined"
                if event.rank is None
                else f"rank {event.rank} joined as a reporter"
            )
        case core.Reported():
            message.progress = event.reports[0].progress
            message.losses.extend(
                _loss_record(item, event.rank, is_late=(row.seq, item.progress) in late)
                for item in event.reports
            )
            first, last = event.reports[0], event.reports[-1]
            who = "" if event.rank is None else f"rank {event.rank} "
            message.summary = who + (
                f"reported progress {first.progress}, moved to {last.moves_to}"
                if len(event.reports) == 1
                else f"reported {len(event.reports)} steps, progress {first.progress} to "
                f"{last.progress}, moved to {last.moves_to}"
            )
        case core.Recorded():
            message.progress = event.begin
            message.summary = (
                f"values recorded from progress {event.begin} on, stride {event.stride}"
            )
        case core.Permitted():
            message.progress = event.end
            message.summary = (
                f"the job may go on alone from progress {event.begin} up to {event.end - 1}"
            )
        case core.Declared():
            begin, end = event.blocks[0].begin, event.blocks[-1].last + 1
            message.progress = begin
            steps = sum(block.steps for block in event.blocks)
            message.summary = (
                f"the job went on alone from progress {begin} to {end - 1}, {steps} steps: losses "
                f"that would have acted there waived, what operators changed moved to {end}"
            )
        case core.Waived():
            message.progress = event.until
            message.summary = f"missing losses below progress {event.until} waived"
            if event.counted:
                shown = ", ".join(
                    f"{at} (ranks {', '.join(str(rank) for rank in ranks)})"
                    for at, ranks in event.counted
                )
                message.summary += f"; with a quorum at {shown}"
        case core.Revised():
            if event.effective is None:
                message.summary = "new spec from where the next attempt opens"
            else:
                message.progress = event.effective
                message.summary = f"new spec from progress {event.effective} on"
            message.author, message.reason = event.author, event.reason
        case core.Adjusted():
            message.progress = event.effective
            change = core.change_from_mapping(event.change)
            message.summary = f"{core.summary_of(change)} from progress {event.effective} on"
            if event.advice:
                message.summary += f" (approves advice {event.advice})"
            message.author, message.reason = event.author, change.reason
        case core.Acknowledged():
            message.progress = event.progress
            message.summary = f"directive {event.directive} {event.outcome}"
            message.reason = event.detail
        case core.Forgot():
            message.progress = event.progress
            message.summary = (
                f"the log has forgotten {event.what}: rank {event.rank} of attempt "
                f"{event.attempt} holds more, up to progress {event.progress}"
            )
        case core.Finished():
            message.summary = "finished"
        case core.Imported():
            exported = timestamp(event.exported_at_ns).ToDatetime()
            message.summary = (
                f"imported from {event.origin}, exported there at {exported:%Y-%m-%d %H:%M:%S}Z"
            )
            message.author, message.reason = event.author, event.reason
    return message


def _run_state(state: core.RunState) -> pb.RunState.ValueType:
    if state.finished:
        return pb.RUN_STATE_FINISHED
    return pb.RUN_STATE_RUNNING if state.attempt else pb.RUN_STATE_CREATED


def _loss_record(item: core.Report, rank: int | None, *, is_late: bool) -> pb.LossRecord:
    return pb.LossRecord(
        progress=item.progress,
        loss=item.loss,
        weight=item.weight,
        late=item.loss is not None and is_late,
        skipped=item.skipped,
        validation_losses=item.validation,
        gradient_norm=item.gradient_norm,
        batch=item.batch or 0,
        rank=rank or 0,
    )


def timestamp(nanoseconds: int) -> Timestamp:
    """Return Unix nanoseconds as a message."""
    stamp = Timestamp()
    stamp.FromNanoseconds(nanoseconds)
    return stamp
