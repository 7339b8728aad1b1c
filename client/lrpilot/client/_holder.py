"""Rank 0's part of leader mode: it gets the values, goes on alone with those that it was offered
while the server is away, and declares afterwards what was used.

What the training thread and the background thread share lies under one lock. A call for values
belongs to a generation: going on alone begins the next one, so that an answer that comes too late
is not looked at, and no step has two values.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from lrpilot.client import _timing
from lrpilot.client._call import Backoff, Link, Unanswered
from lrpilot.client._changes import Change, read_change
from lrpilot.client._directives import Directive, read_directive
from lrpilot.client._errors import (
    BeyondHorizon,
    LrpilotError,
    ValuesPending,
)
from lrpilot.client._lease import warn_of_short
from lrpilot.client._offers import Offered, Offers
from lrpilot.client._reporter import Reporter
from lrpilot.client._used import Used, blocks
from lrpilot.client._values import Values, forget_passed, hold, read_block, steps_ahead
from lrpilot.v1 import trainer_pb2 as pb

logger = logging.getLogger("lrpilot.client")

Held = TypeVar("Held")


@dataclass(frozen=True)
class Passed:
    """What rank 0 passes on to every rank."""

    asked: int
    """Progress at which it was asked for."""
    values: Mapping[int, Values]
    """The values there and at the steps after it, by progress."""
    directives: tuple[Directive, ...]
    """Those that came since the last time."""
    changes: tuple[Change, ...]
    """Likewise."""
    is_alone: bool
    """Whether the server is away, and something that is in use was not declared yet."""


@dataclass
class _Wait:
    """What the training thread waits for, and since when."""

    progress: int
    start_s: float = field(default_factory=time.monotonic)
    heard_s: float = field(default_factory=time.monotonic)
    """When the server last answered."""
    said_s: float = field(default_factory=time.monotonic)
    reason: str = ""
    """Why the last call found no answer; empty: it was answered."""


class Holder:
    """The values of one attempt in leader mode, on the rank that alone asks for them."""

    def __init__(
        self, link: Link, opened: pb.OpenAttemptResponse, token: bytes, reporter: Reporter | None
    ) -> None:
        """Begin to renew values; `token` is what the server returned as `holder`."""
        self.explain = False
        """Whether to fetch with the values why they change."""
        self._link = link
        self._opened = opened
        self._token = token
        self._reporter = reporter
        self._lock = threading.Lock()
        self._known: dict[int, Values] = {}
        """Values that are fixed: brought by GetValues, or declared."""
        self._directives: list[Directive] = []
        self._changes: list[Change] = []
        self._offers = Offers()
        self._used = Used(link, opened, token)
        self._granted: dict[int, Offered] = {}
        """What was offered of the values passed on last."""
        self._generation = 0
        self._is_alone = False
        self._is_back = False
        """Whether the server has taken a declaration since the last attempt to come back."""
        self._ask_again_s = self._pause_s = 0.0
        """When to attempt it next, and the pause before that: losses were missing at the last."""
        self._alone_s = self._said_s = 0.0
        self._in_use = opened.begin
        self._greatest = opened.begin - 1
        """Greatest progress that was in use."""
        # The increment is known once a second value was asked for; that of iterations at once.
        self._stride = 1 if opened.unit == "iterations" else 0
        self._is_short = False
        self._is_waiting = False
        self._work_at = -math.inf
        """Progress from which on the background thread has something to do."""
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lrpilot-holder", daemon=True)
        self._thread.start()

    # On the training thread.

    def pace(self, progress: int, stride: int) -> None:
        """Take note of the increment: `stride`, or 0 to tell it from the step to `progress`."""
        step = progress - self._in_use
        if step <= 0:
            return
        if not stride and (not self._stride or step <= _timing.MAX_STEPS * self._stride):
            # A step of more than a block is taken for a slip.
            stride = step
        if not stride or stride == self._stride:
            return
        if stride > self._opened.delay and not self._is_short:
            self._is_short = True
            warn_of_short(self._link, self._opened.delay, stride)
        self._stride = stride
        self._work_at = -math.inf

    def use(self, progress: int) -> None:
        """Take note that the values passed on for a progress are in use."""
        self._in_use = progress
        if progress > self._greatest and progress in self._granted:
            self._used.add(progress, self._granted[progress])
        self._greatest = max(self._greatest, progress)
        if progress >= self._work_at or (self._is_alone and not self._is_back):
            self._work_at = math.inf
            self._wake.set()

    def get(self, progress: int, beat: Callable[[], None]) -> Passed:
        """Return the values at `progress`, and at as many steps after it as are known.

        Where the server has them not, it waits, for the patience of leader mode: then it goes on
        alone. `beat` is called after each call in vain. Raises what the background thread met,
        BeyondHorizon, AttemptSuperseded, ServerUnavailable (nothing is offered either), ….
        """
        self._link.check()
        with self._lock:
            is_held = progress in self._known or self._used.get(progress) is not None
            goes_on = self._is_alone and not self._may_come_back() and self._may_use(progress)
        if not is_held and not goes_on:
            self._is_waiting = True
            try:
                self._fetch(progress, beat)
            finally:
                self._is_waiting = False
                self._work_at = -math.inf
        if self._is_alone:
            self._say_alone()
        return self._pass(progress)

    def _pass(self, progress: int) -> Passed:
        delay, stride = self._opened.delay, self._stride
        with self._lock:
            self._granted = {}
            find = self._known.get if progress in self._known else self._used.get
            values = dict(_steps(find, progress, stride, _timing.MAX_STEPS))
            if not values:
                limit = min(-(-delay // stride) if stride else 1, _timing.ALONE_STEPS)
                self._granted = dict(_steps(self._offers.get, progress, stride, limit))
                values = {at: offered.values for at, offered in self._granted.items()}
            directives, changes = tuple(self._directives), tuple(self._changes)
            self._directives.clear()
            self._changes.clear()
            return Passed(progress, values, directives, changes, self._is_alone)

    def _may_come_back(self) -> bool:
        return self._is_back and time.monotonic() >= self._ask_again_s

    def _may_use(self, progress: int) -> bool:
        """Return whether a progress was offered; what is used alone is declared in order."""
        return progress > self._greatest and self._offers.get(progress) is not None

    def _fetch(self, progress: int, beat: Callable[[], None]) -> None:
        """Wait until the values at a progress are known, or the job goes on alone."""
        link, reporter = self._link, self._reporter
        wait = _Wait(progress)
        backoff = Backoff()
        while True:
            link.check()
            is_behind = reporter is not None and reporter.until < progress
            wait.reason = ""
            try:
                if self._is_alone:
                    # What was used comes first: what the server fixes now lies beyond it.
                    self._declare()
                self._ask(progress, 0.0 if is_behind else _timing.HOLDER_WAIT_S)
            except Unanswered as lost:
                wait.reason = str(lost)
            else:
                wait.heard_s = time.monotonic()
            with self._lock:
                if progress in self._known:
                    self._come_back()
                    return
                if self._is_overdue(wait) and self._may_use(progress):
                    self._go_on_alone(wait)
                    return
            beat()
            if is_behind and reporter is not None and not wait.reason:
                # Blocked on losses that are its own to report, it has none: it moves on.
                reporter.move_to(progress)
                continue
            self._give_up(wait)
            link.pause(backoff.next_s())

    def _ask(self, progress: int, wait_s: float) -> None:
        answer = self._values(progress, wait_s, in_use=progress, blocked=True)
        self._add(answer, self._generation)

    def _is_overdue(self, wait: _Wait) -> bool:
        now_s = time.monotonic()
        if wait.reason:
            # Once alone, the first call in vain is enough.
            return self._is_alone or now_s - wait.heard_s >= _timing.LEADER_PATIENCE_S
        patience_s = _timing.HOLDER_WAIT_S if self._is_alone else _timing.FEEDBACK_PATIENCE_S
        return now_s - wait.start_s >= patience_s

    def _go_on_alone(self, wait: _Wait) -> None:
        """Use what was offered from a progress on. Inside the lock."""
        self._generation += 1
        self._known = {at: values for at, values in self._known.items() if at < wait.progress}
        self._link.got.drop(wait.progress)
        self._changes.clear()
        self._is_back = False
        # The server that misses losses takes declarations all along: without a pause each block
        # would wait. It grows, since a reporter may find a server that is back later than rank 0.
        longer_s = max(2.0 * self._pause_s, _timing.LEADER_PATIENCE_S)
        self._pause_s = 0.0 if wait.reason else min(longer_s, _timing.FEEDBACK_PATIENCE_S)
        self._ask_again_s = time.monotonic() + self._pause_s
        if self._is_alone:
            return
        self._is_alone = True
        self._alone_s = self._said_s = time.monotonic()
        logger.warning(
            "run %s: rank 0 goes on ALONE from progress %d on: %s (%s). It uses the values that it "
            "was offered, up to progress %d, and declares them when the server is back",
            self._link.run,
            wait.progress,
            "the server at " + self._link.address + " does not answer"
            if wait.reason
            else "losses are missing",
            wait.reason or f"frontier {self._link.frontier}, horizon {self._link.horizon}",
            self._offers.reach,
        )

    def _say_alone(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._said_s + _timing.ALONE_NOTICE_S:
            self._said_s = now_s
            logger.warning(
                "run %s: rank 0 has gone on alone for %.0f s; %s wait to be declared to %s, and "
                "what it was offered reaches to progress %d",
                self._link.run,
                now_s - self._alone_s,
                self._used,
                self._link.address,
                self._offers.reach,
            )

    def _come_back(self) -> None:
        """Use what the server fixes again. Inside the lock."""
        if self._is_alone:
            self._generation += 1
            self._is_alone = self._is_back = False
            self._pause_s = 0.0
            logger.warning(
                "run %s: the server at %s is back after %.0f s: it has recorded what was used "
                "without it",
                self._link.run,
                self._link.address,
                time.monotonic() - self._alone_s,
            )

    def _give_up(self, wait: _Wait) -> None:
        """Say what is waited for, or raise; nothing is offered that the job could go on with."""
        link, now_s = self._link, time.monotonic()
        what = (
            f"waits for the values at progress {wait.progress} (frontier {link.frontier}, horizon "
            f"{link.horizon}), and none are offered"
        )
        if wait.reason and now_s - wait.heard_s >= link.outage_timeout_s:
            raise link.unavailable(
                what,
                now_s - wait.heard_s,
                wait.reason,
                progress=wait.progress,
                frontier=link.frontier,
                horizon=link.horizon,
            )
        if now_s - wait.start_s >= _timing.LONGEST_WAIT_S:
            raise ValuesPending(
                f"run {link.run}: rank {link.rank} {what}: not fixed yet",
                facts={"run": link.run, "progress": wait.progress, "horizon": link.horizon},
            )
        if now_s >= wait.said_s + _timing.BLOCKED_WAIT_S:
            wait.said_s = now_s
            logger.warning(
                "run %s: rank %d %s, server %s: %s",
                link.run,
                link.rank,
                what,
                link.address,
                wait.reason or "losses are missing",
            )

    # On the background thread.

    def _run(self) -> None:
        with self._link.guard("holding the values"):
            while not self._link.closing.is_set():
                self._wake.wait()
                self._wake.clear()
                self._work()

    def _work(self) -> None:
        """Declare, or renew what is fixed, and renew what is offered, until there is enough."""
        link, backoff = self._link, Backoff()
        while not link.closing.is_set():
            try:
                is_busy = self._report_back() if self._is_alone else self._renew()
                is_busy = self._offer() or is_busy
            except (Unanswered, BeyondHorizon):
                # The training thread says what it waits for, should it come to that.
                link.pause(backoff.next_s())
                continue
            backoff.reset()
            if not is_busy:
                stride, in_use = self._stride, self._in_use
                steps = max(self._enough_for(in_use, stride), 1)
                self._work_at = in_use + steps * stride if stride else math.inf
                if self._in_use < self._work_at and self._stride == stride:
                    return

    def _report_back(self) -> bool:
        """Declare what was used alone, once; the training thread declares the rest."""
        if self._is_back or not self._used:
            return False
        self._used.declare(self._record)
        return True

    def _renew(self) -> bool:
        """Ask once for values beyond those known; return whether more are wanted."""
        stride, in_use = self._stride, self._in_use
        if self._is_waiting or self._enough_for(in_use, stride) > 0:
            return False
        wanted = in_use + (steps_ahead(self._known, in_use, stride) + 1) * stride
        if wanted > _timing.MAX_PROGRESS:
            return False
        generation, asked_s = self._generation, time.monotonic()
        answer = self._values(wanted, _timing.HOLDER_WAIT_S, in_use=in_use, blocked=False)
        if not self._add(answer, generation):
            # A server that drains answers at once; it is about to be replaced.
            spent_s = time.monotonic() - asked_s
            self._link.pause(_timing.BACKOFF_FIRST_S if spent_s < _timing.HOLDER_WAIT_S / 2 else 0)
        return True

    def _enough_for(self, in_use: int, stride: int) -> int:
        """Return for how many more steps nothing needs to be renewed.

        As a lease has it: what can be fixed beyond the step in use, less one part in so many.
        """
        if not stride:
            return 1
        window = min((self._opened.delay - 1) // stride, _timing.MAX_AHEAD)
        if not window:
            # Nothing is fixed ahead; what is offered is looked at now and then.
            return _timing.ALONE_STEPS
        least = window - window // _timing.RENEW_SHARE
        ahead = steps_ahead(self._known, in_use, stride)
        return min(max(ahead - least + 1, 0), _timing.ALONE_STEPS)

    def _offer(self) -> bool:
        """Ask once for values offered ahead; return whether it did."""
        stride = self._stride
        if not stride:
            return False
        with self._lock:
            wanted = self._offers.wanted(self._in_use, stride)
        if wanted is None:
            return False
        link = self._link
        answer = link.once(
            link.stub.OfferValues,
            pb.OfferValuesRequest(
                run=link.run,
                attempt=self._opened.attempt,
                holder=self._token,
                begin=wanted.steps.start,
                stride=stride,
                count=len(wanted.steps),
                held=link.held(),
            ),
            _timing.CALL_S,
        )
        values = read_block(link, self._opened, answer.block)
        with self._lock:
            self._offers.take(wanted, answer, values, self._in_use)
            link.got.offer = max(link.got.offer, answer.offer)
        return True

    # On both.

    def _values(
        self, begin: int, wait_s: float, *, in_use: int, blocked: bool
    ) -> pb.GetValuesResponse:
        link, stride = self._link, self._stride
        answer: pb.GetValuesResponse = link.once(
            link.stub.GetValues,
            pb.GetValuesRequest(
                run=link.run,
                attempt=self._opened.attempt,
                holder=self._token,
                begin=begin,
                stride=stride or 1,
                count=_timing.MAX_STEPS if stride else 1,
                in_use=in_use,
                blocked=blocked,
                wait_ms=int(wait_s * 1000),
                explain=self.explain,
                held=link.held(),
            ),
            _timing.LEADER_PATIENCE_S,
        )
        return answer

    def _add(self, answer: pb.GetValuesResponse, generation: int) -> bool:
        """Keep what an answer brought, if nothing was used in its place; return whether it did."""
        self._link.heard(answer.frontier, answer.horizon)
        if not answer.HasField("block"):
            return False
        try:
            got = read_block(self._link, self._opened, answer.block)
            with self._lock:
                if generation != self._generation:
                    return False
                hold(self._link, self._opened.attempt, self._known, got)
                self._link.got.add(answer.block, len(self._opened.groups))
                self._directives.extend(map(read_directive, answer.directives))
                self._changes.extend(map(read_change, answer.changes))
                if self._offers.compare(answer.plan):
                    self._work_at = -math.inf
                forget_passed(self._known, self._in_use)
        except LrpilotError as error:
            self._link.fail(error)
            raise
        return True

    def _declare(self) -> None:
        """Declare all that was used alone. Raises Unanswered, AttemptSuperseded, …."""
        while self._used:
            self._used.declare(self._record)

    def _record(self, declared: Mapping[int, Values]) -> None:
        with self._lock:
            self._known |= declared
            self._link.got.add(blocks(declared)[-1], len(self._opened.groups))
            self._link.got.declared = max(declared) + 1
            self._is_back = self._is_alone
            # What operators changed meanwhile shows from here on.
            self._offers.outdate()

    # The end.

    def settle(self, timeout_s: float) -> bool:
        """Declare what was used alone, for a bounded time; return whether the server knows it.

        Raises AttemptSuperseded, ….
        """
        end_s = time.monotonic() + timeout_s
        backoff = Backoff()
        while self._used and not self._link.closing.is_set():
            left_s = min(max(end_s - time.monotonic(), 0.0), _timing.LEADER_PATIENCE_S)
            try:
                self._used.declare(self._record, left_s)
            except Unanswered:
                self._link.pause(min(backoff.next_s(), end_s - time.monotonic()))
            if time.monotonic() >= end_s:
                break
        return not self._used

    def close(self) -> None:
        """Let the background thread end; its call was ended with the link."""
        self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join(_timing.JOIN_S)
        if self._used:
            logger.error(
                "run %s: %s were used without the server and NOT declared to %s before the end: "
                "its log does not have their values",
                self._link.run,
                self._used,
                self._link.address,
            )


def _steps(
    find: Callable[[int], Held | None], begin: int, stride: int, most: int
) -> Iterator[tuple[int, Held]]:
    """Yield what is found at a progress and at the steps after it, until nothing is."""
    for step in range(most if stride else 1):
        at = begin + step * stride
        found = find(at)
        if found is None:
            return
        yield at, found
