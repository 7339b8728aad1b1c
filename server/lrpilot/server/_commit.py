"""Group commit: many requests, few commits.

A commit to stable storage costs the same for one row and for a hundred. So one thread writes:
while it commits, appends gather in its queue, and the next commit takes them all.
"""

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lrpilot.server._store import Append, LogRow, Reason, Store, StoreUnavailable

logger = logging.getLogger("lrpilot.server")


class CommitObserver(Protocol):
    """Who is told of each commit. Called on the writer's thread: it must be quick."""

    def commit_finished(
        self, seconds: float, appends: int, rows: int, failure: Reason | None
    ) -> None:
        """Count one commit of `appends` appends with `rows` rows in all.

        `failure` says why the store failed; None: it did not. An append that met a conflict is
        counted as any other.
        """


@dataclass(frozen=True, slots=True)
class _Delete:
    run: str
    after: str | None


@dataclass(frozen=True, slots=True)
class _Probe:
    """A write that only shows whether writes succeed."""


_Work = Append | _Delete | _Probe


@dataclass(frozen=True, slots=True)
class _Task:
    work: _Work
    done: asyncio.Future[int]


@dataclass(frozen=True, slots=True)
class _Outcome:
    done: asyncio.Future[int]
    result: int | Exception


class GroupCommitter:
    """The one writer of a store. Use it from one event loop.

    What is handed over is carried out in that order, also when its caller is cancelled meanwhile.
    The store is not closed here: it belongs to whoever opened it.
    """

    def __init__(self, store: Store, observer: CommitObserver | None = None) -> None:
        self._store = store
        self._observer = observer
        self._queue: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._closed = False
        self.failure: StoreUnavailable | None = None
        """Why the last write failed; None: it did not."""
        self._failed = asyncio.Event()
        # A daemon, so that a server that failed before `close` can still end.
        self._thread = threading.Thread(target=self._write, name="lrpilot-commit", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of appends and deletes that wait for the next commit. Any thread may ask."""
        return self._queue.qsize()

    async def append(
        self, run: str, rows: Sequence[LogRow], create: bool = False, after: str | None = None
    ) -> int:
        """Append rows to a run's log; return once they are durable: how many appends the commit
        had.

        Raises SeqTaken where they do not continue the log, StoreUnavailable where the store
        fails or the committer is closed, and ValueError for rows that no log can take. See
        Store.append.
        """
        return await self._submit(Append(run, tuple(rows), create, after))

    async def delete(self, run: str, after: str | None = None) -> bool:
        """Remove a run with its whole log; return whether there was one. See Store.delete.

        Raises StoreUnavailable where the store fails or the committer is closed.
        """
        return bool(await self._submit(_Delete(run, after)))

    async def probe(self) -> None:
        """Return once a write has shown that writes succeed. Raises as `delete` does."""
        await self._submit(_Probe())

    async def wait_for_failure(self, timeout_s: float) -> None:
        """Return once a write has failed and none has succeeded since, or after `timeout_s`."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._failed.wait(), timeout_s)

    async def close(self) -> None:
        """Take nothing more, and return once everything handed over is carried out."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _submit(self, work: _Work) -> asyncio.Future[int]:
        if self._closed:
            raise StoreUnavailable("the server is shutting down")
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._queue.put(_Task(work, done))
        return done

    def _write(self) -> None:
        open_ = True
        while open_:
            tasks, open_ = self._drain()
            for kind, group in itertools.groupby(tasks, lambda task: type(task.work)):
                if kind is Append:
                    self._commit(list(group))
                else:
                    for task in group:
                        self._resolve([_Outcome(task.done, self._carry_out(task.work))])

    def _drain(self) -> tuple[list[_Task], bool]:
        """Wait for a task, then return all there are, and whether more may come."""
        tasks: list[_Task] = []
        task = self._queue.get()
        while task is not None:
            tasks.append(task)
            try:
                task = self._queue.get_nowait()
            except queue.Empty:
                return tasks, True
        return tasks, False

    def _commit(self, tasks: list[_Task]) -> None:
        batch = [task.work for task in tasks if isinstance(task.work, Append)]
        started = time.perf_counter()
        failure: Exception | None = None
        try:
            results = self._store.append(batch)
        except Exception as error:
            failure = error
        seconds = time.perf_counter() - started
        self._resolve(
            [
                _Outcome(task.done, len(batch) if conflict is None else conflict)
                for task, conflict in zip(tasks, results, strict=True)
            ]
            if failure is None
            else [_Outcome(task.done, _unavailable(failure)) for task in tasks]
        )
        if self._observer is not None:
            try:
                rows = sum(len(append.rows) for append in batch)
                reason = None if failure is None else _unavailable(failure).reason
                self._observer.commit_finished(seconds, len(batch), rows, reason)
            except Exception:
                logger.exception("a commit could not be counted")

    def _carry_out(self, work: _Work) -> bool | Exception:
        try:
            if isinstance(work, _Delete):
                return self._store.delete(work.run, work.after)
            self._store.probe()
        except Exception as error:
            return _unavailable(error)
        return True

    def _resolve(self, outcomes: list[_Outcome]) -> None:
        """Wake everyone of a batch with one message to the event loop."""
        try:
            outcomes[0].done.get_loop().call_soon_threadsafe(self._set, outcomes)
        except RuntimeError:
            # The loop is closed: nobody waits any more, and what was written stays written.
            logger.warning("the event loop ended before %d writes did", len(outcomes))

    def _set(self, outcomes: list[_Outcome]) -> None:
        # Before anybody hears of it: who asks then whether writes succeed must not hear otherwise.
        self._learn([outcome.result for outcome in outcomes])
        for outcome in outcomes:
            if outcome.done.done():
                continue  # The caller was cancelled.
            if isinstance(outcome.result, Exception):
                outcome.done.set_exception(outcome.result)
            else:
                outcome.done.set_result(outcome.result)

    def _learn(self, results: list[int | Exception]) -> None:
        failures = [result for result in results if isinstance(result, StoreUnavailable)]
        if failures:
            self.failure = failures[0]
            self._failed.set()
        elif any(result for result in results if not isinstance(result, Exception)):
            # One that met nothing but conflicts wrote nothing, and shows nothing.
            self.failure = None
            self._failed.clear()


def _unavailable(failure: Exception) -> StoreUnavailable:
    """Return an exception of its own for each who waits: they raise it in different places."""
    text = str(failure)
    if not isinstance(failure, StoreUnavailable):
        text = f"{type(failure).__name__}: {text}"
    error = StoreUnavailable(text, getattr(failure, "reason", "other"))
    error.__cause__ = failure
    return error
