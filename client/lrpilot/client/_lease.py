"""Values held in memory, found by progress and renewed ahead by a background thread.

The training thread looks values up; only where one is missing does it ask the server itself.
"""

import logging
import math
import random
import threading
import time
from collections.abc import Collection

from lrpilot.client import _timing
from lrpilot.client._call import Backoff, Link, Unanswered
from lrpilot.client._changes import read_change
from lrpilot.client._directives import read_directive
from lrpilot.client._due import WithValues
from lrpilot.client._errors import (
    AttemptSuperseded,
    BeforeAttempt,
    BeyondHorizon,
    LogForgotten,
    RunFinished,
    RunNotFound,
    ServerError,
    ValuesDiffer,
    ValuesPending,
)
from lrpilot.client._node import Node
from lrpilot.client._reporter import Reporter
from lrpilot.client._values import Values, forget_passed, hold, read_block, steps_ahead
from lrpilot.v1 import trainer_pb2 as pb

logger = logging.getLogger("lrpilot.client")

_REMEDY = (
    "Start the server again, and this job from its last checkpoint: what was acknowledged is not "
    "lost. connect(outage_timeout_s=…) waits longer; connect(mode='leader') goes on without the "
    "server"
)

# A source of its own: renewals must neither read nor disturb the seeds of the training.
_random = random.SystemRandom()


def renewal_point(window: int, drawn: float) -> tuple[int, float]:
    """Return how many steps ahead may be left when values are asked for again, and a pause.

    `window` is how many steps ahead of the one in use can be fixed, `drawn` lies in [0, 1). The
    pause is a share of a step, to be waited for once that few are left. Thousands of ranks, which
    step together, so ask at moments that are spread evenly: over what makes the first quarter of
    the delay, save the first step of it, in which nothing new can be fixed. With a delay of less
    than five steps it is a quarter of a step.
    """
    spread = max((window + 1) / _timing.RENEW_SHARE - 1.0, 1.0 / _timing.RENEW_SHARE)
    whole, pause = divmod(drawn * spread, 1.0)
    return window - 1 - int(whole), pause


class Lease(WithValues):
    """The values of one attempt."""

    def __init__(
        self,
        link: Link,
        opened: pb.OpenAttemptResponse,
        reporters: tuple[int, ...],
        reporter: Reporter | None,
        carried_out: Collection[str] = (),
        *,
        explain: bool = False,
        node: Node | None = None,
    ) -> None:
        """Begin to renew values; the directives named by `carried_out` are met no more.

        With `explain` the changes that the values follow are fetched with them; with `node` the
        ranks of a node share what they fetch.
        """
        self._link = link
        self._attempt = opened.attempt
        self._delay = opened.delay
        self._reporters = reporters
        self._reporter = reporter
        self._opened = opened
        self.explain = explain
        self._node = node
        self._known: dict[int, Values] = {}
        super().__init__(carried_out)
        self._lock = threading.Lock()
        self._in_use = opened.begin
        # The increment is known once a second value was asked for; that of iterations at once.
        self._stride = 1 if opened.unit == "iterations" else 0
        self._is_short = False
        """Whether the delay turned out to be less than a step; said once."""
        self._waiting = False
        self._renew_at = -1.0
        """Progress from which on the background thread has something to do."""
        self._drawn = (-1, 0.0)
        """The last progress known, and the number drawn for the renewal after it."""
        self._pace = (opened.begin, time.monotonic())
        """A progress in use, and when the background thread saw it."""
        self._step_s = _timing.UNKNOWN_STEP_S
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lrpilot-lease", daemon=True)
        self._thread.start()

    def values(self, progress: int, stride: int = 0) -> Values:
        """Return the values at `progress`, which becomes the one in use. Call from one thread.

        `stride` is the increment by which the caller goes on; 0: it is told from the steps, save
        that a step of more than a block is taken for a slip. Raises BeforeAttempt,
        BeyondHorizon, ServerUnavailable, AttemptSuperseded, ….
        """
        before, step = self._in_use, progress - self._in_use
        if step > 0:
            if not stride and (not self._stride or step <= _timing.MAX_STEPS * self._stride):
                stride = step
            if stride and stride != self._stride:
                self._take_stride(stride)
        self._in_use = progress
        found = self._known.get(progress)
        if found is None:
            try:
                found = self._fetch(progress)
            except BeyondHorizon:
                self._in_use = before
                raise
        if progress >= self._renew_at:
            self._renew_at = math.inf
            self._wake.set()
        return found

    def close(self) -> None:
        """Let the background thread end; its call was ended with the link."""
        self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join(_timing.JOIN_S)
        if self._node is not None and not self._thread.is_alive():
            self._node.close()

    def check(self) -> None:
        """Raise what a background thread met, or PilotClosed."""
        self._link.check()

    def settle(self, timeout_s: float) -> bool:
        """Return whether the server knows all values that were used: always."""
        del timeout_s
        return True

    # On the training thread.

    def _take_stride(self, step: int) -> None:
        if step > self._delay and not self._is_short:
            # Easily missed where progress counts samples or tokens: D counts in them too.
            self._is_short = True
            warn_of_short(self._link, self._delay, step)
        self._stride = step
        self._renew_at = -1.0

    def _fetch(self, progress: int) -> Values:
        refuse_before(self._link, self._opened, progress)
        self._waiting = True
        try:
            return self._wait(progress)
        except (AttemptSuperseded, LogForgotten, RunFinished, RunNotFound) as error:
            # Final: values that an answer under way still brings must not be used any more.
            self._link.fail(error)
            self._link.failure_raised = True
            raise
        finally:
            self._waiting = False
            self._renew_at = -1.0
            if self._node is not None:
                self._node.let_go(blocked=True)

    def _wait(self, progress: int) -> Values:
        link = self._link
        request = pb.GetValuesRequest(
            run=link.run,
            attempt=self._attempt,
            begin=progress,
            stride=self._stride or 1,
            count=_timing.MAX_STEPS if self._stride else 1,
            in_use=progress,
            blocked=True,
            explain=self.explain,
        )
        reporter = self._reporter
        is_behind = reporter is not None and reporter.until < progress
        if not is_behind:
            request.wait_ms = int(_timing.BLOCKED_WAIT_S * 1000)
        start_s = said_s = time.monotonic()
        backoff = Backoff()
        while True:
            link.check()
            asked_s = time.monotonic()
            reason = ""
            try:
                answer = self._ask(request, _timing.BLOCKED_WAIT_S + _timing.ANSWER_S)
            except Unanswered as lost:
                reason = str(lost)
            else:
                if answer.HasField("block"):
                    self._add(answer)
                else:
                    link.heard(answer.frontier, answer.horizon)
            # The background thread may have brought it meanwhile.
            found = self._known.get(progress)
            if found is not None:
                return found
            if is_behind and reporter is not None and not reason:
                # Blocked on losses that are its own to report, it has none: it moves on.
                is_behind = False
                reporter.move_to(progress)
                request.wait_ms = int(_timing.BLOCKED_WAIT_S * 1000)
                continue
            now_s = time.monotonic()
            if reason:
                # Time in which the server answered "not yet" is no outage.
                away_s = now_s - max(start_s, link.contact_s or start_s)
                if away_s >= link.outage_timeout_s:
                    raise link.unavailable(
                        f"waits for the values at progress {progress} (frontier {link.frontier}, "
                        f"horizon {link.horizon})",
                        away_s,
                        reason,
                        _REMEDY,
                        progress=progress,
                        frontier=link.frontier,
                        horizon=link.horizon,
                    )
            elif now_s - start_s >= _timing.LONGEST_WAIT_S:
                raise ValuesPending(
                    f"{self._waits(progress, now_s - start_s)}: not fixed yet",
                    facts={"run": link.run, "progress": progress, "horizon": link.horizon},
                )
            if now_s >= said_s + _timing.BLOCKED_WAIT_S * 0.9:
                said_s = now_s
                self._say(progress, now_s - start_s, reason)
            if reason:
                link.pause(backoff.next_s())
            else:
                # A server that drains answers at once; it is about to be replaced.
                backoff_s = backoff.next_s() if now_s - asked_s < _timing.BLOCKED_WAIT_S / 2 else 0
                link.pause(backoff_s)

    def _waits(self, progress: int, seconds: float) -> str:
        link = self._link
        return (
            f"run {link.run}: rank {link.rank} has waited {seconds:.0f} s for the values at "
            f"progress {progress} (frontier {link.frontier}, horizon {link.horizon}, server "
            f"{link.address})"
        )

    def _say(self, progress: int, seconds: float, reason: str) -> None:
        link = self._link
        if reason:
            since = "has not answered yet"
            if link.contact_s is not None:
                away_s = time.monotonic() - link.contact_s
                since = f"has not answered for {away_s:.0f} s"
            logger.warning(
                "%s: the server %s (%s); gives up after %.0f s without contact",
                self._waits(progress, seconds),
                since,
                reason,
                link.outage_timeout_s,
            )
        else:
            logger.warning(
                "%s: no loss is final from progress %d on, and rank %s is the one to report",
                self._waits(progress, seconds),
                link.frontier,
                " or ".join(map(str, self._reporters)),
            )

    # On the background thread.

    def _run(self) -> None:
        with self._link.guard("renewing values"):
            while not self._link.closing.is_set():
                self._wake.wait()
                self._wake.clear()
                self._renew()

    def _renew(self) -> None:
        """Ask ahead until enough is held, then say from which progress on to be woken."""
        try:
            self._renew_ahead()
        finally:
            if self._node is not None:
                self._node.let_go(blocked=False)

    def _renew_ahead(self) -> None:
        link = self._link
        backoff = Backoff()
        more = False
        rested = -1
        """The last progress known when this thread paused as drawn."""
        while not link.closing.is_set():
            stride, in_use = self._stride, self._in_use
            # What can be fixed beyond the step in use.
            window = min((self._delay - 1) // stride, _timing.MAX_AHEAD) if stride else 0
            if not stride or self._delay <= stride or self._waiting:
                # With a delay of one step nothing is fixed ahead; a training thread that waits
                # asks for itself and wakes this one afterwards.
                return
            self._see_pace(in_use, stride)
            ahead = steps_ahead(self._known, in_use, stride)
            known = in_use + ahead * stride
            left, pause = renewal_point(window, self._draw(known))
            if ahead > left and not (more and ahead < _timing.MAX_AHEAD):
                self._renew_at = in_use + (ahead - left) * stride
                if self._in_use < self._renew_at and self._stride == stride:
                    return
                continue
            if rested != known and (ahead == left or ahead > 1):
                # The next step ends the pause; the last values held leave no time for one.
                rested = known
                self._renew_at = in_use + stride
                if self._in_use < self._renew_at:
                    self._wake.wait(pause * self._step_s)
                    self._wake.clear()
                continue
            if known + stride > _timing.MAX_PROGRESS:
                return
            asked_s = time.monotonic()
            try:
                answer = self._ask(
                    pb.GetValuesRequest(
                        run=link.run,
                        attempt=self._attempt,
                        begin=known + stride,
                        stride=stride,
                        count=_timing.MAX_STEPS,
                        in_use=in_use,
                        wait_ms=int(_timing.RENEW_WAIT_S * 1000),
                        explain=self.explain,
                    ),
                    _timing.RENEW_WAIT_S + _timing.ANSWER_S,
                )
            except (Unanswered, BeyondHorizon):
                # The training thread says what it waits for, should it come to that.
                link.pause(backoff.next_s())
                continue
            if answer.HasField("block"):
                backoff.reset()
                steps = self._add(answer)
                # A large delay holds several blocks ahead, to outlast a longer outage.
                more = steps == _timing.MAX_STEPS
            else:
                link.heard(answer.frontier, answer.horizon)
                more = False
                if time.monotonic() - asked_s < _timing.RENEW_WAIT_S / 2:
                    link.pause(backoff.next_s())

    def _draw(self, known: int) -> float:
        """Return a number from [0, 1) that stays until more is known.

        The ranks of a node draw the same one: whoever comes first asks for all of them, and the
        first of many random points would always be an early one.
        """
        if self._drawn[0] != known:
            drawn = _random.random() if self._node is None else self._node.draw(known)
            self._drawn = (known, drawn)
        return self._drawn[1]

    def _see_pace(self, in_use: int, stride: int) -> None:
        """Measure how long a step takes, since this was called at another one."""
        before, seen_s = self._pace
        if in_use > before:
            now_s = time.monotonic()
            self._step_s = (now_s - seen_s) * stride / (in_use - before)
            self._pace = (in_use, now_s)

    # On both.

    def _ask(self, request: pb.GetValuesRequest, timeout_s: float) -> pb.GetValuesResponse:
        if self._node is not None:
            return self._node.get_values(request, timeout_s)
        link = self._link
        request.held.CopyFrom(link.held())
        answer: pb.GetValuesResponse = link.once(link.stub.GetValues, request, timeout_s)
        return answer

    def _add(self, answer: pb.GetValuesResponse) -> int:
        """Keep the values of an answer and return the number of steps."""
        self._link.heard(answer.frontier, answer.horizon)
        try:
            got = read_block(self._link, self._opened, answer.block)
            with self._lock:
                # Before the values: whoever sees those must find the directives that they reach.
                self._directives.add(map(read_directive, answer.directives))
                self._changes.add(map(read_change, answer.changes))
                hold(self._link, self._attempt, self._known, got)
                self._link.got.add(answer.block, len(self._opened.groups))
                forget_passed(self._known, self._in_use)
        except (ServerError, ValuesDiffer) as error:
            self._link.fail(error)
            raise
        return len(got)


def warn_of_short(link: Link, delay: int, step: int) -> None:
    """Say that a delay is less than a step."""
    logger.warning(
        "run %s: feedback.delay is %d, less than a step of %d: nothing is fixed ahead, so "
        "that each step waits for the server; 32 steps would be %d",
        link.run,
        delay,
        step,
        32 * step,
    )


def refuse_before(link: Link, opened: pb.OpenAttemptResponse, progress: int) -> None:
    """Raise BeforeAttempt where a progress lies below the one at which the attempt opened."""
    if progress < opened.begin:
        raise BeforeAttempt(
            f"attempt {opened.attempt.number} of run {link.run!r} opened at progress "
            f"{opened.begin}; values at {progress} belong to an attempt before it",
            facts={"run": link.run, "progress": progress, "begin": opened.begin},
        )
