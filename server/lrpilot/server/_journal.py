"""The lines of the server's log that tell of a run: one for each thing that happened, and why.

They are written by the replica that appended the events, once those are durable. Another one that
reads them says nothing of it, and neither does a server that starts and folds the log again: so no
line comes twice. One is missing where a server died between the append and the line, or never
learned that its append had succeeded; the run's history has everything.
"""

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

from lrpilot import core
from lrpilot.core.policies import Observation

logger = logging.getLogger("lrpilot.server")

LOOKED_BACK = 16
"""Most observations without a loss that are passed over to see whether the last loss was finite."""


def about(run: str | core.RunState | None, /, **fields: object) -> dict[str, object]:
    """Return the `extra` of a line about a run, or about none; fields that are None are left out.

    Of a state `attempt` and `progress` come with it, unless given otherwise.
    """
    at: dict[str, object] = {"run": run}
    if isinstance(run, core.RunState):
        at = {"run": run.name, "attempt": run.attempt or None, "progress": run.progress}
    return {"fields": {key: value for key, value in (at | fields).items() if value is not None}}


class Noted(NamedTuple):
    """What a state was before events were applied, as far as lines need it."""

    seq: int
    digest: str
    spec: core.RunSpec | None
    """None: there was no run."""
    stage: str
    horizon: int
    frontier: int
    progress: int
    is_permitted: bool
    late_losses: int
    observed: int
    nonfinite: int
    is_row: bool
    """Whether the last loss was not finite."""
    forgotten: int


def note(state: core.RunState) -> Noted:
    """Return what `tell` compares the state after the next events with."""
    is_there = state.exists
    return Noted(
        seq=state.seq,
        digest=state.digest,
        spec=state.spec if is_there else None,
        stage=_stage(state) if is_there else "",
        horizon=state.horizon if is_there else 0,
        frontier=state.frontier,
        progress=state.progress,
        is_permitted=bool(state.permits),
        late_losses=state.late_losses,
        observed=state.observed,
        nonfinite=state.observers.nonfinite,
        is_row=state.observers.nonfinite > 0 and _is_row(state),
        forgotten=len(state.forgotten),
    )


def tell(noted: Noted, state: core.RunState, events: Sequence[core.Event]) -> None:
    """Write a line for each thing that `events` did to a run; nothing of it must end a request.

    `state` has them applied, and perhaps some that another replica appended behind them.
    """
    try:
        for event in events:
            _tell_event(noted, state, event)
        opened = next((event for event in events if isinstance(event, core.Opened)), None)
        if opened is None:
            _tell_losses(noted, state)
            _tell_stage(noted, state)
        if any(isinstance(event, _DECIDE) for event in events):
            for item in _decided(noted, state, len(events), opened):
                _tell_adjustment(state, item)
    except Exception:
        logger.exception("what was appended cannot be told", extra=about(state.name))


_DECIDE = (core.Reported, core.Waived, core.Declared, core.Adjusted, core.Opened)
"""Events of which adjustments and advice come."""


def _decided(
    noted: Noted, state: core.RunState, events: int, opened: core.Opened | None
) -> list[core.Adjustment]:
    """Return what the events decided, in order."""
    last = noted.seq + events
    decided = [item for item in state.decided_since(noted.seq) if item.seq <= last]
    if opened is None:
        return decided
    # An attempt may bring what was decided, and told, in a log that was lost.
    cuts = [item for item in decided if item.kind == "rollback"]
    return cuts[-1:] if opened.directive else []


def _tell_event(noted: Noted, state: core.RunState, event: core.Event) -> None:
    match event:
        case core.Created():
            who = " by a trainer" if event.by_trainer else ""
            total, unit = state.spec.total, state.spec.unit
            logger.info("created%s, for %d %s", who, total, unit, extra=about(state))
        case core.Opened():
            _tell_opened(noted, state, event)
        case core.Joined():
            who = "the reporter" if event.rank is None else f"reporter rank {event.rank}"
            logger.debug("%s joined", who, extra=about(state, rank=event.rank))
        case core.Waived():
            # Of several reporters, enough may have been there.
            counted = f"; {len(event.counted)} of them count with a quorum" if event.counted else ""
            logger.warning(
                "ranks waited %g s for values from progress %d on while no loss came: the missing "
                "losses from %d up to %d are final as absent (waiver)%s",
                state.spec.feedback.timeout_s,
                noted.horizon,
                noted.frontier,
                event.until - 1,
                counted,
                extra=about(state, waivers=state.waivers, effective=event.until + state.delay),
            )
        case core.Revised():
            _tell_revised(noted, state, event)
        case core.Permitted() if not noted.is_permitted:
            logger.info(
                "attempt %d may go on alone below progress %d, and is offered more as it gets "
                "there",
                event.attempt,
                event.end,
                extra=about(state, permitted=event.end),
            )
        case core.Declared():
            begin, last = event.blocks[0].begin, event.blocks[-1].last
            steps = sum(block.steps for block in event.blocks)
            logger.warning(
                "the job went on alone from progress %d to %d, %d steps: these values are facts; "
                "losses that would have acted there are final as absent, %d of them had come, and "
                "what operators changed meanwhile takes effect from %d on",
                begin,
                last,
                steps,
                state.late_losses - noted.late_losses,
                last + 1,
                extra=about(state, begin=begin, end=last + 1, steps=steps, effective=last + 1),
            )
        case core.Acknowledged():
            logger.log(
                logging.INFO if event.outcome == "done" else logging.WARNING,
                "directive %s was met at progress %d: %s%s",
                event.directive,
                event.progress,
                event.outcome,
                f" ({event.detail})" if event.detail else "",
                extra=about(
                    state,
                    progress=event.progress,
                    adjustment=event.directive,
                    outcome=event.outcome,
                    rank=event.rank,
                    reason=event.detail or None,
                ),
            )
        case core.Forgot() if state.alarm is not None:
            error = core.log_forgotten(state, state.alarm)
            logger.error("%s", error, extra=about(state, error=type(error).__name__, **error.facts))
        case core.Finished():
            logger.info(
                "finished at progress %d of %d", state.progress, state.spec.total,
                extra=about(state, total=state.spec.total),
            )  # fmt: skip


def _tell_opened(noted: Noted, state: core.RunState, event: core.Opened) -> None:
    if event.adopted:
        logger.warning(
            "the log has forgotten a part of itself: it ends at seq %d with digest %s, and the "
            "state of the checkpoint was saved in it at seq %d with digest %s. What was lost is "
            "taken over from that state; what operators changed after it was saved is gone, unless "
            "they did so here",
            noted.seq,
            noted.digest,
            event.lost_seq,
            event.lost_digest,
            extra=about(state, seq=noted.seq, lost_seq=event.lost_seq),
        )
    words = [f"attempt {event.attempt} opened at progress {event.begin}"]
    if event.holder:
        words.append("in leader mode")
    if event.lost_seq:
        words.append("restored from a saved state")
    if event.directive:
        words.append(f"rolled back as directive {event.directive} asked")
    forgotten = len(state.forgotten) - noted.forgotten
    if event.begin < noted.progress:
        words.append(f"{noted.progress - event.begin} back from {noted.progress}")
    if forgotten > 0:
        words.append(f"{forgotten} decisions on losses from there on are forgotten")
    logger.info(
        "%s",
        ", ".join(words),
        extra=about(
            state,
            attempt=event.attempt,
            progress=event.begin,
            stage=_stage(state) or None,
            adjustment=event.directive or None,
            was_at=noted.progress if event.attempt > 1 else None,
            forgotten=forgotten if forgotten > 0 else None,
        ),
    )


def _tell_revised(noted: Noted, state: core.RunState, event: core.Revised) -> None:
    who = event.author or ("a trainer" if event.by_trainer else "somebody")
    spec = core.parse_spec(event.spec)
    changed = (
        []
        if noted.spec is None
        else [name for name, _, _ in core.spec_difference(noted.spec, spec)]
    )
    where = (
        "where the next attempt opens"
        if event.effective is None
        else f"progress {event.effective} on"
    )
    logger.info(
        "%s gives a new spec from %s%s: %s: %s",
        who,
        where,
        _later(state, event.effective),
        ", ".join(changed) or "nothing differs",
        event.reason or "no reason given",
        extra=about(
            state,
            effective=event.effective,
            author=event.author or None,
            reason=event.reason or None,
            changed=changed,
        ),
    )


def _later(state: core.RunState, effective: int | None) -> str:
    """Return a word of warning where a job in leader mode may use values without a change."""
    is_pending = effective is not None and state.holder and effective < state.permitted
    return " (later, if the job goes on alone beyond it)" if is_pending else ""


def _tell_losses(noted: Noted, state: core.RunState) -> None:
    """Tell of losses that are not finite where a row of them begins."""
    if state.observers.nonfinite <= noted.nonfinite:
        return
    is_row = noted.is_row
    begins = None
    for item in state.observations_since(noted.observed):
        is_broken = _is_broken(item)
        if is_broken and not is_row and begins is None:
            begins = item
        if is_broken is not None:
            is_row = is_broken
    if begins is not None:
        logger.warning(
            "losses from progress %d on are not finite, %d in all so far: the next line comes "
            "after a finite one",
            begins.progress,
            state.observers.nonfinite,
            extra=about(
                state,
                progress=begins.progress,
                loss=begins.loss,
                nonfinite_losses=state.observers.nonfinite,
            ),
        )


def _is_broken(item: Observation) -> bool | None:
    """Return whether a loss was not finite; None: there was none."""
    if item.left_out or (item.loss is not None and not math.isfinite(item.loss)):
        return True
    return None if item.loss is None else False


def _is_row(state: core.RunState) -> bool:
    """Return whether the last loss was not finite."""
    last = reversed(state.observations_since(state.observed - LOOKED_BACK))
    return next((found for item in last if (found := _is_broken(item)) is not None), False)


def _tell_stage(noted: Noted, state: core.RunState) -> None:
    stage = _stage(state)
    if stage != noted.stage and noted.spec is not None:
        logger.info(
            "stage %s entered", stage, extra=about(state, stage=stage, stage_before=noted.stage)
        )


def _stage(state: core.RunState) -> str:
    """Return the name of the stage in use; empty: the run has none."""
    return state.plan.stage(state.progress).name if state.spec.stages else ""


def _tell_adjustment(state: core.RunState, item: core.Adjustment) -> None:
    # What asks for someone to look stands out.
    is_alert = isinstance(item.change, (core.Direct, core.Note)) or item.mode == "advise"
    values = ""
    if item.before != item.after:
        before = ", ".join(f"{lr:.6g}" for lr in item.before)
        after = ", ".join(f"{lr:.6g}" for lr in item.after)
        values = f" (LR {before} -> {after})"
    logger.log(
        logging.WARNING if is_alert else logging.INFO,
        "%s%s (%s) decided at progress %d, effective at %d%s: %s%s: %s (id %s)",
        item.source,
        f" {item.author}" if item.author else "",
        item.mode,
        item.decided_at,
        item.effective,
        _later(state, item.effective) if item.kind == "operator" else "",
        item.summary,
        values,
        item.reason,
        item.id,
        extra=about(
            state,
            progress=item.decided_at,
            adjustment=item.id,
            seq=item.seq,
            source=item.source,
            mode=item.mode,
            action=item.change.action,
            summary=item.summary,
            reason=item.reason,
            effective=item.effective,
            author=item.author or None,
            lr_before=list(item.before),
            lr_after=list(item.after),
            expires=item.expires or None,
        ),
    )
