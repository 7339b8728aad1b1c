"""The list of runs: a row for each, with the course of its loss as a few points."""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, NamedTuple

from lrpilot.server._json import fields_of
from lrpilot.server._ledger import Ledger
from lrpilot.server._messages import pending_advice
from lrpilot.server._run_service import RunService
from lrpilot.v1 import runs_pb2 as pb

logger = logging.getLogger("lrpilot.server")

SPARK_POINTS = 60
"""About how many points a sparkline has."""

SPARK_S = 10.0
"""A sparkline is not drawn anew sooner, however fast its run goes."""

SPARKS_S = 1.0
"""Longest that a list waits for its sparklines; those that take longer come with the next one."""

BUSY = 0.01
"""Largest share of a thread that the sparkline of one run may take."""

MAX_SPARKS = 2000
"""Sparklines that are kept, those asked for last."""

Spark = list[tuple[int, float]]
"""(progress, loss) in order of progress."""


class _Drawn(NamedTuple):
    points: Spark
    digest: str
    """Of the log that they are drawn from."""
    due_s: float
    """When it may be drawn anew, on the monotonic clock."""


class Rows:
    """The rows of one server."""

    def __init__(self, ledger: Ledger, runs: RunService) -> None:
        self._ledger = ledger
        self._runs = runs
        self._drawn: OrderedDict[str, _Drawn] = OrderedDict()
        self._drawing: dict[str, asyncio.Task[None]] = {}
        self._turn = asyncio.Semaphore(1)
        """Held while a sparkline is drawn: trainers come first."""

    async def page(self, request: pb.ListRunsRequest) -> dict[str, Any]:
        """Return a page of the list. Raises InvalidRequest and StoreUnavailable."""
        answer = await self._runs.list_runs(request)
        await self._draw(run for run in answer.runs if run.state != pb.RUN_STATE_UNREADABLE)
        rows = []
        for run in answer.runs:
            drawn = self._drawn.get(run.name)
            spark = None if drawn is None else drawn.points
            rows.append(await self._row(run) | {"spark": spark})
            # Others have their turn.
            await asyncio.sleep(0)
        return {"runs": rows, "next_page_token": answer.next_page_token}

    async def row(self, name: str) -> dict[str, Any] | None:
        """Return the row of one run, without sparkline; None: it does not exist."""
        run = await self._runs.listed(name)
        return None if run is None else await self._row(run)

    async def _row(self, run: pb.Run) -> dict[str, Any]:
        fields = fields_of(run)
        del fields["adjustments"], fields["spec_document"]
        if run.state != pb.RUN_STATE_UNREADABLE:
            fields["pending_advice"] = pending_advice((await self._ledger.find(run.name)).state)
        return fields

    async def _draw(self, runs: Iterable[pb.Run]) -> None:
        """Draw the sparklines that are missing or old, as far as time allows."""
        tasks = []
        for run in runs:
            drawn = self._drawn.get(run.name)
            if drawn is not None:
                self._drawn.move_to_end(run.name)
                if drawn.digest == run.digest or time.monotonic() < drawn.due_s:
                    continue
            task = self._drawing.get(run.name)
            if task is None:
                task = self._drawing[run.name] = asyncio.create_task(self._draw_one(run))
            tasks.append(task)
        if tasks:
            await asyncio.wait(tasks, timeout=SPARKS_S)

    async def _draw_one(self, run: pb.Run) -> None:
        try:
            async with self._turn:
                began_s = time.monotonic()
                request = pb.GetCurvesRequest(run=run.name, points=SPARK_POINTS)
                curves = await self._runs.get_curves(request)
                spent_s = time.monotonic() - began_s
            due_s = began_s + max(SPARK_S, spent_s / BUSY)
            drawn = _Drawn(_spark(curves), run.digest, due_s)
        except Exception:
            # The list shows the run without it.
            logger.debug("run %s: no sparkline", run.name, exc_info=True)
        else:
            self._drawn[run.name] = drawn
            if len(self._drawn) > MAX_SPARKS:
                self._drawn.popitem(last=False)
        finally:
            del self._drawing[run.name]

    def end(self) -> None:
        """Draw no more."""
        for task in self._drawing.values():
            task.cancel()


def _spark(curves: pb.GetCurvesResponse) -> Spark:
    """Return the losses that count, over all attempts."""
    points: Spark = []
    for attempt in curves.losses:
        until = attempt.forgotten_from if attempt.HasField("forgotten_from") else None
        points += (
            (progress, loss)
            for progress, loss in zip(attempt.loss.progress, attempt.loss.value, strict=True)
            if until is None or progress < until
        )
    return points
