"""One process on one run: attach, open the attempt, go back, values, reports, directives, the end.

Every method is for the training thread. The background threads are those of the lease and of
the reporter; what they meet is raised here, at the next call.
"""

import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol
from weakref import ref

from lrpilot.client import _timing
from lrpilot.client._arguments import integer
from lrpilot.client._call import Backoff, Link
from lrpilot.client._changes import Change, ChangeHandler, read_change
from lrpilot.client._directives import Directive, Handlers
from lrpilot.client._errors import (
    AttemptNotOpen,
    AttemptOpen,
    AttemptSuperseded,
    ClientFailed,
    ConnectRefused,
    DirectiveDeclined,
    JoinRefused,
    LossesPending,
    LrpilotError,
    RunFinished,
    ServerError,
    ServerUnavailable,
    invalid_argument,
)
from lrpilot.client._holder import Holder
from lrpilot.client._launch import Group, Place
from lrpilot.client._leader import Leader
from lrpilot.client._lease import Lease
from lrpilot.client._loss import Loss, take
from lrpilot.client._metrics import Said
from lrpilot.client._node import share
from lrpilot.client._reporter import Reporter
from lrpilot.client._state import SavedState, decode
from lrpilot.client._values import Values
from lrpilot.v1 import trainer_pb2 as pb

logger = logging.getLogger("lrpilot.client")


class Follower(Protocol):
    """A scheduler, as the session knows it."""

    @property
    def progress(self) -> int:
        """Progress at which it stands."""

    def go_to(self, progress: int) -> None:
        """Stand at another progress, and write its values."""


class Session:
    """What a pilot and its schedulers share."""

    def __init__(
        self,
        link: Link,
        place: Place,
        *,
        reporters: tuple[int, ...],
        resume_at: int | None,
        key: str | None,
        leads: bool,
    ) -> None:
        """Begin; with `leads` in leader mode, and then every rank makes its session together."""
        self.link = link
        self.place = place
        self.opened: pb.OpenAttemptResponse | None = None
        """The server's answer that opened the attempt; None: it has not opened yet."""
        self.progress = 0
        """Where the scheduler that is furthest stands; at first where the attempt opened."""
        self.handlers = Handlers()
        self._on_change: list[ChangeHandler] = []
        self._begun: list[ref[Follower]] = []
        """The schedulers. One that nobody holds any more makes no steps."""
        self.after_update: list[Callable[[int], None]] = []
        """Called on the training thread with the progress of each completed update that is spoken
        of, once or more, while the optimizers still hold the values that it used."""
        self.after_step: list[Callable[[], None]] = []
        """Called on the training thread once every scheduler has moved on, at the same step on
        every rank."""
        self._arrived = 0
        """Progress at which the last scheduler of all stood after a step."""
        self._is_meeting = False
        self._carried_out: set[str] = set()
        """Ids of the rollbacks that this process has made."""
        self._reporters = reporters
        self._resume_at = resume_at
        self._key = key
        self._leads = leads
        self._passing = place.group.on_cpu() if leads and place.group is not None else None
        """What rank 0 passes values on over, in leader mode."""
        self._holder_token = b""
        """What the server returned as `holder`; it stays on rank 0."""
        self._incarnation = uuid.uuid4().hex
        self._lease: Lease | Leader | None = None
        self._reporter: Reporter | None = None
        self._closed = False

    @property
    def schedulers(self) -> list[Follower]:
        """Those that have begun."""
        return [item for begun in self._begun if (item := begun()) is not None]

    # The start.

    def attach(self, read_spec: Callable[[], str], on_change: pb.OnChange.ValueType) -> None:
        """Create the run, or compare the spec with its own; rank 0 does it for a process group.

        Raises InvalidSpec, RunNotFound, SpecChanged, ServerUnavailable, …, on every rank.
        """

        def call() -> bytes:
            link = self.link
            request = pb.AttachRunRequest(
                run=link.run,
                spec_document=read_spec(),
                on_change=on_change,
                request_id=uuid.uuid4().hex,
            )
            answer: pb.AttachRunResponse = link.until(
                link.stub.AttachRun,
                request,
                timeout_s=_timing.CALL_S,
                patience_s=min(_timing.CONNECT_PATIENCE_S, link.outage_timeout_s),
                doing="attaches to the run",
            )
            return answer.SerializeToString()

        answer = pb.AttachRunResponse.FromString(self._once(call))
        if answer.created or answer.revised:
            logger.info(
                "run %s was %s at %s",
                self.link.run,
                "created" if answer.created else "revised",
                self.link.address,
            )

    def open(self, state: Mapping[str, Any] | None) -> pb.OpenAttemptResponse:
        """Open the attempt, or join it, and return the server's answer; once opened, return it.

        With a process group every rank calls it at the same point. Raises InvalidState,
        ResumePointRequired, JoinRefused, StateMismatch, AttemptOpen, ServerUnavailable, …; with
        a process group on every rank.
        """
        self.link.check()
        if self.opened is not None:
            if state is not None:
                self.refuse_other(decode(self.link.run, state), self.progress)
            return self.opened
        saved, problem = SavedState(None, b""), None
        try:
            if state is not None:
                saved = decode(self.link.run, state)
        except LrpilotError as error:
            problem = error
        progress = self._resume_at if saved.progress is None else saved.progress
        agree(
            self.place.group,
            problem,
            {"the progress to begin at": progress},
            JoinRefused,
            "load the same checkpoint on every rank",
        )
        opened = pb.OpenAttemptResponse.FromString(
            self._once(lambda: self._open(progress, saved.blob, self._key or "", ""))
        )
        self._begin(opened)
        return opened

    def _begin(self, opened: pb.OpenAttemptResponse) -> None:
        """Take up an attempt that has opened."""
        link, rank = self.link, self.place.rank
        link.heard(opened.begin, opened.horizon)
        link.got.log = opened.log
        self._reporter = None
        if rank in self._reporters:
            self._reporter = Reporter(link, opened, rank=rank, incarnation=self._incarnation)
        self._lease = self._lead(opened) if self._leads else self._take_lease(opened)
        self.opened = opened
        self.progress = self._arrived = opened.begin
        logger.info(
            "run %s: rank %d is in attempt %d, which began at progress %d%s",
            link.run,
            rank,
            opened.attempt.number,
            opened.begin,
            " (the server restored the run from the state)" if opened.restored else "",
        )

    def _take_lease(self, opened: pb.OpenAttemptResponse) -> Lease:
        return Lease(
            self.link,
            opened,
            self._reporters,
            self._reporter,
            self._carried_out,
            explain=bool(self._on_change),
            node=share(self.link, opened, self.place.world_size),
        )

    def _lead(self, opened: pb.OpenAttemptResponse) -> Leader:
        group, holder = self._passing, None
        explain = bool(self._on_change)
        asked = [explain] if group is None else group.gather(explain)
        if self.place.rank == 0:
            holder = Holder(self.link, opened, self._holder_token, self._reporter)
            holder.explain = any(asked)
        return Leader(
            self.link,
            opened,
            group=group,
            holder=holder,
            reporter=self._reporter,
            carried_out=self._carried_out,
            explain=explain,
        )

    def roll_back(self, directive: Directive, progress: int) -> None:
        """Open a new attempt at `progress`, as a directive asks, and move every scheduler there.

        With a process group every rank calls it at the same point. Reports of the old attempt
        that cannot be delivered within `_timing.ROLL_BACK_FLUSH_S` are dropped. Raises what a
        background thread met, AttemptNotOpen, InvalidArgument, JoinRefused,
        AdjustmentNotFound, ServerUnavailable, …; with a process group on every rank. In leader
        mode a server that is away stops no training: DirectiveDeclined then.
        """
        problem: LrpilotError | None = None
        try:
            if not self._has_successor():
                self.link.check()
            if self._lease is None:
                raise self._not_open()
            if not isinstance(directive, Directive) or directive.kind != "rollback":
                raise invalid_argument("directive", directive, "one of kind 'rollback'")
            progress = integer("progress", progress, 0, directive.progress)
        except LrpilotError as error:
            problem = error
        if self._leads:
            agree(self.place.group, problem or self._away(directive), {}, JoinRefused, "")
        if problem is None:
            problem = self._deliver(_timing.ROLL_BACK_FLUSH_S)
        agree(
            self.place.group,
            problem,
            {"the directive": repr(directive), "the progress to go back to": progress},
            JoinRefused,
            "roll every rank back to the same progress",
        )
        key = f"{self._key}/{directive.id}" if self._key else ""
        opened = pb.OpenAttemptResponse.FromString(
            self._once(lambda: self._open(progress, b"", key, directive.id))
        )
        link, lease, reporter = self.link, self._lease, self._reporter
        dropped = link.undelivered()
        if dropped:
            logger.warning(
                "run %s: %d reports of attempt %d were not delivered before the rollback",
                link.run,
                dropped,
                opened.attempt.number - 1,
            )
        self.link = link.successor()
        self._carried_out.add(directive.id)
        self._begin(opened)
        # What the calls of the old attempt still meet concerns nobody.
        link.close()
        if lease is not None:
            lease.close()
        if reporter is not None:
            reporter.close()
        for scheduler in self.schedulers:
            scheduler.go_to(opened.begin)

    def _away(self, directive: Directive) -> DirectiveDeclined | None:
        """Return on rank 0 that the server does not answer, if so: no attempt can open then.

        An attempt asked for in vain might have opened all the same, and ended this one.
        """
        link, patience_s = self.link, _timing.LEADER_PATIENCE_S
        if self.place.rank != 0:
            return None
        request = pb.AttachRunRequest(run=link.run, request_id=uuid.uuid4().hex)
        try:
            link.until(
                link.stub.AttachRun,
                request,
                timeout_s=patience_s,
                patience_s=patience_s,
                doing=f"follows directive {directive.id}",
            )
        except ServerUnavailable as error:
            return DirectiveDeclined(
                f"nobody can go back without the server: {error}", facts={"run": link.run}
            )
        except LrpilotError:
            # It answers; what it says of the run is met below.
            return None
        return None

    def _deliver(self, patience_s: float) -> LrpilotError | None:
        """Declare what was used alone, and deliver the queued reports; return what was met."""
        end_s = time.monotonic() + patience_s
        problem = self.settle(patience_s)
        if self._reporter is not None:
            self._reporter.flush(max(end_s - time.monotonic(), 0.0))
        return problem

    def settle(self, patience_s: float) -> LrpilotError | None:
        """Declare what was used alone in leader mode, for a bounded time; return what was met."""
        try:
            if self._lease is not None:
                self._lease.settle(patience_s)
        except LrpilotError as error:
            return error
        return None

    def _has_successor(self) -> bool:
        """Return whether another rank may have opened the attempt of a rollback already.

        Ranks that share a key do not wait for each other: one may get there before this one, whose
        requests are then refused before it meets the directive.
        """
        if self._key is None or not isinstance(self.link.failure, AttemptSuperseded):
            return False
        return self._is_meeting or (self._lease is not None and self._lease.awaits_rollback())

    def refuse_other(self, saved: SavedState, progress: int) -> None:
        """Raise AttemptOpen unless a state leaves the open attempt at `progress`."""
        if saved.progress not in (None, progress):
            raise AttemptOpen(
                f"run {self.link.run!r}: the attempt is open and stands at progress {progress}; "
                f"a state of progress {saved.progress} cannot move it. Give the state when the "
                "scheduler is made, or make it with defer=True and load the state before the "
                "first step; to go back within this process, close the pilot and connect again",
                facts={
                    "run": self.link.run,
                    "progress": progress,
                    "state_progress": saved.progress,
                },
            )

    def _open(self, progress: int | None, blob: bytes, key: str, directive: str) -> bytes:
        link = self.link
        request = pb.OpenAttemptRequest(
            run=link.run,
            request_id=uuid.uuid4().hex,
            key=key,
            state=blob,
            rank=self.place.rank,
            reporter=self._reporters[0],
            reporters=self._reporters if len(self._reporters) > 1 else (),
            incarnation=self._incarnation,
            directive=directive,
            leader=self._leads,
        )
        if progress is not None:
            request.progress = progress
        if directive and self.opened is not None:
            request.met_in.CopyFrom(self.opened.attempt)
        answer: pb.OpenAttemptResponse = link.until(
            link.stub.OpenAttempt,
            request,
            timeout_s=_timing.OPEN_CALL_S,
            patience_s=min(_timing.OPEN_PATIENCE_S, link.outage_timeout_s),
            doing="opens the attempt",
        )
        if self._leads and not answer.holder:
            raise ServerError(
                f"run {link.run!r}: the server at {link.address} does not know leader mode; "
                "allowed: a server of this release or later, or mode='independent'",
                facts={"run": link.run, "address": link.address},
            )
        self._holder_token = answer.holder
        answer.ClearField("holder")
        return answer.SerializeToString()

    def _once(self, call: Callable[[], bytes]) -> bytes:
        """Return what `call` returned, which rank 0 alone calls where there is a process group."""
        group = self.place.group
        if group is None:
            return call()
        outcome = group.from_first(lambda: _outcome(call))
        if isinstance(outcome, LrpilotError):
            raise outcome
        return bytes(outcome)

    # The steps.

    def follow(self, scheduler: Follower) -> None:
        """Count a scheduler as one that has begun."""
        self._begun.append(ref(scheduler))

    def values(self, progress: int, stride: int = 0) -> Values:
        """Return learning rate and weight decay of each group; they are now in use.

        `stride` is the increment by which the caller goes on; 0: not known.

        Raises what a background thread met, AttemptNotOpen, BeforeAttempt, BeyondHorizon,
        ServerUnavailable, AttemptSuperseded, ….
        """
        return self._ready().values(progress, stride)

    def report(self, progress: int, said: Said, moves_to: int, tries: int | None = None) -> None:
        """Queue what was said of the step at `progress`; nothing on ranks that do not report.

        A completed step moves to `moves_to`; of a skipped one `tries` is how many the caller had
        skipped there before. Raises what a background thread met, AttemptNotOpen,
        InvalidArgument, BelowResumePoint, LossConflict, BacklogFull.
        """
        self._ready()
        if not said.skipped:
            for hook in self.after_update:
                hook(progress)
        if self._reporter is None:
            return
        if said.skipped:
            self._reporter.skip(progress, said.read(), tries)
        else:
            self._reporter.report(progress, said.read(), moves_to)

    def report_validation(self, name: str, loss: Loss) -> None:
        """Let a validation loss ride in the next report; nothing on ranks that do not report.

        Raises what a background thread met, AttemptNotOpen, InvalidArgument.
        """
        self._ready()
        if self._reporter is not None:
            self._reporter.report_validation(name, take(loss, "loss"))

    def _ready(self) -> Lease | Leader:
        """Return the lease. Raises what a background thread met, AttemptNotOpen."""
        if not self._has_successor():
            (self._lease or self.link).check()
        if self._lease is None:
            raise self._not_open()
        return self._lease

    # Changes.

    def on_change(self, handler: ChangeHandler) -> None:
        """Call a handler with each change that is fetched from now on. Raises InvalidArgument."""
        if not callable(handler):
            raise invalid_argument("handler", handler, "a function of one argument")
        self._on_change.append(handler)
        if self._lease is not None:
            self._lease.explain = True

    def _tell(self, progress: int) -> None:
        """Call the handlers of changes with those that show at a progress in use."""
        lease = self._lease
        while lease is not None and (change := lease.next_change(progress)) is not None:
            for handler in self._on_change:
                handler(change)

    # Directives.

    def arrive(self) -> None:
        """Carry out what is due once every scheduler has arrived at a step.

        Raises what a handler raises.
        """
        if self._is_meeting:
            # A handler writes values; what else is due comes after it.
            return
        arrived, opened = min(item.progress for item in self.schedulers), self.opened
        self.meet(arrived)
        if self.opened is opened and arrived > self._arrived:
            self._arrived = arrived
            for hook in self.after_step:
                hook()

    def meet(self, progress: int) -> None:
        """Call the handlers of the directives that are due at a progress in use, each once.

        Raises what a handler raises, after the server was told that it failed.
        """
        lease = self._lease
        if self._is_meeting or lease is None:
            return
        self._tell(progress)
        self._is_meeting = True
        try:
            # What the old attempt had asked for beside a rollback is gone with it.
            while lease is self._lease and (directive := lease.next_due(progress)) is not None:
                self._follow(directive, progress)
        finally:
            self._is_meeting = False

    def _follow(self, directive: Directive, progress: int) -> None:
        run, opened = self.link.run, self.opened
        asked = f"run {run}: directive {directive.id}, due at progress {directive.progress}, asks"
        handler = self.handlers.get(directive.kind)
        if handler is None:
            logger.warning(
                "%s for %s (%s). No handler is registered for it: training goes on unchanged",
                asked,
                directive.kind,
                directive.reason,
            )
            self._acknowledge(directive, progress, pb.DIRECTIVE_OUTCOME_UNHANDLED, "")
            return
        logger.info("%s for %s (%s)", asked, directive.kind, directive.reason)
        try:
            handler(directive)
        except DirectiveDeclined as error:
            logger.warning(
                "%s for %s, which was not done: %s. Training goes on unchanged",
                asked,
                directive.kind,
                error,
            )
            self._acknowledge(directive, progress, pb.DIRECTIVE_OUTCOME_FAILED, str(error))
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
            self._acknowledge(directive, progress, pb.DIRECTIVE_OUTCOME_FAILED, text)
            raise
        else:
            if self.opened is opened and directive.kind == "rollback":
                text = "the handler returned without going back"
                self._acknowledge(directive, progress, pb.DIRECTIVE_OUTCOME_FAILED, text)
            elif self.opened is opened:
                # The attempt that a rollback opens says itself that it was made.
                self._acknowledge(directive, progress, pb.DIRECTIVE_OUTCOME_DONE, "")

    def _acknowledge(
        self,
        directive: Directive,
        progress: int,
        outcome: pb.DirectiveOutcome.ValueType,
        detail: str,
    ) -> None:
        """Tell the server what became of a directive, for a bounded time; one rank does it."""
        if self.place.rank != self._reporters[0] or self.opened is None:
            return
        link, patience_s = self.link, _timing.ACKNOWLEDGE_PATIENCE_S
        if self._leads:
            patience_s = min(patience_s, _timing.LEADER_PATIENCE_S)
        try:
            link.until(
                link.stub.AcknowledgeDirective,
                pb.AcknowledgeDirectiveRequest(
                    run=link.run,
                    attempt=self.opened.attempt,
                    rank=self.place.rank,
                    directive=directive.id,
                    outcome=outcome,
                    progress=progress,
                    detail=detail,
                ),
                timeout_s=patience_s,
                patience_s=patience_s,
                doing=f"acknowledges directive {directive.id}",
            )
        except LrpilotError as error:
            # The training is not at fault, and what it met is in its own log.
            logger.warning(
                "run %s: directive %s could not be acknowledged: %s", link.run, directive.id, error
            )

    # Checkpoints.

    def save(self, progress: int) -> bytes:
        """Return the server's state from which a run resumes at `progress`.

        Empty, with a warning, where the server is away or losses are not final for longer than
        `_timing.SAVE_PATIENCE_S`: a checkpoint must not fail because of that. Each rank may call
        it alone. Raises what a background thread met, AttemptSuperseded, ….
        """
        try:
            return self._save(progress).state
        except (ServerUnavailable, LossesPending, ServerError) as error:
            link = self.link
            if link.failure is not None and not isinstance(link.failure, RunFinished):
                # A background thread met it: there is nothing to go on with.
                raise
            logger.warning(
                "run %s: the state at progress %d was saved WITHOUT the server's part (%s). "
                "Training resumes from it, but a server that has lost the run cannot be "
                "restored from it",
                link.run,
                progress,
                error,
            )
            return b""

    def changes_in_force(self, progress: int) -> list[Change]:
        """Return the changes of LR or WD that count at `progress`, in order.

        Waits as `save` does. Raises what a background thread met, ServerUnavailable,
        LossesPending, AttemptSuperseded, ….
        """
        return [read_change(item) for item in self._save(progress).in_force]

    def _save(self, progress: int) -> pb.SaveStateResponse:
        link = self.link
        if not isinstance(link.failure, RunFinished):
            # What a run that is over has recorded can still be saved.
            link.check()
        if self.opened is None or self._lease is None:
            raise self._not_open()
        start_s = time.monotonic()
        end_s = start_s + min(_timing.SAVE_PATIENCE_S, link.outage_timeout_s)
        doing = f"saves the state at progress {progress}"
        # A job that goes on alone has shown its patience; a checkpoint does not stop it for more.
        if not self._lease.settle(min(end_s - start_s, _timing.LEADER_PATIENCE_S)):
            raise link.unavailable(
                doing, time.monotonic() - start_s, "rank 0 has not declared yet what it used alone"
            )
        if self._reporter is not None:
            self._reporter.flush(max(end_s - time.monotonic(), 0.0))
            if not isinstance(link.failure, RunFinished):
                link.check()
        backoff = Backoff()
        while True:
            left_s = max(end_s - time.monotonic(), 0.0)
            wait_s = min(_timing.SAVE_WAIT_S, left_s)
            request = pb.SaveStateRequest(
                run=link.run,
                attempt=self.opened.attempt,
                progress=progress,
                wait_ms=int(wait_s * 1000),
                held=link.held(),
            )
            try:
                answer: pb.SaveStateResponse = link.until(
                    link.stub.SaveState,
                    request,
                    timeout_s=wait_s + _timing.ANSWER_S,
                    patience_s=left_s,
                    doing=doing,
                )
            except LossesPending:
                if time.monotonic() >= end_s:
                    raise
                link.pause(min(backoff.next_s(), end_s - time.monotonic()))
            else:
                return answer

    def _not_open(self) -> AttemptNotOpen:
        return AttemptNotOpen(
            f"run {self.link.run!r}: the attempt has not opened yet. It opens with "
            "pilot.scheduler(optimizer) or pilot.values(n); with defer=True at load_state_dict(), "
            "apply(), or before the optimizer's first step where the optimizer has "
            "register_step_pre_hook()",
            facts={"run": self.link.run},
        )

    # The end.

    def close(self, flush_s: float) -> int:
        """Deliver what is queued for at most `flush_s`, end the threads, return what is left."""
        if self._closed:
            return 0
        self._closed = True
        try:
            problem = self._deliver(flush_s)
            if problem is not None:
                self.link.fail(problem)
        finally:
            self.link.close()
            if self._lease is not None:
                self._lease.close()
            if self._reporter is not None:
                self._reporter.close()
        return self.link.undelivered()

    def forked(self) -> None:
        """Become closed in a child process, which has neither the threads nor the connection."""
        self._closed = True
        self.link.forked()


def agree(
    group: Group | None,
    problem: LrpilotError | None,
    facts: Mapping[str, object],
    refusal: type[ConnectRefused] | type[JoinRefused],
    remedy: str,
) -> None:
    """Raise on every rank what the first rank with a problem met, or in what the ranks differ.

    Without it a rank that raises alone would leave the others in the next collective.
    """
    if group is None:
        if problem is not None:
            raise problem
        return
    said: Sequence[tuple[LrpilotError | None, Mapping[str, object]]] = group.gather(
        (problem, dict(facts))
    )
    for rank, (error, _) in enumerate(said):
        if error is not None:
            raise error if rank == group.rank else error.again(f" (rank {rank})", rank=rank)
    for name in facts:
        first_with: dict[object, int] = {}
        for rank, (_, theirs) in enumerate(said):
            first_with.setdefault(theirs[name], rank)
        if len(first_with) > 1:
            shown = ", ".join(
                f"{value!r} on rank {rank}" for value, rank in list(first_with.items())[:8]
            )
            raise refusal(f"the ranks differ in {name}: {shown}; {remedy}", facts={"got": shown})


def _outcome(call: Callable[[], bytes]) -> bytes | LrpilotError:
    """Return what `call` returned or raised: the other ranks wait for either."""
    try:
        return call()
    except LrpilotError as error:
        return error
    except Exception as error:
        logger.exception("rank 0 failed")
        return ClientFailed(f"rank 0 failed: {error!r}")
