"""What a request does to a run: it reads the state and returns the events to append.

Each function is pure. It raises a typed error, or returns the events that carry the request
out; none when that is done already, so that a repeated request is harmless. The caller
appends them at the next `seq`, and when another replica was faster it reloads the state and
evaluates the whole request again. Of a trimmed state each may raise HistoryNeeded, too: then a
state with a lower floor answers what the whole one would.
"""

import base64
import binascii
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from enum import Enum
from math import isfinite, isnan, nan
from typing import Any

from lrpilot.core import _canonical
from lrpilot.core._changes import Direct, Multiply
from lrpilot.core._errors import (
    AdjustmentNotFound,
    AttemptSuperseded,
    BeforeAttempt,
    BelowResumePoint,
    BeyondHorizon,
    BeyondPermit,
    InvalidRequest,
    InvalidSpec,
    InvalidState,
    JoinRefused,
    LossConflict,
    LossesPending,
    NotHolder,
    NotReporter,
    PlanChanged,
    ResumePointRequired,
    RevisionRefused,
    RunExists,
    RunFinished,
    RunNotFound,
    SpecChanged,
    StateMismatch,
    ValuesConflict,
    Violation,
)
from lrpilot.core._events import (
    Acknowledged,
    Attached,
    Created,
    Declared,
    Event,
    Finished,
    Imported,
    Joined,
    Opened,
    Permitted,
    Recorded,
    Report,
    Reported,
    Revised,
    Waived,
)
from lrpilot.core._fields import LARGEST_PROGRESS, is_metric
from lrpilot.core._forgotten import log_forgotten, refuse_forgotten
from lrpilot.core._plan import Plan, Values
from lrpilot.core._records import Block, Records
from lrpilot.core._spec import RunSpec, spec_difference
from lrpilot.core._state import Permit, RunState, last_trainer_spec
from lrpilot.core.policies import Observation

MAX_BLOCK_STEPS = 128
"""Most steps in one block: a lease of that length costs about as much as one of a single step."""

MAX_BLOCK_VALUES = 32_768
"""Most learning rates in one block, over all its steps: it must fit into one message."""

MAX_OFFERED_STEPS = 4096
"""Most steps in one offer, and in one declaration."""

MAX_PROGRESS = LARGEST_PROGRESS
"""Greatest progress."""

MAX_STATE_BYTES = 64 * 1024 * 1024
"""Most bytes of an unpacked state: a damaged one cannot fill the memory."""

STATE_VERSION = 1
"""Version of what `save_state` writes."""

MAX_TRIES = 2**31 - 1
"""Most skipped updates at one progress."""

MAX_VALIDATION_LOSSES = 64
"""Most validation losses in one report."""

MAX_TEXT = 1000
"""Most characters of a reason, and of an author."""

MAX_DETAIL = 1000
"""Most characters of what a trainer says of a directive."""


# Runs.


def create_run(
    state: RunState,
    spec: RunSpec,
    request_id: str,
    *,
    by_trainer: bool = False,
    may_revise: bool = False,
) -> list[Event]:
    """Create the run. Raises RunExists."""
    if state.exists:
        if state.answers.get(request_id, ("", 0))[0] == Created.kind:
            return []
        raise RunExists(
            f"run {state.name!r} exists already; revise it, or choose another name",
            run=state.name,
        )
    return [Created(spec.to_mapping(), by_trainer, may_revise, request_id)]


def attach_run(
    state: RunState, spec: RunSpec | None, *, revise: bool, request_id: str
) -> list[Event]:
    """Create the run for a trainer, or compare its spec with the last one that a trainer gave.

    Raises SpecChanged with the difference, unless `revise`.
    """
    if not state.exists:
        if spec is None:
            raise run_not_found(state.name, [])
        return create_run(state, spec, request_id, by_trainer=True, may_revise=revise)
    if spec is None or request_id in state.answers:
        return []
    known = state.given_spec
    if known == spec:
        # The first one that a trainer gives counts from now on, whatever operators change. Before
        # the first attempt the trainer's own wish to revise counts, should it restore a lost run.
        is_known = state.trainer_spec and (state.attempt or state.may_revise == revise)
        return [] if is_known else [Attached(revise, request_id)]
    if not revise:
        raise _spec_changed(
            state,
            "differs from the last one that a trainer gave",
            known,
            spec,
            'give that spec, or connect with on_change="revise"',
        )
    _refuse_finished(state)
    _refuse_past(state, spec)
    # A trainer revises on its way to a new attempt, from whose first step its spec must hold.
    start = None if state.attempt else 0
    return [Revised(spec.to_mapping(), start, start, True, request_id)]


def _spec_changed(
    state: RunState, how: str, known: RunSpec, spec: RunSpec, remedy: str
) -> SpecChanged:
    difference = spec_difference(known, spec)
    lines = "".join(f"\n  {field}: {old} -> {new}" for field, old, new in difference)
    return SpecChanged(
        f"the spec of run {state.name!r} {how}:{lines}\n{remedy}",
        run=state.name,
        fields=", ".join(field for field, _, _ in difference),
    )


def revise_run(
    state: RunState,
    spec: RunSpec,
    request_id: str,
    *,
    author: str = "",
    reason: str = "",
    etag: str = "",
) -> list[Event]:
    """Replace the spec from the horizon on; nothing is to be done where it is that one already.

    Raises RevisionRefused for what only a new attempt may change, RunFinished, InvalidSpec,
    PlanChanged.
    """
    _refuse_missing(state)
    if request_id in state.answers:
        return []
    _refuse_finished(state)
    check_signature(author, reason, required=False)
    refuse_changed_plan(state, etag)
    if spec == state.spec:
        return []
    locked = _locked(state, spec)
    if locked and state.attempt:
        raise RevisionRefused(
            f"a revision may not change {', '.join(locked)}: that needs a new attempt; "
            'restart the trainers with the new spec and on_change="revise"',
            run=state.name,
            fields=", ".join(locked),
        )
    _refuse_past(state, spec)
    begin = state.frontier
    if state.loss_progress and state.loss_progress[-1] == begin:
        # Policies have seen a skipped update there: the same ones see every try.
        begin += 1
    return [Revised(spec.to_mapping(), state.horizon, begin, False, request_id, author, reason)]


def check_signature(author: str, reason: str, *, required: bool = True) -> None:
    """Raise InvalidRequest unless a change says who makes it and why, at a readable length."""
    violations = [
        Violation(field, repr(text[:40]), f"1 to {MAX_TEXT} characters that say {what}")
        for field, text, what in (("reason", reason, "why"), ("author", author, "who"))
        if len(text) > MAX_TEXT or (required and not text.strip())
    ]
    if violations:
        raise InvalidRequest("the change is not signed", violations)


def refuse_changed_plan(state: RunState, etag: str) -> None:
    """Raise PlanChanged where a plan was seen that is no longer the run's; empty: none was."""
    if etag and etag != state.etag:
        raise PlanChanged(
            f"the plan of run {state.name!r} changed since it was looked at: its etag is "
            f"{state.etag}, not {etag}; look again, then decide again",
            run=state.name,
            etag=state.etag,
            given=etag,
        )


def finish_run(state: RunState, request_id: str) -> list[Event]:
    """End the run; repeating it is harmless."""
    _refuse_missing(state)
    return [] if state.finished else [Finished(request_id)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportRequest:
    """A request to take over a log that another server wrote."""

    origin: str
    """Release and machine that exported it."""
    exported_at_ns: int
    request_id: str
    author: str
    reason: str
    digest_there: str | None = None
    """Digest that the log here has where the one to be taken over ends; None: it does not reach
    there."""


def import_run(state: RunState, log: RunState, request: ImportRequest) -> list[Event]:
    """Return what comes behind the log that ends in `log`, where no run has that name; none where
    the run is here already, with the whole of that log.

    Raises RunExists, InvalidRequest.
    """
    if state.exists:
        if state.answers.get(request.request_id, ("", 0))[0] == Imported.kind:
            return []
        if request.digest_there == log.digest:
            return []
        there = request.digest_there
        here = f"has digest {there} there" if there else f"ends at seq {state.seq}"
        raise RunExists(
            f"run {state.name!r} exists already, with another log: the one to import has digest "
            f"{log.digest} at seq {log.seq}, the one here {here}; to take it over all the same, "
            "export the one here and delete it",
            run=state.name,
            imported_seq=log.seq,
            imported_digest=log.digest,
            log_seq=state.seq,
            log_digest=there or state.digest,
        )
    check_signature(request.author, request.reason, required=False)
    return [
        Imported(
            request.origin,
            request.exported_at_ns,
            request.request_id,
            request.author,
            request.reason,
        )
    ]


def run_not_found(name: str, names: Sequence[str]) -> RunNotFound:
    """Return the error for an unknown run, with the names that look like it."""
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return RunNotFound(f"no run is named {name!r}{hint}", run=name, near=", ".join(near))


def _locked(state: RunState, spec: RunSpec) -> list[str]:
    """Return the names of changed fields that only a new attempt may change."""
    old = state.spec
    changed = []
    if spec.unit != old.unit:
        changed.append("unit")
    if spec.group_names != old.group_names:
        changed.append("groups")
    if spec.has_weight_decay != old.has_weight_decay:
        changed.append("weight_decay (set or not)")
    if spec.delay != old.delay:
        changed.append("feedback.delay")
    if spec.has_feedback != old.has_feedback:
        changed.append("feedback on or off")
    return changed


def _refuse_past(state: RunState, spec: RunSpec) -> None:
    horizon = state.horizon
    past = [
        Violation(field, str(end), f"at least the horizon, {horizon}")
        for field, end in _ends(spec)
        if end < horizon and (field, end) not in _ends(state.spec)
    ]
    if past:
        raise InvalidSpec(f"the revision of run {state.name!r} would change the past", past)


def _ends(spec: RunSpec) -> list[tuple[str, int]]:
    ends = [("total", spec.total)]
    for index, stage in enumerate(spec.stages):
        if stage.until is not None:
            ends.append((f"stages.{index}.until", stage.until))
        if stage.latest is not None:
            ends.append((f"stages.{index}.latest", stage.latest))
    return ends


def _refuse_missing(state: RunState) -> None:
    if not state.exists:
        raise run_not_found(state.name, [])


def _refuse_finished(state: RunState) -> None:
    if state.finished:
        raise RunFinished(
            f"run {state.name!r} is finished; create a run of another name", run=state.name
        )


# Attempts.


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """What `save_state` wrote, read back."""

    run: str
    seq: int
    """Sequence number of the log when it was saved."""
    digest: str
    """Digest of the log there."""
    progress: int
    fold: dict[str, Any]

    @property
    def log(self) -> str:
        """Digest of the log at seq 1; empty: a release before 0.3 saved it."""
        return str(self.fold.get("log", ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRequest:
    """A request to open an attempt or to join the current one."""

    request_id: str
    key: str = ""
    progress: int | None = None
    saved: SavedState | None = None
    digest_at_saved: str | None = None
    """Digest that the log has at `saved.seq`; None: the log does not reach there."""
    rank: int = 0
    reporters: tuple[int, ...] = (0,)
    """Declared reporters, in the order in which their losses are summed."""
    incarnation: str = ""
    token: str = ""
    """128 random bits for the attempt, should it open; hexadecimal."""
    directive: str = ""
    """Id of the rollback directive that the attempt carries out; empty: none."""
    met_in: tuple[int, str] | None = None
    """Number and token of the attempt in which that directive was met."""
    holder: str = ""
    """Leader mode: 128 random bits for the one who gets the values; hexadecimal."""


def open_attempt(state: RunState, request: OpenRequest) -> list[Event]:
    """Open a new attempt, or join the current one when the key is its own.

    Raises RunFinished, ResumePointRequired, JoinRefused, StateMismatch, AttemptSuperseded,
    LogForgotten, SpecChanged, InvalidRequest.
    """
    done = state.answers.get(request.request_id)
    if done is not None:
        if done[1] != state.attempt or not state.token:
            raise _superseded(state, done[1])
        return []
    _refuse_finished(state)
    _check_ranks(request)
    progress = _resume_point(request)
    if request.key and request.key in state.keys:
        if request.key != state.key:
            raise _superseded(state, state.keys[request.key])
        refuse_forgotten(state)
        return _join(state, request, progress)
    saved = request.saved
    if saved is not None and not state.attempt:
        return _restore(state, request, saved)
    _refuse_missing(state)
    asked = _asked(state, request) if request.directive else None
    fold = None
    if saved is not None:
        is_continued = (saved.seq, saved.digest) == (state.lost_seq, state.lost_digest)
        if not is_continued and request.digest_at_saved != saved.digest:
            return _adopt(state, request, saved)
        if state.history_differs(0 if is_continued else saved.seq, saved.progress):
            fold = saved.fold
    elif progress is None and state.has_losses:
        raise ResumePointRequired(
            f"run {state.name!r} has losses up to progress {state.frontier}: give the state of a "
            "checkpoint (scheduler state), or resume_at=0 to start over",
            run=state.name,
            frontier=state.frontier,
        )
    if progress is not None and 0 < progress < state.origin and fold is None:
        raise StateMismatch(
            f"run {state.name!r} was taken over from a state at progress {state.origin}: what came "
            f"before is not known, so that it cannot resume at {progress} without the state "
            "saved there",
            run=state.name,
            origin=state.origin,
            progress=progress,
        )
    opened = _opened(request, state.greatest_attempt + 1, progress or 0, fold=fold)
    if fold is None:
        state.refuse_dropped(opened.begin)
    if asked is not None:
        asked_at, change = asked
        # What earlier rollbacks to here or further on cut is cut once more.
        factor = change.factor or 1.0
        undone = state.plan.undone(MAX_PROGRESS)
        for cut in state.plan.cuts_from(opened.begin):
            if isinstance(cut.change, Multiply) and cut.mark not in undone:
                factor *= cut.change.factor
        opened = replace(
            opened,
            directive=request.directive,
            before=change.before or 0,
            asked_at=asked_at,
            factor=factor,
        )
    return [opened]


def _asked(state: RunState, request: OpenRequest) -> tuple[int, Direct]:
    """Return the rollback that an attempt carries out, and where it was decided.

    Raises AdjustmentNotFound, InvalidRequest, AttemptSuperseded.
    """
    if request.met_in is None:
        raise InvalidRequest(
            "the request to open an attempt is invalid",
            [Violation("met_in", "nothing", "the attempt in which the directive was met")],
        )
    check_attempt(state, *request.met_in)
    found = state.find(request.directive)
    if found is None or not isinstance(found.change, Direct):
        raise adjustment_not_found(state, request.directive, "directive")
    if found.change.directive != "rollback":
        raise InvalidRequest(
            "the directive is not carried out by an attempt",
            [Violation("directive", found.change.directive, "a rollback")],
        )
    if found.mode != "act":
        raise InvalidRequest(
            "nobody was asked to follow the directive",
            [Violation("directive", found.mode, "one that an operator approved")],
        )
    return found.decided_at, found.change


def adjustment_not_found(state: RunState, name: str, what: str) -> AdjustmentNotFound:
    """Return the error for an id that names nothing in the run."""
    return AdjustmentNotFound(
        f"run {state.name!r} has no {what} with the id {name!r}; `run show` lists them",
        run=state.name,
        id=name,
    )


def _restore(state: RunState, request: OpenRequest, saved: SavedState) -> list[Event]:
    """Continue a log that was lost, from a state that was saved in it.

    The run is not known here, or it was created anew on the way to this very opening.
    """
    known = last_trainer_spec(saved.fold)
    events: list[Event] = []
    if not state.exists:
        by_trainer = saved.fold["trainer_spec"] is not None
        request_id = f"{request.request_id}/create"
        events.append(Created(known.to_mapping(), by_trainer, False, request_id))
    elif state.given_spec != known and not state.may_revise:
        raise _spec_changed(
            state,
            "differs from the one that the state was saved under",
            known,
            state.given_spec,
            'connect with on_change="revise" and the spec that is to hold from here on',
        )
    opened = _opened(request, saved.fold["attempt"] + 1, saved.progress, fold=saved.fold)
    return [*events, replace(opened, lost_seq=saved.seq, lost_digest=saved.digest)]


def _adopt(state: RunState, request: OpenRequest, saved: SavedState) -> list[Event]:
    """Take over what this log lost, from a state that was saved in the lost part of it."""
    if not saved.log or saved.log != state.log:
        raise _mismatch(state, saved, request.digest_at_saved)
    known = last_trainer_spec(saved.fold)
    given = state.trainer_spec
    if given is not None and given != known and not state.gives_other_spec(saved.fold):
        raise _spec_changed(
            state,
            "differs from the one that the state was saved under, which the log has forgotten",
            known,
            given,
            'connect with on_change="revise" and the spec that is to hold from here on',
        )
    attempt = max(state.greatest_attempt, saved.fold["attempt"]) + 1
    opened = _opened(request, attempt, saved.progress, fold=saved.fold)
    return [replace(opened, lost_seq=saved.seq, lost_digest=saved.digest, adopted=True)]


def _opened(
    request: OpenRequest, attempt: int, begin: int, *, fold: Mapping[str, Any] | None
) -> Opened:
    return Opened(
        attempt=attempt,
        token=request.token,
        begin=begin,
        request_id=request.request_id,
        key=request.key,
        reporter=request.reporters[0],
        incarnation=request.incarnation if request.rank in request.reporters else "",
        fold=fold,
        reporters=request.reporters if len(request.reporters) > 1 else (),
        opener=request.rank if request.rank in request.reporters[1:] else None,
        holder=request.holder,
    )


def check_attempt(state: RunState, attempt: int, token: str) -> None:
    """Raise AttemptSuperseded unless the request belongs to the current attempt.

    Raises LogForgotten where the log has forgotten something of it, or all of it.
    """
    _refuse_missing(state)
    lost = state.lost_attempt
    if lost is not None and attempt == lost.attempt:
        raise log_forgotten(state, lost)
    # A run that no attempt has opened yet is at attempt 0, without a token.
    if not token or (attempt, token) != (state.attempt, state.token):
        raise _superseded(state, attempt)
    refuse_forgotten(state)


def _check_ranks(request: OpenRequest) -> None:
    violations = [
        Violation(field, str(rank), "0 or above")
        for field, rank in (
            ("rank", request.rank),
            *(("reporter", reporter) for reporter in request.reporters),
        )
        if rank < 0
    ]
    if len(set(request.reporters)) != len(request.reporters):
        shown = ", ".join(str(rank) for rank in request.reporters)
        violations.append(Violation("reporters", shown, "each rank once"))
    if request.holder and request.key:
        wanted = "none in leader mode: the ranks get their values from the one who opens"
        violations.append(Violation("key", repr(request.key), wanted))
    if violations:
        raise InvalidRequest("the request to open an attempt is invalid", violations)


def _resume_point(request: OpenRequest) -> int | None:
    progress = request.progress
    if progress is not None:
        _check_progress("progress", progress)
    if request.saved is None:
        return progress
    if progress is not None and progress != request.saved.progress:
        raise InvalidRequest(
            "the progress to resume at differs from that of the state",
            [Violation("progress", str(progress), f"{request.saved.progress}, or none")],
        )
    return request.saved.progress


def _join(state: RunState, request: OpenRequest, progress: int | None) -> list[Event]:
    if (progress or 0) != state.begin:
        raise JoinRefused(
            f"attempt {state.attempt} of run {state.name!r} opened at progress {state.begin}; "
            f"rank {request.rank} would begin at {progress or 0}: load the same checkpoint on "
            "every rank",
            run=state.name,
            attempt=state.attempt,
            begin=state.begin,
            progress=progress or 0,
        )
    reporters = state.reporters
    if request.reporters != reporters.ranks:
        raise JoinRefused(
            f"attempt {state.attempt} of run {state.name!r} has {_ranks(reporters.ranks)} as its "
            f"reporter; rank {request.rank} declares {_ranks(request.reporters)}",
            run=state.name,
            attempt=state.attempt,
            reporter=reporters.ranks[0],
        )
    rank = request.rank
    if rank not in reporters.ranks or request.incarnation == reporters.incarnation(rank):
        return []
    if reporters.incarnation(rank):
        raise JoinRefused(
            f"the reporter of attempt {state.attempt} of run {state.name!r} has joined already: "
            "a restarted job needs a new key",
            run=state.name,
            attempt=state.attempt,
            reporter=rank,
        )
    return [Joined(state.attempt, request.incarnation, _named(state, rank))]


def _ranks(ranks: Sequence[int]) -> str:
    word = "rank" if len(ranks) == 1 else "ranks"
    return f"{word} {', '.join(str(rank) for rank in ranks)}"


def _named(state: RunState, rank: int) -> int | None:
    """Return the rank as an event names it: not where there is one reporter."""
    return rank if len(state.reporters.ranks) > 1 else None


def _mismatch(state: RunState, saved: SavedState, digest: str | None) -> StateMismatch:
    there = f"its digest there is {digest}" if digest else f"it ends at seq {state.seq}"
    remedy = (
        "to go on from this state all the same, delete the run here and start the trainers again"
        if saved.log
        else "the state does not name its log, as release 0.2.0 saved it. Where this log was put "
        f"back from an older copy: give resume_at={saved.progress} without the state, an older "
        "checkpoint, or the run another name"
    )
    return StateMismatch(
        f"the state was saved at seq {saved.seq} of a log of run {saved.run!r} with digest "
        f"{saved.digest}, which is not the log of this server: {there}; {remedy}",
        run=state.name,
        saved_seq=saved.seq,
        saved_digest=saved.digest,
        log_seq=state.seq,
        log_digest=digest or state.digest,
    )


def _superseded(state: RunState, attempt: int) -> AttemptSuperseded:
    if attempt <= state.attempt and state.imported_from:
        return AttemptSuperseded(
            f"attempt {attempt} of run {state.name!r} ended when the run was imported here from "
            f"{state.imported_from}: its ranks belong to the server there; to go on here, start "
            "the job from its checkpoint, which opens a new attempt",
            run=state.name,
            attempt=attempt,
            current=state.attempt,
            imported_from=state.imported_from,
        )
    if attempt == state.attempt:
        return AttemptSuperseded(
            f"the token is not that of attempt {attempt} of run {state.name!r}",
            run=state.name,
            attempt=attempt,
            current=state.attempt,
        )
    if attempt > state.attempt:
        return AttemptSuperseded(
            f"attempt {attempt} is not known to run {state.name!r}, which is at attempt "
            f"{state.attempt}: the run was deleted, made anew, imported or restored since",
            run=state.name,
            attempt=attempt,
            current=state.attempt,
        )
    return AttemptSuperseded(
        f"attempt {attempt} of run {state.name!r} is superseded by attempt {state.attempt}, "
        f"which opened at progress {state.begin}",
        run=state.name,
        attempt=attempt,
        current=state.attempt,
    )


# Values.


@dataclass(frozen=True, slots=True, kw_only=True)
class ValuesRequest:
    """A request for values."""

    begin: int
    stride: int = 1
    count: int = MAX_BLOCK_STEPS
    in_use: int = 0


def get_values(state: RunState, request: ValuesRequest) -> Block | Recorded | None:
    """Return the recorded values, or the event that records them, or None: not fixed yet.

    Raises BeyondHorizon, BeforeAttempt, RunFinished, InvalidRequest.
    """
    begin, stride = request.begin, request.stride
    _check_values_request(request)
    count = min(request.count, _most_steps(state))
    _refuse_before(state, begin)
    known = state.records.from_on(begin, stride, count)
    if known is not None:
        return known
    _refuse_finished(state)
    horizon = state.horizon
    if not state.spec.has_feedback:
        horizon = max(horizon, request.in_use + state.delay)
    if begin >= horizon:
        if begin >= horizon + MAX_BLOCK_STEPS * stride:
            raise BeyondHorizon(
                f"values at progress {begin} of run {state.name!r} lie further than a block "
                f"({MAX_BLOCK_STEPS} steps of {stride}) beyond the horizon, {horizon}",
                run=state.name,
                progress=begin,
                horizon=horizon,
                frontier=state.frontier,
            )
        return None
    last = min(begin + count * stride, horizon)
    points = range(begin, last, stride)
    values = [state.values(point) for point in points]
    decays: tuple[float, ...] | None = None
    if state.spec.has_weight_decay:
        decays = tuple(decay for _, group in values for decay in group or ())
    rates = tuple(rate for group, _ in values for rate in group)
    if all(state.records.at(point) is not None for point in points):
        return Block(begin, stride, len(state.spec.group_names), rates, decays)
    in_use = max(state.in_use, min(request.in_use, horizon - 1))
    return Recorded(state.attempt, begin, stride, rates, decays, in_use)


def waive(state: RunState, wanted: int) -> list[Event]:
    """Make the missing losses final as absent, D at a time, until `wanted` is below the horizon.

    Where enough of several reporters were there, theirs count.
    """
    if not state.spec.has_feedback or state.finished or wanted < state.horizon:
        return []
    if state.holder:
        # It goes on alone, and a declaration does what a waiver does.
        return []
    times = (wanted - state.horizon) // state.delay + 1
    until = state.frontier + times * state.delay
    reporters = state.reporters
    quorum = state.spec.feedback.quorum or len(reporters.ranks) // 2 + 1
    counted = tuple(
        (at, tuple(rank for rank in reporters.ranks if rank in parts))
        for at, parts in sorted(reporters.parts.items())
        if at < until and len(parts) >= min(quorum, len(reporters.ranks))
    )
    return [Waived(state.attempt, until, counted)]


def _most_steps(state: RunState) -> int:
    """Return how many steps fit into one message."""
    return max(1, MAX_BLOCK_VALUES // len(state.spec.group_names))


def _refuse_before(state: RunState, progress: int) -> None:
    if progress < state.begin:
        raise BeforeAttempt(
            f"attempt {state.attempt} of run {state.name!r} opened at progress {state.begin}; "
            f"values at {progress} belong to an attempt before it",
            run=state.name,
            progress=progress,
            begin=state.begin,
        )


def _check_values_request(request: ValuesRequest) -> None:
    violations = [
        *_outside("begin", request.begin, 0, MAX_PROGRESS),
        *_outside("stride", request.stride, 1, MAX_PROGRESS),
        *_outside("count", request.count, 1, MAX_BLOCK_STEPS),
        *_outside("in_use", request.in_use, 0, MAX_PROGRESS),
    ]
    if violations:
        raise InvalidRequest("the request for values is invalid", violations)


# Leader mode.


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferRequest:
    """A request for values to go on with while the server is away."""

    begin: int
    stride: int = 1
    count: int = MAX_OFFERED_STEPS


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Values beyond the horizon as the plan has them; the state may move on meanwhile."""

    begin: int
    stride: int
    steps: int
    plan: Plan
    records: Records
    etag: str
    """The state's."""
    permit: Permit
    permitted: int
    """First progress that the holder may not use alone."""

    def block(self) -> Block:
        """Return the values, recorded ones where they are recorded. This takes its time."""
        last = self.begin + self.steps * self.stride
        points = range(self.begin, last, self.stride)
        values = [self.records.at(point) or self.plan.values(point) for point in points]
        decays = None
        if values[0][1] is not None:
            decays = tuple(decay for _, group in values for decay in group or ())
        rates = tuple(rate for group, _ in values for rate in group)
        return Block(self.begin, self.stride, len(values[0][0]), rates, decays)


def check_holder(state: RunState, holder: str) -> None:
    """Raise NotHolder where an attempt in leader mode gets a request that is not its holder's."""
    if state.holder and holder != state.holder:
        raise NotHolder(
            f"attempt {state.attempt} of run {state.name!r} is in leader mode: its values go to "
            "the rank that opened it, and the others get them from there",
            run=state.name,
            attempt=state.attempt,
        )


def _refuse_others(state: RunState, holder: str) -> None:
    check_holder(state, holder)
    if not state.holder:
        raise NotHolder(
            f"attempt {state.attempt} of run {state.name!r} is not in leader mode: nobody may go "
            "on alone in it",
            run=state.name,
            attempt=state.attempt,
        )


def offer_values(state: RunState, request: OfferRequest, *, holder: str) -> list[Event]:
    """Let the holder go on alone with the values of an offer; nothing where it may already.

    Raises NotHolder, BeforeAttempt, RunFinished, InvalidRequest.
    """
    _refuse_others(state, holder)
    violations = [
        *_outside("begin", request.begin, 0, MAX_PROGRESS),
        *_outside("stride", request.stride, 1, MAX_PROGRESS),
        *_outside("count", request.count, 1, MAX_OFFERED_STEPS),
    ]
    if violations:
        raise InvalidRequest("the request for an offer is invalid", violations)
    _refuse_before(state, request.begin)
    _refuse_finished(state)
    end = request.begin + (_offered_steps(state, request) - 1) * request.stride + 1
    if end <= state.permitted and state.permits[-1].plan == state.etag:
        return []
    return [Permitted(state.attempt, state.horizon, max(end, state.permitted))]


def offered(state: RunState, request: OfferRequest) -> Offer:
    """Return what `offer_values` has permitted."""
    steps = _offered_steps(state, request)
    plan, records = state.plan, Records()
    for block in state.records.between(request.begin, request.begin + steps * request.stride):
        records.add(block)
    return Offer(
        begin=request.begin,
        stride=request.stride,
        steps=steps,
        plan=Plan(plan.revisions, plan.adjustments, plan.rollbacks),
        records=records,
        etag=state.etag,
        permit=state.permits[-1],
        permitted=state.permitted,
    )


def _offered_steps(state: RunState, request: OfferRequest) -> int:
    room = (MAX_PROGRESS - request.begin) // request.stride + 1
    return min(request.count, room, _most_steps(state))


def declare_values(
    state: RunState, blocks: Sequence[Block], *, holder: str, offer: int = 0
) -> list[Event]:
    """Record as fact what the holder used alone; nothing where that is done already.

    `offer`: the sequence number of the oldest permit whose values were used; 0: not known.

    Raises NotHolder, BeforeAttempt, BeyondPermit, ValuesConflict, RunFinished, InvalidRequest.
    """
    _refuse_others(state, holder)
    _check_declared(state, blocks)
    _refuse_before(state, blocks[0].begin)
    known = state.declared[-1].end if state.declared else 0
    fresh = []
    for block in blocks:
        if (part := block.cut(block.begin, known)) is not None:
            _refuse_other_values(state, part)
        if (part := block.cut(known, block.end)) is not None:
            fresh.append(part)
    if not fresh:
        return []
    _refuse_finished(state)
    first, last = fresh[0].begin, fresh[-1].last
    state.refuse_dropped(first)
    state.refuse_dropped_permit(offer)
    # The least that is certain: what was used is no older than the first offer that reached it.
    usable = [item for item in state.permits if (item.seq == offer if offer else item.end > first)]
    if last >= state.permitted or not usable:
        raise BeyondPermit(
            f"values up to progress {last} of run {state.name!r} were used without the server; in "
            f"attempt {state.attempt} that is permitted below {state.permitted}: the server lost "
            "what it had recorded, or the offer is another attempt's; restart the job from its "
            "checkpoint",
            run=state.name,
            progress=last,
            permitted=state.permitted,
        )
    return [Declared(state.attempt, tuple(fresh), usable[0].seq)]


def _refuse_other_values(state: RunState, block: Block) -> None:
    for at in range(block.begin, block.end, block.stride):
        known, got = state.declared_values(at), block.at(at)
        if known is None or got is None or not _same_values(known, got):
            raise ValuesConflict(
                f"progress {at} of attempt {state.attempt} of run {state.name!r} was declared with "
                f"LR and WD {known}; got {got}",
                run=state.name,
                progress=at,
            )


def _same_values(a: Values, b: Values) -> bool:
    pairs = zip((*a[0], *(a[1] or ())), (*b[0], *(b[1] or ())), strict=True)
    return all(_canonical.same_bits(x, y) for x, y in pairs)


def _check_declared(state: RunState, blocks: Sequence[Block]) -> None:
    groups = len(state.spec.group_names)
    most = min(MAX_OFFERED_STEPS, _most_steps(state))
    violations = []
    passed = -1
    for index, block in enumerate(blocks):
        path = f"blocks.{index}"
        rates, decays = len(block.learning_rates), len(block.weight_decays or ())
        violations += _outside(f"{path}.begin", block.begin, passed + 1, MAX_PROGRESS)
        violations += _outside(f"{path}.stride", block.stride, 1, MAX_PROGRESS)
        if rates == 0 or rates % groups:
            wanted = f"{groups} for each step, and a step at least"
            violations.append(Violation(f"{path}.learning_rates", f"{rates} numbers", wanted))
        if decays != (rates if state.spec.has_weight_decay else 0):
            wanted = "as many as learning rates, and none where the run sets no weight decay"
            violations.append(Violation(f"{path}.weight_decays", f"{decays} numbers", wanted))
        if not all(map(isfinite, (*block.learning_rates, *(block.weight_decays or ())))):
            violations.append(Violation(path, "a number that is not finite", "finite numbers"))
        if violations:
            break
        violations += _outside(f"{path}.end", block.last, passed + 1, MAX_PROGRESS - 1)
        passed = block.last
    steps = sum(block.steps for block in blocks if block.groups)
    if not blocks or steps > most:
        violations.append(Violation("blocks", f"{steps} steps", f"1 to {most} steps"))
    if violations:
        raise InvalidRequest("the declaration is invalid", violations)


# Losses.


class Outcome(Enum):
    """What became of one report."""

    RECORDED = "recorded"
    REPEATED = "repeated"
    LATE = "late"


def report_losses(
    state: RunState, reports: Sequence[Report], *, rank: int, incarnation: str
) -> tuple[list[Event], list[Outcome]]:
    """Append losses in order of progress; the whole batch or nothing.

    Raises NotReporter, BelowResumePoint, LossConflict, InvalidRequest, RunFinished.
    """
    _check_reporter(state, rank, incarnation)
    _check_reports(reports)
    passed = max(state.frontier, state.reporters.positions.get(rank, state.begin))
    seen: dict[tuple[int, int], Report] = {}
    late: dict[int, float] = {}
    fresh: list[Report] = []
    outcomes: list[Outcome] = []
    for given in reports:
        report = _with_one_nan(given)
        at, loss = report.progress, report.loss
        if at < state.begin:
            raise BelowResumePoint(
                f"the loss at progress {at} lies below progress {state.begin}, where attempt "
                f"{state.attempt} of run {state.name!r} opened",
                run=state.name,
                progress=at,
                begin=state.begin,
            )
        outcome, kept = Outcome.RECORDED, report
        known = seen.get((at, report.tries)) or _known(state, rank, report)
        if at < passed and loss is not None and not report.skipped:
            known = _loss_known(state, rank, report, known)
        if known is not None:
            _refuse_conflict(state, at, known.loss, loss)
            for name, value in report.validation.items():
                _refuse_conflict(state, at, known.validation.get(name, value), value)
            outcome, kept = Outcome.REPEATED, _bare(report)
        elif report.skipped and (at < passed or rank != state.reporters.ranks[0]):
            # The update is one for all: the first reporter speaks for the others. And it says
            # nothing of a step that is final.
            kept = _bare(report)
            outcome = Outcome.REPEATED if at < passed else Outcome.RECORDED
        elif at < passed:
            kept = _bare(report)
            outcome = Outcome.REPEATED if loss is None else Outcome.LATE
            if loss is not None:
                recorded = late[at] if at in late else state.late.get((at, rank))
                if recorded is not None:
                    _refuse_conflict(state, at, recorded, loss)
                else:
                    late[at] = loss
                    kept = replace(kept, loss=loss)
        elif report.has_metrics or report.skipped:
            seen[at, report.tries] = report
        if kept.has_metrics or kept.skipped or kept.moves_to > passed:
            fresh.append(kept)
        passed = max(passed, kept.moves_to)
        outcomes.append(outcome)
    if not fresh:
        return [], outcomes
    _refuse_finished(state)
    return [Reported(state.attempt, incarnation, tuple(fresh), _named(state, rank))], outcomes


def _known(state: RunState, rank: int, report: Report) -> Report | Observation | None:
    """Return what a reporter said of a try already, or None."""
    reporters, at = state.reporters, report.progress
    skipped = reporters.skips.get((at, report.tries))
    if skipped is not None and rank == reporters.ranks[0]:
        return skipped
    part = reporters.parts.get(at, {}).get(rank)
    if part is not None and part.tries == report.tries:
        return part
    found = state.observation(at, report.tries)
    if found is not None and found.is_skipped and rank != reporters.ranks[0]:
        return None
    if found is None or len(reporters.ranks) == 1 or found.is_skipped:
        return found
    members = reporters.members.get(at, {})
    return Observation(at, members[rank]) if rank in members else None


def _loss_known(
    state: RunState, rank: int, report: Report, known: Report | Observation | None
) -> Report | Observation | None:
    """Return what brought the loss of a completed step before; None: nothing did.

    Of the step may be known that it has none, though a validation loss, say; or that an update
    before it was skipped. A loss then comes late, and contradicts neither.
    """
    tries = report.tries
    while known is not None and (known.skipped if isinstance(known, Report) else known.is_skipped):
        tries += 1
        known = _known(state, rank, replace(report, tries=tries))
    return None if known is None or known.loss is None else known


def _bare(report: Report) -> Report:
    """Return only that the reporter moves on."""
    return Report(report.progress, None, 1.0, report.moves_to)


def _with_one_nan(report: Report) -> Report:
    """Return the report with every NaN as the same one: its payload carries no meaning."""
    values = (report.loss, report.gradient_norm, *report.validation.values())
    if not any(value is not None and isnan(value) for value in values):
        return report
    return replace(
        report,
        loss=_one_nan(report.loss),
        gradient_norm=_one_nan(report.gradient_norm),
        validation={name: nan if isnan(x) else x for name, x in report.validation.items()},
    )


def _one_nan(value: float | None) -> float | None:
    return nan if value is not None and isnan(value) else value


def _refuse_conflict(state: RunState, at: int, known: float | None, loss: float | None) -> None:
    if known is None and loss is None:
        return
    if known is None or loss is None or not _canonical.same_bits(known, loss):
        before, now = ("none" if x is None else repr(x) for x in (known, loss))
        raise LossConflict(
            f"progress {at} of attempt {state.attempt} of run {state.name!r} has loss {before} "
            f"already; got {now}",
            run=state.name,
            progress=at,
            recorded=before,
            got=now,
        )


def _check_reporter(state: RunState, rank: int, incarnation: str) -> None:
    reporters = state.reporters
    if rank not in reporters.ranks:
        verb = "is" if len(reporters.ranks) == 1 else "are"
        raise NotReporter(
            f"rank {rank} is not the reporter of attempt {state.attempt} of run {state.name!r}: "
            f"{_ranks(reporters.ranks)} {verb}",
            run=state.name,
            rank=rank,
            reporter=reporters.ranks[0],
        )
    known = reporters.incarnation(rank)
    if known and incarnation != known:
        raise NotReporter(
            f"another process reports as rank {rank} in attempt {state.attempt} of run "
            f"{state.name!r}: a restarted trainer opens a new attempt",
            run=state.name,
            rank=rank,
            reporter=reporters.ranks[0],
        )


def _check_reports(reports: Sequence[Report]) -> None:
    violations = []
    for index, report in enumerate(reports):
        path = f"reports.{index}"
        at, to = report.progress, report.moves_to
        violations += _outside(f"{path}.progress", at, 0, MAX_PROGRESS - 1)
        violations += _outside(f"{path}.try", report.tries, 0, MAX_TRIES)
        if report.skipped and to != at:
            wanted = f"progress {at} itself: a skipped update does not advance"
            violations.append(Violation(f"{path}.moves_to", str(to), wanted))
        elif not report.skipped and not at < to <= MAX_PROGRESS:
            wanted = f"above progress {at}, at most {MAX_PROGRESS}"
            violations.append(Violation(f"{path}.moves_to", str(to), wanted))
        if not (isfinite(report.weight) and report.weight > 0):
            violations.append(
                Violation(f"{path}.weight", repr(report.weight), "a finite number above 0")
            )
        if report.gradient_norm is not None and report.gradient_norm < 0:
            wanted = "a number from 0 on; it may be NaN or infinite"
            got = repr(report.gradient_norm)
            violations.append(Violation(f"{path}.gradient_norm", got, wanted))
        if report.batch is not None:
            violations += _outside(f"{path}.batch", report.batch, 1, MAX_PROGRESS)
        if len(report.validation) > MAX_VALIDATION_LOSSES:
            got = f"{len(report.validation)} names"
            wanted = f"at most {MAX_VALIDATION_LOSSES}"
            violations.append(Violation(f"{path}.validation_losses", got, wanted))
        for name in report.validation:
            if name == "loss" or not is_metric(name):
                wanted = "1 to 64 of a-z A-Z 0-9 . _ / -, and not loss itself"
                field = f"{path}.validation_losses"
                violations.append(Violation(field, repr(name), wanted))
    if violations:
        raise InvalidRequest("the reports are invalid", violations)


# Directives.


def acknowledge_directive(
    state: RunState, *, rank: int, directive: str, outcome: str, progress: int, detail: str
) -> list[Event]:
    """Record what became of a directive; the first answer stands.

    Raises NotReporter, AdjustmentNotFound, InvalidRequest.
    """
    found = state.find(directive)
    if found is None or not isinstance(found.change, Direct):
        raise adjustment_not_found(state, directive, "directive")
    if rank not in state.reporters.ranks:
        _check_reporter(state, rank, "")
    _check_progress("progress", progress)
    if directive in state.outcomes:
        return []
    return [Acknowledged(state.attempt, directive, outcome, progress, rank, detail[:MAX_DETAIL])]


# Saved states.


def save_state(state: RunState, progress: int) -> bytes:
    """Return a compact, versioned state from which a server can resume at `progress`.

    Raises LossesPending, BeforeAttempt.
    """
    _check_progress("progress", progress)
    if progress < state.begin:
        raise BeforeAttempt(
            f"attempt {state.attempt} of run {state.name!r} opened at progress {state.begin}; "
            f"it has no state at {progress}",
            run=state.name,
            progress=progress,
            begin=state.begin,
        )
    if state.spec.has_feedback and state.frontier < progress:
        raise LossesPending(
            f"the losses of run {state.name!r} from progress {state.frontier} up to {progress} "
            "are not final yet",
            run=state.name,
            frontier=state.frontier,
            progress=progress,
        )
    content = _canonical.to_bytes(
        {"seq": state.seq, "digest": state.digest, "fold": state.saved_fold(progress)}
    )
    check = _canonical.chain("", content)
    head = f"lrpilot-state {STATE_VERSION} {check}\n".encode("ascii")
    return head + base64.b85encode(zlib.compress(content))


def read_state(data: bytes, run: str) -> SavedState:
    """Return what `save_state` wrote. Raises InvalidState."""
    head, _, body = data.partition(b"\n")
    words = head.decode("ascii", "replace").split(" ")
    if len(words) != 3 or words[0] != "lrpilot-state":
        raise InvalidState(f"this is not a saved state of lrpilot: it begins with {head[:40]!r}")
    if words[1] != str(STATE_VERSION):
        raise InvalidState(
            f"the state has version {words[1]}; this release reads version {STATE_VERSION}",
            version=words[1],
        )
    try:
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(base64.b85decode(body), MAX_STATE_BYTES)
        if not unpacker.eof or unpacker.unused_data:
            content = b""
    except (ValueError, zlib.error, binascii.Error):
        content = b""
    if _canonical.chain("", content) != words[2]:
        raise InvalidState("the state is damaged: its checksum does not match")
    tree = _canonical.from_bytes(content)
    name = tree["fold"]["name"]
    if name != run:
        raise InvalidState(
            f"the state belongs to run {name!r}, not to run {run!r}", run=run, state_run=name
        )
    return SavedState(
        run=name,
        seq=tree["seq"],
        digest=tree["digest"],
        progress=tree["fold"]["progress"],
        fold=tree["fold"],
    )


def _check_progress(field: str, progress: int) -> None:
    if violations := _outside(field, progress, 0, MAX_PROGRESS):
        raise InvalidRequest("the progress is invalid", violations)


def _outside(field: str, got: int, least: int, most: int) -> list[Violation]:
    """Return the violation of a field whose value lies outside a range, or none."""
    return [] if least <= got <= most else [Violation(field, str(got), f"{least} to {most}")]
