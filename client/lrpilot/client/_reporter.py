"""Losses on their way to the server: queued by the training thread, delivered by another."""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from itertools import islice

from lrpilot.client import _timing
from lrpilot.client._call import Backoff, Link, Unanswered
from lrpilot.client._errors import (
    BacklogFull,
    BelowResumePoint,
    ClientFailed,
    LossConflict,
    LossUnreadable,
    LrpilotError,
    PilotClosed,
)
from lrpilot.client._loss import Number, PendingLoss, same_bits
from lrpilot.v1 import trainer_pb2 as pb

logger = logging.getLogger("lrpilot.client")


@dataclass(frozen=True)
class _Entry:
    """One report in the queue."""

    progress: int
    loss: Number | None
    weight: float
    moves_to: int
    repeats: bool = False
    """A loss was given for this progress before; it could not be compared yet."""


class Reporter:
    """The reports of one attempt, from the rank that was declared to report."""

    def __init__(
        self, link: Link, opened: pb.OpenAttemptResponse, *, rank: int, incarnation: str
    ) -> None:
        self._link = link
        self._attempt = opened.attempt
        self._begin = opened.begin
        self._rank = rank
        self._incarnation = incarnation
        self.until = opened.begin
        """Progress that this rank has said it moves to."""
        self._given: dict[int, Number] = {}
        """Losses given for each progress, the newest of them."""
        self._queue: deque[_Entry] = deque()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="lrpilot-report", daemon=True)
        link.undelivered = self.backlog
        self._thread.start()

    def backlog(self) -> int:
        """Return the number of reports that the server has not confirmed."""
        return len(self._queue)

    def report(self, progress: int, loss: Number | None, weight: float, moves_to: int) -> None:
        """Queue the loss at `progress` and the move to `moves_to`.

        A repeat with the same bits adds nothing. Raises BelowResumePoint, LossConflict,
        BacklogFull.
        """
        with self._changed:
            if progress < self._begin:
                raise BelowResumePoint(
                    f"the loss at progress {progress} lies below progress {self._begin}, where "
                    f"attempt {self._attempt.number} of run {self._link.run!r} opened",
                    facts={
                        "run": self._link.run,
                        "progress": progress,
                        "begin": self._begin,
                    },
                )
            if len(self._queue) >= _timing.MAX_BACKLOG:
                raise BacklogFull(
                    f"run {self._link.run!r}: {len(self._queue)} reports wait for the server at "
                    f"{self._link.address}; no more are kept in memory",
                    facts={"run": self._link.run, "undelivered": len(self._queue)},
                )
            if loss is not None:
                self._give(progress, loss, weight, moves_to)
            self._move(moves_to)
            self._changed.notify_all()

    def move_to(self, progress: int) -> None:
        """Say that this rank goes on at `progress`: what it passed without a loss has none."""
        with self._changed:
            self._move(progress)
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until every queued report is delivered; return False where that took too long."""
        if threading.current_thread() is self._thread:
            return not self._queue
        with self._changed:
            self._changed.wait_for(
                lambda: not self._queue or self._link.failure is not None, timeout_s
            )
            return not self._queue

    def close(self) -> None:
        """Let the background thread end; its call was ended with the link."""
        if threading.current_thread() is self._thread:
            return
        with self._changed:
            self._changed.notify_all()
        self._thread.join(_timing.JOIN_S)

    # On the training thread, inside the lock.

    def _give(self, progress: int, loss: Number, weight: float, moves_to: int) -> None:
        first = self._given.get(progress)
        if first is not None:
            if isinstance(first, PendingLoss) or isinstance(loss, PendingLoss):
                self._queue.append(_Entry(progress, loss, weight, progress + 1, repeats=True))
            else:
                self._compare(progress, first, loss)
            return
        # What was passed without a loss is final as absent.
        self._move(progress)
        self._given[progress] = loss
        if len(self._given) > 2 * _timing.KEPT_LOSSES:
            self._given = dict(islice(self._given.items(), _timing.KEPT_LOSSES, None))
        self._queue.append(_Entry(progress, loss, weight, moves_to))
        self.until = max(self.until, moves_to)

    def _move(self, to: int) -> None:
        if to > self.until:
            self._queue.append(_Entry(self.until, None, 1.0, to))
            self.until = to

    def _compare(self, progress: int, first: float, loss: float) -> None:
        if not same_bits(first, loss):
            raise LossConflict(
                f"progress {progress} of attempt {self._attempt.number} of run "
                f"{self._link.run!r} has loss {first!r} already; got {loss!r}",
                facts={
                    "run": self._link.run,
                    "progress": progress,
                    "recorded": repr(first),
                    "got": repr(loss),
                },
            )

    # On the background thread.

    def _run(self) -> None:
        try:
            while not self._link.closing.is_set():
                with self._changed:
                    self._changed.wait_for(lambda: self._queue or self._link.closing.is_set())
                    head = list(islice(self._queue, _timing.MAX_BATCH))
                if not head:
                    return
                taken, reports = self._batch(head)
                if reports:
                    self._deliver(reports)
                with self._changed:
                    for _ in range(taken):
                        self._queue.popleft()
                    self._changed.notify_all()
        except PilotClosed:
            return
        except LrpilotError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("run %s: reporting losses failed", self._link.run)
            self._fail(ClientFailed(f"reporting losses failed: {error!r}"))

    def _fail(self, error: LrpilotError) -> None:
        self._link.fail(error)
        with self._changed:
            self._changed.notify_all()

    def _batch(self, head: list[_Entry]) -> tuple[int, list[pb.LossReport]]:
        """Return how many entries to take from the queue, and the reports they make."""
        reports: list[pb.LossReport] = []
        taken = 0
        reached = self._begin
        for entry in head:
            pending = isinstance(entry.loss, PendingLoss)
            if reports and isinstance(entry.loss, PendingLoss) and not entry.loss.ready():
                # What is known goes out now; this thread waits for the device afterwards.
                break
            if reports and entry.progress < reached:
                # A report out of order: the contract wants each batch in order.
                break
            loss = self._read(entry)
            taken += 1
            if entry.repeats:
                first = self._given.get(entry.progress)
                if isinstance(first, float) and loss is not None:
                    self._compare(entry.progress, first, loss)
                continue
            if pending and loss is not None:
                self._now_known(entry.progress, loss)
            report = pb.LossReport(
                progress=entry.progress, weight=entry.weight, moves_to=entry.moves_to
            )
            if loss is not None:
                report.loss = loss
            reports.append(report)
            reached = max(reached, entry.moves_to)
        return taken, reports

    def _now_known(self, progress: int, loss: float) -> None:
        with self._changed:
            # The training thread may have forgotten it meanwhile.
            if progress in self._given:
                self._given[progress] = loss

    def _read(self, entry: _Entry) -> float | None:
        if not isinstance(entry.loss, PendingLoss):
            return entry.loss
        try:
            return entry.loss.read()
        except Exception as error:
            raise LossUnreadable(
                f"run {self._link.run!r}: the loss at progress {entry.progress} could not be "
                f"read from its device: {error}",
                facts={"run": self._link.run, "progress": entry.progress},
            ) from error

    def _deliver(self, reports: list[pb.LossReport]) -> None:
        link = self._link
        request = pb.ReportLossesRequest(
            run=link.run,
            attempt=self._attempt,
            rank=self._rank,
            incarnation=self._incarnation,
            reports=reports,
        )
        backoff = Backoff()
        start_s = said_s = time.monotonic()
        while True:
            try:
                answer = link.once(link.stub.ReportLosses, request, _timing.CALL_S)
                break
            except Unanswered as lost:
                now_s = time.monotonic()
                if now_s >= said_s + (
                    _timing.BLOCKED_WAIT_S if said_s == start_s else _timing.REPORT_NOTICE_S
                ):
                    said_s = now_s
                    logger.warning(
                        "run %s: %d reports wait in memory, since %s has not taken any for "
                        "%.0f s (%s); they are repeated until it does",
                        link.run,
                        self.backlog(),
                        link.address,
                        now_s - start_s,
                        lost,
                    )
                link.pause(backoff.next_s())
        if said_s != start_s:
            logger.info("run %s: %s takes reports again", link.run, link.address)
        link.heard(answer.frontier, answer.horizon)
        late = [
            report.progress
            for report, outcome in zip(reports, answer.outcomes, strict=False)
            if outcome == pb.REPORT_OUTCOME_LATE
        ]
        if late:
            logger.warning(
                "run %s: %d losses came after their step was final without one (progress %d to "
                "%d): recorded, and seen by no policy",
                link.run,
                len(late),
                late[0],
                late[-1],
            )
