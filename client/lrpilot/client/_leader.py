"""Leader mode: rank 0 gets the values and passes them on, a block at a time, over a CPU group.

Every rank asks at the same progress, so that all of them come to the same exchange: there they get
the same values, or raise the same error. Between two exchanges no rank waits for another.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass

from lrpilot.client._call import Link
from lrpilot.client._due import WithValues
from lrpilot.client._errors import (
    AttemptSuperseded,
    ClientFailed,
    LogForgotten,
    LrpilotError,
    RunFinished,
    RunNotFound,
    invalid_argument,
)
from lrpilot.client._holder import Holder, Passed
from lrpilot.client._launch import Group
from lrpilot.client._lease import refuse_before
from lrpilot.client._reporter import Reporter
from lrpilot.client._values import Values
from lrpilot.v1 import trainer_pb2 as pb

logger = logging.getLogger("lrpilot.client")


@dataclass(frozen=True)
class _Refused:
    """What rank 0 met in place of values."""

    asked: int
    error: LrpilotError
    is_final: bool
    """Whether asking again is of no use."""


class Leader(WithValues):
    """The values of one attempt in leader mode, on one of its ranks."""

    def __init__(
        self,
        link: Link,
        opened: pb.OpenAttemptResponse,
        *,
        group: Group | None,
        holder: Holder | None,
        reporter: Reporter | None,
        carried_out: Collection[str] = (),
        explain: bool = False,
    ) -> None:
        """Take part: rank 0 with the holder, every other one without.

        Args:
            link: the connection.
            opened: the answer that opened the attempt.
            group: what rank 0 passes the values on over; None: there is one rank.
            holder: gets the values, on rank 0.
            reporter: the reporter of this rank, if it reports.
            carried_out: ids of the directives that are met no more.
            explain: whether this rank wants to hear of changes.
        """
        self._link = link
        self._opened = opened
        self._group = group
        self._holder = holder
        self._reporter = reporter
        self._explain = explain
        self._passed = Passed(-1, {}, (), (), is_alone=False)
        super().__init__(carried_out)
        self._has_refused = False
        """Whether every rank has raised an error after which asking again is of no use."""

    @property
    def explain(self) -> bool:
        """Whether this rank wants to hear of changes; rank 0 then fetches them."""
        return self._explain

    @explain.setter
    def explain(self, wanted: bool) -> None:
        self._explain = wanted
        if self._holder is not None:
            self._holder.explain = wanted

    def values(self, progress: int, stride: int = 0) -> Values:
        """Return the values at `progress`, which becomes the one in use.

        Every rank calls it at the same point, on the training thread. `stride` is the increment
        by which the caller goes on; 0: it is told from the steps. Raises BeforeAttempt, and, on
        every rank what rank 0 met, BeyondHorizon, ServerUnavailable, AttemptSuperseded, ….
        """
        holder = self._holder
        if holder is not None:
            holder.pace(progress, stride)
        found = self._passed.values.get(progress)
        if found is None:
            found = self._exchange(progress)
        if holder is not None:
            holder.use(progress)
        return found

    def check(self) -> None:
        """Raise what every rank has raised, or PilotClosed.

        What a background thread of one rank meets waits for the next exchange: a rank that
        raises alone would leave the others there.
        """
        if self._has_refused or self._group is None or self._link.closing.is_set():
            self._link.check()

    def settle(self, timeout_s: float) -> bool:
        """Return whether the server knows all values that were used.

        Rank 0 declares them, for a bounded time; another rank knows it from the last exchange.
        Raises AttemptSuperseded, ….
        """
        return not self._passed.is_alone if self._holder is None else self._holder.settle(timeout_s)

    def close(self) -> None:
        """Let the background thread end; its call was ended with the link."""
        if self._holder is not None:
            self._holder.close()

    # The exchange.

    def _exchange(self, progress: int) -> Values:
        refuse_before(self._link, self._opened, progress)
        got = self._pass_on(progress)
        if isinstance(got, _Refused):
            if got.is_final:
                self._link.fail(got.error)
                self._link.failure_raised = self._has_refused = True
            is_own = self._holder is not None
            raise got.error if is_own else got.error.again(" (rank 0)", rank=0)
        if got.is_alone:
            # They show later, if at all: operators' changes of that time take effect after it.
            self._changes.forget()
        self._directives.add(got.directives)
        if self._explain:
            self._changes.add(got.changes)
        self._passed = got
        if self._holder is None:
            # Its own failure: rank 0 may not have met it, and goes on.
            self._link.check()
        return got.values[progress]

    def _pass_on(self, progress: int) -> Passed | _Refused:
        """Return on every rank what rank 0 got."""
        if self._holder is None:
            return self._receive(progress)
        got = self._outcome(self._holder, progress)
        self._send(got)
        return got

    def _outcome(self, holder: Holder, progress: int) -> Passed | _Refused:
        """Return what the holder returned or raised: the other ranks wait for either."""
        try:
            return holder.get(progress, self._beat)
        except (AttemptSuperseded, LogForgotten, RunFinished, RunNotFound) as error:
            # Values that an answer under way still brings must not be used any more.
            return _Refused(progress, error, is_final=True)
        except LrpilotError as error:
            return _Refused(progress, error, is_final=self._link.failure is not None)
        except Exception as error:
            logger.exception("rank 0 failed")
            return _Refused(progress, ClientFailed(f"rank 0 failed: {error!r}"), is_final=True)

    def _beat(self) -> None:
        """Let the other ranks know that rank 0 still waits: their collective has a timeout."""
        self._send(None)

    def _send(self, item: Passed | _Refused | None) -> Passed | _Refused | None:
        """Return on every rank what rank 0 gave."""
        sent: Passed | _Refused | None = item
        if self._group is not None:
            sent = self._group.from_first(lambda: item)
        return sent

    def _receive(self, progress: int) -> Passed | _Refused:
        while True:
            got = self._send(None)
            if got is None:
                if self._reporter is not None and self._reporter.until < progress:
                    # Blocked on losses that are its own to report, it has none: it moves on.
                    self._reporter.move_to(progress)
                continue
            if got.asked != progress:
                raise invalid_argument(
                    "progress",
                    progress,
                    f"{got.asked}, for which rank 0 asks: in leader mode every rank asks for the "
                    "same values at the same point",
                )
            return got
