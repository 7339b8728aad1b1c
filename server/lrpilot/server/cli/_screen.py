"""What `lrpilot run watch` looks at, and how it stands on the screen."""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from lrpilot.server.cli._chart import chart_of_run
from lrpilot.server.cli._failures import REFUSED, CommandError
from lrpilot.server.cli._output import counted, rate, table_lines
from lrpilot.server.cli._remote import Runs
from lrpilot.server.cli._show import (
    LIST_HEADERS,
    decided_text,
    event_text,
    facts,
    list_row,
    state_of,
    when,
)
from lrpilot.server.cli._terminal import ChartView, Plain
from lrpilot.v1 import runs_pb2

POINTS = 1000
"""Points of each curve that a server is asked for; more are held until there are twice as many."""
EVENTS = 20
"""Most events that are read."""

_LEAST_PLOTS, _SHARE = 10, 0.45
"""Lines of a screen that are kept for the curves, and which share of them all."""
_FACTS = ("held", "progress", "loss", "counts", "fixed", "stage", "validation", "leader mode",
          "imported", "attempt")  # fmt: skip
"""What is said of a run, the most important first."""


class Finished(Exception):
    """There is nothing more to watch."""


class Screen:
    """A view on the whole screen, below what is wrong with its server."""

    def __init__(self, view: RenderableType, silent_since: float | None) -> None:
        self._view = view
        self._silent_since = silent_since

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = options.height or options.size.height
        if self._silent_since is not None:
            since = datetime.fromtimestamp(self._silent_since, timezone.utc)
            yield Text(
                f"no answer since {since:%H:%M:%S}Z, trying again", style="bold red", no_wrap=True
            )
            height -= 1
        yield from console.render(Plain(self._view), options.update(height=max(1, height)))


def all_runs(runs: Runs) -> Callable[[], RenderableType]:
    """Return what looks at every run of a server."""
    return lambda: RunList([list_row(run) for run in runs.list()])


class RunList:
    """The list of runs, as much of it as there is room for."""

    def __init__(self, rows: Sequence[Sequence[str]]) -> None:
        self._rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = options.height or options.size.height
        if not self._rows:
            yield Text("no runs")
            return
        lines = [Text(line) for line in table_lines(LIST_HEADERS, self._rows, left=2)]
        lines[0].stylize("dim")
        if len(lines) > height:
            more = f"and {len(lines) - height + 1:,} more: lrpilot run list"
            lines = [*lines[: height - 1], Text(more, style="dim")]
        for line in lines:
            line.truncate(options.max_width, overflow="crop")
            yield line


class OneRun:
    """Looks at one run; curves and events are asked for where something happened."""

    def __init__(self, runs: Runs, name: str, *, log: bool, group: str | None) -> None:
        self._runs = runs
        self._name = name
        self._log = log
        self._groups = [] if group is None else [group]
        self._seen: runs_pb2.Run | None = None
        self._curves = runs_pb2.GetCurvesResponse()
        self._events: Sequence[runs_pb2.Event] = ()

    def __call__(self) -> RenderableType:
        """Return the view. Raises CommandError, or Finished where the run is."""
        try:
            run = self._runs.get(self._name)
            if self._seen is None or (run.seq, run.digest) != (self._seen.seq, self._seen.digest):
                self._curves = self._drawn(run)
                self._events = self._runs.notable(self._name, EVENTS)
        except CommandError as error:
            if self._seen is None or error.reason != "RunNotFound":
                raise
            raise CommandError(f"run {self._name!r} was deleted", REFUSED) from None
        if run.state == runs_pb2.RUN_STATE_FINISHED:
            raise Finished(
                f"{run.name} is finished, at progress {run.progress:,} of {run.total:,} {run.unit}"
            )
        self._seen = run
        return RunView(run, self._curves, self._events, log=self._log)

    def _drawn(self, run: runs_pb2.Run) -> runs_pb2.GetCurvesResponse:
        """Return the curves: those known and their newest part, where that is enough."""
        seen, known = self._seen, self._curves
        request = runs_pb2.GetCurvesRequest(run=self._name, points=POINTS, groups=self._groups)
        same_plan = seen is not None and (seen.attempt, seen.etag) == (run.attempt, run.etag)
        if seen is None or not same_plan or run.seq < seen.seq or _points(known) > 2 * POINTS:
            return self._runs.curves(request)
        # Below it no loss comes any more, save for late ones.
        request.begin = min(seen.frontier, seen.progress)
        return joined(known, self._runs.curves(request))


def _points(curves: runs_pb2.GetCurvesResponse) -> int:
    groups = max((len(group.progress) for group in curves.groups), default=0)
    return max(groups, sum(len(item.loss.progress) for item in curves.losses))


def joined(
    old: runs_pb2.GetCurvesResponse, new: runs_pb2.GetCurvesResponse
) -> runs_pb2.GetCurvesResponse:
    """Return the curves of a run: below where `new` begins those of `old`, of the same attempt."""
    whole = runs_pb2.GetCurvesResponse()
    whole.CopyFrom(new)
    whole.begin = old.begin
    del whole.losses[:]
    newer = {item.attempt: item for item in new.losses}
    for item in old.losses:
        part = whole.losses.add()
        part.CopyFrom(item)
        if item.attempt in newer:
            part.loss.CopyFrom(_joined(item.loss, newer.pop(item.attempt).loss, new.begin))
    whole.losses.extend(newer.values())
    whole.smoothed_loss.CopyFrom(_joined(old.smoothed_loss, new.smoothed_loss, new.begin))
    for known, group in zip(old.groups, whole.groups, strict=True):
        count = sum(at < new.begin for at in known.progress)
        for field in ("progress", "learning_rate", "base_learning_rate", "weight_decay"):
            values = [*getattr(known, field)[:count], *getattr(group, field)]
            getattr(group, field)[:] = values
    return whole


def _joined(old: runs_pb2.Curve, new: runs_pb2.Curve, begin: int) -> runs_pb2.Curve:
    kept = sum(at < begin for at in old.progress)
    return runs_pb2.Curve(
        progress=[*old.progress[:kept], *new.progress], value=[*old.value[:kept], *new.value]
    )


class RunView:
    """A run on a screen: where it stands, trouble first; its curves; what was decided; events."""

    def __init__(
        self,
        run: runs_pb2.Run,
        curves: runs_pb2.GetCurvesResponse,
        events: Sequence[runs_pb2.Event],
        *,
        log: bool,
    ) -> None:
        self._run = run
        self._events = events
        self._log = log
        self._chart = chart_of_run(run, curves)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, options.height or options.size.height
        kept = max(_LEAST_PLOTS, int(_SHARE * height))
        rows = min(max(2, (height - kept) // 2), height)
        top = list(self._head(width))[:rows]
        bottom = list(self._decisions(width, max(2, rows // 2)))
        bottom += self._happened(width, max(2, rows // 2))
        bottom = bottom[: max(0, height - len(top) - kept)]
        for line in top:
            yield _fitted(line, width)
        plots = height - len(top) - len(bottom)
        if plots > 0:
            yield ChartView(self._chart, log=self._log, height=plots)
        for line in bottom:
            yield _fitted(line, width)

    def _head(self, width: int) -> Iterator[Text]:
        run = self._run
        state = state_of(run)
        title = Text(run.name, style="bold")
        title.append(f"  {state}", style="not bold red" if run.forgotten else "not bold")
        title.append(f"  updated {when(run.updated_at)}", style="not bold dim")
        yield title
        for text in self._trouble():
            for line in textwrap.wrap(text, width):
                yield Text(line, style="bold red")
        said = dict(facts(run))
        for what in _FACTS:
            if what in said:
                yield _fact(what, said[what])
            if what == "progress":
                yield _fact("values", self._values())
                if run.HasField("ranks"):
                    yield _fact("ranks", ranks_text(run.ranks))

    def _trouble(self) -> Iterator[str]:
        run = self._run
        if run.forgotten:
            yield run.forgotten
        if run.HasField("ranks") and run.ranks.waiting:
            blocked = counted(run.ranks.waiting, "training thread")
            yield f"{blocked} blocked for {run.ranks.blocked_s:.1f} s: {ranks_text(run.ranks)}"
        last = max(self._chart.missing, default=None)
        # What is long past is among the counts: red is for what needs somebody now.
        if last is not None and last >= run.frontier - _lately(run):
            yield f"{counted(run.nonfinite_losses, 'loss')} not finite, the last at {last:,}"

    def _values(self) -> str:
        first, *others = self._run.values or [runs_pb2.GroupValues()]
        text = f"LR {rate(first.learning_rate)}"
        if first.HasField("weight_decay"):
            text += f", WD {rate(first.weight_decay)}"
        name = f" ({first.name})" if first.name else ""
        return f"{text}{name}" + (f" and {counted(len(others), 'more group')}" if others else "")

    def _decisions(self, width: int, rows: int) -> Iterator[Text]:
        decisions = self._chart.decisions
        yield Text("adjustments and advice, the newest first", style="dim")
        if not decisions:
            yield Text("none", style="dim")
        newest_first = list(enumerate(decisions, 1))[::-1]
        for most in (2, 1):
            lines = [
                line
                for number, item in newest_first
                for line in _hanging(f"{item.sign(number):>4} ", item.text, width, most)
            ]
            if len(lines) < rows:
                break
        yield from lines[: rows - 1]

    def _happened(self, width: int, rows: int) -> Iterator[Text]:
        yield Text("events, the newest first", style="dim")
        for event in self._events[: rows - 1]:
            time_of_day = when(event.recorded_at).partition(" ")[2]
            # What was decided on a report says more than the report.
            texts = [decided_text(item) for item in event.adjustments if event.kind != "adjusted"]
            for text in texts or [event_text(event)]:
                yield from _hanging(f"{time_of_day} ", text, width, 1)


def _lately(run: runs_pb2.Run) -> float:
    """Return how far back in progress lately reaches: some losses, as many as on the page."""
    losses = min(1000.0, max(50.0, 0.02 * run.losses))
    return losses * max(1.0, run.progress / max(1, run.losses))


def ranks_text(ranks: runs_pb2.Ranks) -> str:
    """Return how the ranks of a run keep up.

    >>> ranks_text(runs_pb2.Ranks(active=8, slowest=[runs_pb2.RankLag(rank=3, progress=90, lag=9)]))
    '8 ranks active; slowest rank 3 at 90, 9 behind'
    """
    text = f"{counted(ranks.active, 'rank')} active"
    if ranks.waiting:
        text += f", {ranks.waiting:,} waiting"
    if ranks.slowest:
        slowest = ranks.slowest[0]
        text += f"; slowest rank {slowest.rank} at {slowest.progress:,}, {slowest.lag:,} behind"
    return text


def _fact(what: str, text: str) -> Text:
    return Text.assemble((f"{what:<11} ", "dim"), text)


def _hanging(sign: str, text: str, width: int, most: int) -> Iterator[Text]:
    """Yield a text on at most so many lines, behind a sign on the first of them."""
    room = max(10, width - len(sign))
    for index, line in enumerate(
        textwrap.wrap(text, room, max_lines=most, placeholder=" …", break_long_words=True)
    ):
        yield Text.assemble((sign if index == 0 else " " * len(sign), "bold"), line)


def _fitted(line: Text, width: int) -> Text:
    line.truncate(width, overflow="crop")
    return line
