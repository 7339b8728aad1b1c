"""One process on one run: attach, open the attempt, values, reports, saved states, the end.

Every method is for the training thread. The background threads are those of the lease and of
the reporter; what they meet is raised here, at the next call.
"""

import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lrpilot.client import _timing
from lrpilot.client._call import Backoff, Link
from lrpilot.client._errors import (
    AttemptNotOpen,
    AttemptOpen,
    ClientFailed,
    ConnectRefused,
    JoinRefused,
    LossesPending,
    LrpilotError,
    RunFinished,
    ServerError,
    ServerUnavailable,
)
from lrpilot.client._launch import Group, Place
from lrpilot.client._lease import Lease, Values
from lrpilot.client._loss import Loss, take
from lrpilot.client._reporter import Reporter
from lrpilot.client._state import SavedState, decode
from lrpilot.v1 import trainer_pb2 as pb

logger = logging.getLogger("lrpilot.client")


class Session:
    """What a pilot and its schedulers share."""

    def __init__(
        self, link: Link, place: Place, *, reporter: int, resume_at: int | None, key: str | None
    ) -> None:
        self.link = link
        self.place = place
        self.opened: pb.OpenAttemptResponse | None = None
        """The server's answer that opened the attempt; None: it has not opened yet."""
        self.progress = 0
        """Where the scheduler that is furthest stands; at first where the attempt opened."""
        self._reporter_rank = reporter
        self._resume_at = resume_at
        self._key = key
        self._incarnation = uuid.uuid4().hex
        self._lease: Lease | None = None
        self._reporter: Reporter | None = None
        self._closed = False

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
            self._once(lambda: self._open(progress, saved.blob))
        )
        self.link.heard(opened.begin, opened.horizon)
        if self.place.rank == self._reporter_rank:
            self._reporter = Reporter(
                self.link, opened, rank=self.place.rank, incarnation=self._incarnation
            )
        self._lease = Lease(self.link, opened, self._reporter_rank, self._reporter)
        self.opened = opened
        self.progress = opened.begin
        logger.info(
            "run %s: rank %d is in attempt %d, which began at progress %d%s",
            self.link.run,
            self.place.rank,
            opened.attempt.number,
            opened.begin,
            " (the server restored the run from the state)" if opened.restored else "",
        )
        return opened

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

    def _open(self, progress: int | None, blob: bytes) -> bytes:
        link = self.link
        request = pb.OpenAttemptRequest(
            run=link.run,
            request_id=uuid.uuid4().hex,
            key=self._key or "",
            state=blob,
            rank=self.place.rank,
            reporter=self._reporter_rank,
            incarnation=self._incarnation,
        )
        if progress is not None:
            request.progress = progress
        answer: pb.OpenAttemptResponse = link.until(
            link.stub.OpenAttempt,
            request,
            timeout_s=_timing.OPEN_CALL_S,
            patience_s=min(_timing.OPEN_PATIENCE_S, link.outage_timeout_s),
            doing="opens the attempt",
        )
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

    def values(self, progress: int, stride: int = 0) -> Values:
        """Return learning rate and weight decay of each group; they are now in use.

        `stride` is the increment by which the caller goes on; 0: not known.

        Raises what a background thread met, AttemptNotOpen, BeforeAttempt, BeyondHorizon,
        ServerUnavailable, AttemptSuperseded, ….
        """
        self.link.check()
        if self._lease is None:
            raise self._not_open()
        return self._lease.values(progress, stride)

    def report(self, progress: int, loss: Loss, weight: float, moves_to: int) -> None:
        """Queue the loss at `progress` and the move to `moves_to`; nothing on other ranks.

        Raises what a background thread met, AttemptNotOpen, InvalidArgument, BelowResumePoint,
        LossConflict, BacklogFull.
        """
        self.link.check()
        if self._lease is None:
            raise self._not_open()
        if self._reporter is not None:
            number = None if loss is None else take(loss)
            self._reporter.report(progress, number, weight, moves_to)

    def save(self, progress: int) -> bytes:
        """Return the server's state from which a run resumes at `progress`.

        Empty, with a warning, where the server is away or losses are not final for longer than
        `_timing.SAVE_PATIENCE_S`: a checkpoint must not fail because of that. Each rank may call
        it alone. Raises what a background thread met, AttemptSuperseded, ….
        """
        link = self.link
        if not isinstance(link.failure, RunFinished):
            # What a run that is over has recorded can still be saved.
            link.check()
        if self.opened is None:
            raise self._not_open()
        end_s = time.monotonic() + min(_timing.SAVE_PATIENCE_S, link.outage_timeout_s)
        if self._reporter is not None:
            self._reporter.flush(end_s - time.monotonic())
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
            )
            try:
                answer: pb.SaveStateResponse = link.until(
                    link.stub.SaveState,
                    request,
                    timeout_s=wait_s + _timing.ANSWER_S,
                    patience_s=left_s,
                    doing=f"saves the state at progress {progress}",
                )
            except (ServerUnavailable, LossesPending, ServerError) as error:
                if isinstance(error, LossesPending) and time.monotonic() < end_s:
                    link.pause(min(backoff.next_s(), end_s - time.monotonic()))
                    continue
                logger.warning(
                    "run %s: the state at progress %d was saved WITHOUT the server's part (%s). "
                    "Training resumes from it, but a server that has lost the run cannot be "
                    "restored from it",
                    link.run,
                    progress,
                    error,
                )
                return b""
            return answer.state

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
            if self._reporter is not None:
                self._reporter.flush(flush_s)
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
