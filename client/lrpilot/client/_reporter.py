"""Losses on their way to the server: queued by the training thread, delivered by another."""

import logging
import threading
import time
from collections import deque
from itertools import islice
from typing import NamedTuple

from lrpilot.client import _timing
from lrpilot.client._call import Backoff, Link, Unanswered
from lrpilot.client._device import POLL_S, PendingLoss
from lrpilot.client._errors import (
    BacklogFull,
    BelowResumePoint,
    LossConflict,
    LossUnreadable,
    invalid_argument,
)
from lrpilot.client._loss import Number, same_bits
from lrpilot.client._metrics import MAX_VALIDATION_LOSSES, Metrics, norm
from lrpilot.v1 import trainer_pb2 as pb

logger = logging.getLogger("lrpilot.client")


NOTHING = Metrics()


class _Entry(NamedTuple):
    """One report in the queue."""

    progress: int
    metrics: Metrics
    moves_to: int
    tries: int = 0
    """Skipped updates at this progress before this one."""
    skipped: bool = False
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
        self._skips = (opened.begin, 0)
        """A progress, and how many updates were skipped there."""
        self._validation: dict[str, Number] = {}
        """Validation losses that ride in the next report of a completed step."""
        self._queue: deque[_Entry] = deque()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="lrpilot-report", daemon=True)
        link.undelivered = self.backlog
        self._thread.start()

    def backlog(self) -> int:
        """Return the number of reports that the server has not confirmed."""
        return len(self._queue)

    def report(self, progress: int, metrics: Metrics, moves_to: int) -> None:
        """Queue what is known of the step at `progress`, and the move to `moves_to`.

        A repeat with the same bits adds nothing; what else comes for a progress that was passed
        is a late loss. Raises BelowResumePoint, LossConflict, BacklogFull.
        """
        with self._changed:
            self._check(progress)
            loss = metrics.loss
            first = None if loss is None else self._given.get(progress)
            if loss is not None and first is not None:
                self._repeat(progress, first, loss)
            else:
                self._validation.update(metrics.validation)
                if progress >= self.until:
                    self._pass(progress, metrics, moves_to)
                elif loss is not None:
                    bare = metrics._replace(validation={})
                    self._queue.append(_Entry(progress, bare, moves_to))
                if loss is not None:
                    self._given[progress] = loss
                    if len(self._given) > 2 * _timing.KEPT_LOSSES:
                        kept = islice(self._given.items(), _timing.KEPT_LOSSES, None)
                        self._given = dict(kept)
            self._move(moves_to)
            self._changed.notify_all()

    def skip(self, progress: int, metrics: Metrics, tries: int | None) -> None:
        """Queue an update at `progress` that the optimizer refused: it comes once more.

        `tries` is how many the caller had refused there before; None: each call is another one.
        Raises BelowResumePoint, BacklogFull, InvalidArgument.
        """
        with self._changed:
            self._check(progress)
            count = self._tries(progress)
            is_known = progress < self.until or (tries is not None and tries < count)
            if is_known and tries is not None:
                # Another scheduler of this rank has spoken of it.
                return
            if is_known:
                raise invalid_argument(
                    "n", progress, f"with skipped=True a progress not passed yet, {self.until} on"
                )
            self._move(progress)
            self._validation.update(metrics.validation)
            refused = metrics._replace(validation={})
            self._queue.append(_Entry(progress, refused, progress, tries=count, skipped=True))
            self._skips = (progress, count + 1)
            self._changed.notify_all()

    def report_validation(self, name: str, loss: Number) -> None:
        """Keep a validation loss for the next report of a completed step."""
        with self._changed:
            self._validation[name] = loss

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
        if self._validation:
            logger.warning(
                "run %s: no report came after the validation losses %s; they were not sent",
                self._link.run,
                sorted(self._validation),
            )
        with self._changed:
            self._changed.notify_all()
        self._thread.join(_timing.JOIN_S)

    # On the training thread, inside the lock.

    def _check(self, progress: int) -> None:
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

    def _repeat(self, progress: int, first: Number, loss: Number) -> None:
        if isinstance(first, PendingLoss) or isinstance(loss, PendingLoss):
            self._queue.append(_Entry(progress, Metrics(loss), progress + 1, repeats=True))
        else:
            self._compare(progress, first, loss)

    def _pass(self, progress: int, metrics: Metrics, moves_to: int) -> None:
        # What was passed without a loss is final as absent.
        self._move(progress)
        known = metrics
        if self._validation:
            names = list(self._validation)[:MAX_VALIDATION_LOSSES]
            riding = {name: self._validation.pop(name) for name in names}
            known = metrics._replace(validation=riding)
        if known.is_empty:
            # Steps without a report go out together.
            return
        self._queue.append(_Entry(progress, known, moves_to, tries=self._tries(progress)))
        self.until = moves_to

    def _tries(self, progress: int) -> int:
        at, count = self._skips
        return count if at == progress else 0

    def _move(self, to: int) -> None:
        if to > self.until:
            self._queue.append(_Entry(self.until, NOTHING, to, tries=self._tries(self.until)))
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
        with self._link.guard("reporting losses"):
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
        # Whoever flushes need not wait for what nobody delivers any more.
        with self._changed:
            self._changed.notify_all()

    def _batch(self, head: list[_Entry]) -> tuple[int, list[pb.LossReport]]:
        """Return how many entries to take from the queue, and the reports they make."""
        reports: list[pb.LossReport] = []
        taken = size = 0
        reached = self._begin
        for entry in head:
            if reports and not self._has_arrived(entry):
                # What is known goes out now; this thread waits for the device afterwards.
                break
            if reports and entry.progress < reached:
                # A report out of order: the contract wants each batch in order.
                break
            report = self._report(entry)
            size += report.ByteSize()
            if reports and size > _timing.BATCH_BYTES:
                break
            taken += 1
            if entry.repeats:
                first = self._given.get(entry.progress)
                if isinstance(first, float):
                    self._compare(entry.progress, first, report.loss)
                continue
            if isinstance(entry.metrics.loss, PendingLoss) and not entry.skipped:
                self._now_known(entry.progress, report.loss)
            reports.append(report)
            reached = max(reached, entry.moves_to)
        return taken, reports

    def _report(self, entry: _Entry) -> pb.LossReport:
        known = entry.metrics
        report = pb.LossReport(
            progress=entry.progress,
            weight=known.weight,
            moves_to=entry.moves_to,
            skipped=entry.skipped,
            batch=known.batch,
        )
        setattr(report, "try", entry.tries)  # A word of Python.
        if known.loss is not None:
            report.loss = self._read(entry.progress, "loss", known.loss)
        if known.gradient_norm is not None:
            report.gradient_norm = self._read(entry.progress, "norm", known.gradient_norm)
            norm(report.gradient_norm)
        for name, loss in known.validation.items():
            report.validation_losses[name] = self._read(entry.progress, f"loss {name!r}", loss)
        return report

    def _now_known(self, progress: int, loss: float) -> None:
        with self._changed:
            # The training thread may have forgotten it meanwhile.
            if progress in self._given:
                self._given[progress] = loss

    def _read(self, progress: int, what: str, number: Number) -> float:
        while (found := self._look(progress, what, number)) is None:
            # Not for ever: a device that has failed never brings it.
            if self._link.closing.wait(POLL_S):
                raise self._link.closed()
        return found

    def _has_arrived(self, entry: _Entry) -> bool:
        return all(
            self._look(entry.progress, what, number) is not None
            for what, number in entry.metrics.named()
        )

    def _look(self, progress: int, what: str, number: Number) -> float | None:
        if not isinstance(number, PendingLoss):
            return number
        try:
            return number.look()
        except Exception as error:
            raise LossUnreadable(
                f"run {self._link.run!r}: the {what} at progress {progress} could not be "
                f"read from its device: {error}",
                facts={"run": self._link.run, "progress": progress},
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
            request.held.CopyFrom(link.held())
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
        link.got.reported = max(link.got.reported, *(report.moves_to for report in reports))
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
