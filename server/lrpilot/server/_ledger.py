"""The live runs of this server: their folded states over the log in the store.

One ledger is one replica. It evaluates a request on its state, appends what the request
does, and applies that once it is durable. When another replica took the `seq`, it reads what
that one wrote and evaluates the whole request again. So replicas over one store need no
leader, and one that lags knows a smaller horizon and hands out fewer values, never others.
How it hears of what the others write, so that it lags for some milliseconds only, stands in
`follow`: a matter of speed alone.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from lrpilot import core
from lrpilot.server._commit import GroupCommitter
from lrpilot.server._history import History
from lrpilot.server._journal import about, note, tell
from lrpilot.server._live_run import LiveRun
from lrpilot.server._loss_history import LossHistory
from lrpilot.server._packing import PackedLog
from lrpilot.server._store import LogRow, News, SeqTaken, Store, StoreUnavailable
from lrpilot.server._touched import Touched
from lrpilot.server._tracing import NO_TRACING, Tracing

T = TypeVar("T")
U = TypeVar("U")

Evaluate = Callable[[core.RunState], tuple[list[core.Event], T]]
"""What a request does: reads a state and returns the events to append and what comes of them."""

logger = logging.getLogger("lrpilot.server")

ABANDONED_S = 6 * 3600.0
"""A run from whose ranks nothing came for so long is no longer shown among the live ones."""

WARM_NS = 24 * 3600 * 10**9
"""A run with an event within this time is read when the server starts."""

MISSED_NS = 600 * 10**9
"""Where word of other replicas was lost, they may have written to runs for so long."""

POLL_S = 1.0
"""Time between two looks at what other replicas wrote, for word of it that was lost."""

ASKED_S = 60.0
"""A run is looked at so while its ranks asked this replica for something, or somebody viewed it
here, within this time. It is more than one call may wait."""


class Ledger:
    """The runs of one server. Use it from one event loop."""

    def __init__(
        self,
        store: Store,
        committer: GroupCommitter,
        history: History | None = None,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self._store = store
        self._committer = committer
        self._history = history or History(store)
        self._tracing = tracing
        self.touched = Touched()
        """The runs that changed, for those who follow them all."""
        self.losses = LossHistory(store)
        """What is drawn of the runs, and their notable rows."""
        self._runs: dict[str, LiveRun] = {}
        self._tasks: set[asyncio.Task[object]] = set()
        self._told: dict[str, float] = {}
        """Run to the last `seq` that another replica may have written and nobody read yet."""
        self._tended: set[str] = set()
        """Runs of which a snapshot is being written."""
        self._one_packing = asyncio.Semaphore(1)
        """Held while a log is packed: many at once would take every thread that reads need."""
        self._one_overview = asyncio.Semaphore(1)
        """Likewise, while overviews are made."""
        self._is_suspended = False

    @property
    def is_suspended(self) -> bool:
        """Whether the store fails: then no waiver is due, for no loss could have arrived."""
        return self._is_suspended

    def suspend(self) -> None:
        """Let blocked time count for no waiver until `resume`: the store fails."""
        self._is_suspended = True
        self._excuse()

    def resume(self) -> None:
        """Count blocked time again, from now on."""
        self._is_suspended = False
        self._excuse()

    def _excuse(self) -> None:
        for run in self._runs.values():
            run.excuse()

    def live(self) -> list[LiveRun]:
        """Return the unfinished runs whose ranks asked this server, or one before it, lately."""
        now_s = time.monotonic()
        return [
            run
            for run in self._runs.values()
            if run.seen_s is not None
            and now_s - run.seen_s < ABANDONED_S
            and run.state.exists
            and not run.state.finished
        ]

    def wake(self) -> None:
        """Wake everyone who waits for any run."""
        for run in self._runs.values():
            run.wake()

    async def run(self, name: str) -> LiveRun:
        """Return a run that exists. Raises RunNotFound."""
        run = self._runs.get(name)
        if run is None or not run.state.exists:
            run = await self.find(name)
            if not run.state.exists:
                raise core.run_not_found(name, await self.names())
        return run

    async def find(self, name: str) -> LiveRun:
        """Return a run, which may not exist: then its state is empty."""
        run = self._runs.get(name)
        if run is not None and run.state.exists:
            return run
        # Goes on when its caller gives up: a long log would otherwise never be read to its end.
        return await self._finish(self._find(self._runs.setdefault(name, self._new(name))))

    def _new(self, name: str) -> LiveRun:
        return LiveRun(name, self.touched.touch)

    async def _find(self, run: LiveRun) -> LiveRun:
        name = run.state.name
        # Whoever comes meanwhile waits here too: that it is empty says nothing yet.
        async with run.lock:
            if not run.state.exists:
                await self._read(run)
        if run.state.exists:
            # Should another reader have dropped it: who waits must be found and woken.
            return self._runs.setdefault(name, run)
        if self._runs.get(name) is run:
            del self._runs[name]
        return run

    async def refresh(self, run: LiveRun) -> None:
        """Read what other replicas appended."""
        await self._finish(self._refresh(run))

    async def _refresh(self, run: LiveRun) -> None:
        async with run.lock:
            await self._read(run)

    async def warm_up(self) -> None:
        """Read the runs that ranks may be waiting for, one after the other: after a restart."""
        since_ns = time.time_ns() - WARM_NS
        for name in await asyncio.to_thread(self._store.recent, since_ns):
            try:
                head = await asyncio.to_thread(self._store.head, name)
                rows = await self.history(name, head[0] - 1, 1) if head is not None else []
                if rows and core.decode(rows[0].payload).kind != core.Finished.kind:
                    _seen_before(await self.find(name))
            except Exception:
                logger.exception("cannot be read", extra=about(name))

    async def follow(self) -> None:
        """Keep up with what other replicas write, until cancelled.

        They tell of it as they commit. Should that get lost, as with a connection, a look once a
        second finds it.
        """
        loop = asyncio.get_running_loop()

        def heard(news: News) -> None:
            # The loop may have ended before the store is closed.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._heard, news)

        if not self._store.follow(heard):
            return
        while True:
            await asyncio.sleep(POLL_S)
            since_s = time.monotonic() - ASKED_S
            await self._look_around(
                [
                    run
                    for run in self._runs.values()
                    if max(run.seen_s or 0.0, run.viewed_s or 0.0) > since_s
                ]
            )

    def _heard(self, news: News) -> None:
        if news.run is None:
            self._begin(self._look_around(list(self._runs.values())))
            if self.touched.is_followed:
                self._begin(self._touch_missed())
        elif (run := self._runs.get(news.run)) is not None:
            self._catch_up(run, math.inf if news.seq is None else news.seq)
        else:
            self.touched.touch(news.run)

    async def _touch_missed(self) -> None:
        """Tell those who follow all runs of what nobody asked for here, and word of it was lost."""
        with contextlib.suppress(StoreUnavailable):
            names = await asyncio.to_thread(self._store.recent, time.time_ns() - MISSED_NS)
            for name in names:
                if name not in self._runs:
                    self.touched.touch(name)

    async def _look_around(self, runs: list[LiveRun]) -> None:
        """Read those runs whose logs do not end as they do here."""
        names = [run.state.name for run in runs if run.state.exists]
        try:
            heads = await asyncio.to_thread(self._store.heads, names)
        except StoreUnavailable:
            # Readiness tells of it; and the next look finds what this one did not.
            for run in runs:
                run.excuse()
            return
        for run in runs:
            state = run.state
            if state.exists and heads.get(state.name) != (state.seq, state.digest):
                self._catch_up(run, math.inf)

    def _catch_up(self, run: LiveRun, seq: float) -> None:
        """Have a run read up to `seq`, once for all who ask before that begins."""
        name = run.state.name
        is_begun = name in self._told
        self._told[name] = max(seq, self._told.get(name, 0))
        if not is_begun:
            self._begin(self._read_told(run))

    async def _read_told(self, run: LiveRun) -> None:
        try:
            async with run.lock:
                # What this replica wrote itself is known by now.
                if self._told.pop(run.state.name) > run.state.seq:
                    await self._read(run)
        except StoreUnavailable:
            return
        except Exception:
            logger.exception("cannot be read", extra=about(run.state.name))

    async def names(self, after: str = "", limit: int = 10_000) -> list[str]:
        """Return the names of runs in the store, in order."""
        return await asyncio.to_thread(self._store.runs, after, limit)

    async def history(self, name: str, after_seq: int, limit: int) -> list[LogRow]:
        """Return rows of a run's log."""
        return await asyncio.to_thread(self._store.read, name, after_seq, limit)

    async def digest_at(self, name: str, seq: int) -> str | None:
        """Return the digest of a run's log at `seq`, or None where it has none."""
        rows = await self.history(name, seq - 1, 1)
        return rows[0].digest if rows and rows[0].seq == seq else None

    async def transact(self, run: LiveRun, evaluate: Evaluate[T]) -> T:
        """Carry a request out: evaluate, append, apply; again when another was faster.

        Once begun it is finished, even when the caller is cancelled: what is durable must
        also be known here.
        """
        return await self.respond(run, evaluate, lambda _, outcome: outcome)

    async def respond(
        self, run: LiveRun, evaluate: Evaluate[T], answer: Callable[[core.RunState, T], U]
    ) -> U:
        """Carry a request out as `transact` does, and answer from the state that it leaves.

        `answer` is given that state and what comes of the request. By the time that a caller
        goes on, another request may have been applied, and even have opened another attempt.
        """
        return await self._finish(self._transact(run, evaluate, answer))

    async def look(self, run: LiveRun, evaluate: Callable[[core.RunState], T]) -> T:
        """Evaluate what changes nothing.

        A refusal counts only once it stands after reading what other replicas wrote: they may
        have opened the attempt that this one does not know yet.
        """
        try:
            return await self._evaluated(run, evaluate)
        except core.LrpilotError:
            # Also when nothing is read: the state may have moved on while this one waited.
            await self.refresh(run)
            try:
                return await self._evaluated(run, evaluate)
            except core.AttemptSuperseded:
                run.superseded_calls += 1
                raise

    async def _evaluated(self, run: LiveRun, evaluate: Callable[[core.RunState], T]) -> T:
        """Evaluate, with as much of the history as that takes."""
        while True:
            try:
                return evaluate(run.state)
            except core.HistoryNeeded as error:
                await self._finish(self._locked_recall(run, error.progress))

    async def _locked_recall(self, run: LiveRun, progress: int) -> None:
        async with run.lock:
            if run.state.floor > progress:
                await self._recall(run, progress)

    async def delete(self, run: LiveRun, check: Callable[[core.RunState], None]) -> None:
        """Remove a run and its log for good, unless `check` raises."""
        await self._finish(self._delete(run, check))

    async def _finish(self, work: Awaitable[T]) -> T:
        return await asyncio.shield(self._begin(work))

    def _begin(self, work: Awaitable[T]) -> "asyncio.Task[T]":
        task: asyncio.Task[T] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def hurry(self) -> None:
        """Let what takes long end early, from now on: the server ends."""
        self._history.stop()
        self.losses.stop()

    async def settle(self) -> None:
        """Wait for every request that was begun."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _transact(
        self, run: LiveRun, evaluate: Evaluate[T], answer: Callable[[core.RunState, T], U]
    ) -> U:
        async with run.lock:
            while True:
                try:
                    events, outcome = evaluate(run.state)
                except core.HistoryNeeded as error:
                    await self._recall(run, error.progress)
                    continue
                except core.LrpilotError as error:
                    # See `look`.
                    if await self._read(run):
                        continue
                    run.superseded_calls += isinstance(error, core.AttemptSuperseded)
                    raise
                if not events:
                    # So does that nothing is to be done.
                    if await self._read(run):
                        continue
                    return answer(run.state, outcome)
                rows = _rows(run.state, events)
                name = run.state.name
                after = run.state.digest if run.state.exists else None
                try:
                    with self._tracing.span("store.append", run=name, rows=len(rows)) as span:
                        batch = await self._committer.append(
                            name, rows, create=after is None, after=after
                        )
                        span.set("batch", batch)
                except SeqTaken:
                    await self._read(run)
                    continue
                except StoreUnavailable:
                    run.excuse()
                    raise
                self._runs.setdefault(name, run)
                noted = note(run.state)
                await self._advance(run, rows)
                tell(noted, run.state, events)
                return answer(run.state, outcome)

    def trim(self, run: LiveRun, floor: int | None) -> None:
        """Drop what a run that is being folded will hardly be asked for. See History.trim."""
        self._history.trim(run, floor)

    async def take_over(
        self,
        run: LiveRun,
        folded: LiveRun,
        log: PackedLog,
        evaluate: Callable[[core.RunState, str | None], tuple[list[core.Event], T]],
    ) -> T:
        """Make a run that does not exist from a log that another server wrote, and behind it what
        `evaluate` returns, all at once. `folded` is the run after `log`.

        `evaluate` is given the state here, and the digest here where `log` ends; where the run
        exists, it raises or returns no event. Once begun it is finished, as
        in `transact`.
        """
        return await self._finish(self._take_over(run, folded, log, evaluate))

    async def _take_over(
        self,
        run: LiveRun,
        folded: LiveRun,
        log: PackedLog,
        evaluate: Callable[[core.RunState, str | None], tuple[list[core.Event], T]],
    ) -> T:
        name = run.state.name
        async with run.lock:
            while True:
                await self._read(run)
                digest = await self.digest_at(name, folded.state.seq)
                events, answer = evaluate(run.state, digest)
                if not events:
                    return answer
                more = _rows(folded.state, events)
                try:
                    await asyncio.to_thread(self._adopt, name, log, more)
                except SeqTaken:
                    continue
                for row in more:
                    folded.apply(row)
                self._runs.setdefault(name, run)
                run.adopt(folded)
                self._tend(run)
                return answer

    def _adopt(self, name: str, log: PackedLog, more: list[LogRow]) -> None:
        # Past the committer: whose appends wait in its queue must not wait for a whole log.
        self._store.adopt(name, log.followed_by(more))

    async def _delete(self, run: LiveRun, check: Callable[[core.RunState], None]) -> None:
        async with run.lock:
            while True:
                # What other replicas did meanwhile counts too, also that they deleted it.
                await self._read(run)
                check(run.state)
                if await self._committer.delete(run.state.name, run.state.digest):
                    break
            self._runs.pop(run.state.name, None)
            run.reset()
            run.wake()

    async def _read(self, run: LiveRun) -> bool:
        """Read what other replicas wrote; return whether there was anything. Holds the lock."""
        if not run.state.exists:
            return await self._load(run)
        seq, digest = run.state.seq, run.state.digest
        # The last row known here comes with them: it shows whether the log is still the same one.
        rows = await asyncio.to_thread(self._store.read, run.state.name, seq - 1)
        if not rows or (rows[0].seq, rows[0].digest) != (seq, digest):
            # Deleted, and perhaps made again, by another replica.
            run.reset()
            if not await self._load(run):
                run.wake()
            return True
        del rows[0]
        if rows:
            await self._advance(run, rows)
        return bool(rows)

    async def _load(self, run: LiveRun) -> bool:
        """Find the fold of a run's log on a thread: a long one must keep no other run waiting."""
        with self._tracing.span("run.load", run=run.state.name):
            found = await asyncio.to_thread(self._history.load, run.state.name)
        if found is not None:
            run.adopt(found)
            self._tend(run)
        return found is not None

    async def _advance(self, run: LiveRun, rows: list[LogRow]) -> None:
        """Apply rows that are in the log. Holds the lock."""
        try:
            run.advance(rows)
        except core.HistoryNeeded as error:
            await self._recall(run, error.progress)
        self._tend(run)

    # The history of long runs.

    async def _recall(self, run: LiveRun, progress: int) -> None:
        """Fold the log again so that what lies at `progress` is known. Holds the lock."""
        name = run.state.name
        logger.info(
            "what lies at %d is asked for; the log is read again",
            progress,
            extra=about(run.state, floor=run.state.floor),
        )
        with self._tracing.span("run.recall", run=name, progress=progress):
            found = await asyncio.to_thread(self._history.load, name, progress)
        if found is None:
            run.reset()
            run.wake()
            return
        run.adopt(found)
        # It is trimmed again with the next snapshot: who asks once may ask again.
        run.unsaved = 0

    def _tend(self, run: LiveRun) -> None:
        """Have a snapshot written, and what lies behind it packed, where that is due."""
        if self._history.is_due(run) and run.state.name not in self._tended:
            self._tended.add(run.state.name)
            self._begin(self._keep(run))

    async def _keep(self, run: LiveRun) -> None:
        name = run.state.name
        try:
            async with run.lock:
                if not run.state.exists:
                    return
                with self._tracing.span("run.snapshot", run=name) as span:
                    self._history.trim(run)
                    snapshot = await asyncio.to_thread(self._history.snapshot, run)
                    span.set("seq", snapshot.seq)
                run.snapshot_seq, run.unsaved, updated_ns = snapshot.seq, 0, run.updated_ns
                decided = run.decided()
            # The run goes on meanwhile: a snapshot is of the log as it was.
            async with self._one_packing:
                with self._tracing.span("run.pack", run=name, seq=snapshot.seq):
                    is_kept = await asyncio.to_thread(self._history.keep, name, snapshot)
            if is_kept:
                run.snapshot_ns = updated_ns
                self._begin(self._keep_up(name, decided))
        except Exception:
            logger.exception("no snapshot can be made", extra=about(name))
        finally:
            self._tended.discard(name)

    async def _keep_up(self, name: str, decided: set[int]) -> None:
        """Have the overviews made of what was packed."""
        # One at a time, as with packing; who comes meanwhile finds it done by the next snapshot.
        if self._one_overview.locked():
            return
        async with self._one_overview:
            await asyncio.to_thread(self.losses.keep_up, name, decided)


def _seen_before(run: LiveRun) -> None:
    """Have a run count as live as long as if this server had been there at its last event.

    Its ranks may be dead by now: then none of them asks, and just that is to be seen.
    """
    if run.state.token and run.seen_s is None:
        age_s = (time.time_ns() - run.updated_ns) / 1e9
        run.seen_s = time.monotonic() - max(age_s, 0.0)


def _rows(state: core.RunState, events: list[core.Event]) -> list[LogRow]:
    """Return events as the rows that come behind the log of `state`, recorded now."""
    now_ns = time.time_ns()
    return [LogRow(seq, data, digest, now_ns) for seq, data, digest in core.rows(state, events)]
