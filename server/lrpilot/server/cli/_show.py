"""Runs, their adjustments and their events, written for people."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone

from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lrpilot.server._json import state_name
from lrpilot.server.cli._output import counted, rate
from lrpilot.v1 import runs_pb2

_USUAL = ("planned", "in force", "ended", "noted", "")
"""Statuses that a line of the history leaves out."""

_MOST_SHOWN = 25
"""Most adjustments in a panel, the newest; the history has all."""
_MOST_PENDING = 3
"""Most pieces of advice that a panel says how to approve, the newest."""


LIST_HEADERS = ("run", "state", "attempt", "progress", "total", "unit", "lr", "loss", "updated")


def list_row(run: runs_pb2.Run) -> Sequence[str]:
    """Return a run as the cells of a line in the list of runs."""
    return (
        run.name,
        state_of(run),
        str(run.attempt),
        f"{run.progress:,}",
        f"{run.total:,}",
        run.unit,
        rate(run.values[0].learning_rate) if run.values else "-",
        rate(run.loss) if run.HasField("loss") else "-",
        when(run.updated_at),
    )


def state_of(run: runs_pb2.Run) -> str:
    """Return the word for where a run stands, the trouble that it is in before all."""
    if run.forgotten:
        return "forgotten"
    is_waiting = run.imported_from and run.state == runs_pb2.RUN_STATE_RUNNING
    return "imported" if is_waiting else state_name(run.state)


def panel(run: runs_pb2.Run) -> RenderableType:
    """Return a run as a panel: where it stands, its values, and what changed them."""
    parts: list[RenderableType] = [_facts(run), Text(), _values_table(run)]
    if run.forgotten:
        parts = [Text(run.forgotten, style="bold red"), Text(), *parts]
    directives = [item for item in run.adjustments if item.action == "directive"]
    others = [item for item in run.adjustments if item.action != "directive"]
    pending = [item for item in others if item.status == "advice" and item.action != "note"]
    if others:
        parts += [Text(), _adjustments_table(others[-_MOST_SHOWN:])]
    if hidden := max(0, len(others) - _MOST_SHOWN) + run.older_adjustments:
        older = counted(hidden, "older one")
        parts.append(Text(f"{older}: lrpilot run history {run.name}", style="dim"))
    if directives:
        parts += [Text(), _directives_table(directives[-_MOST_SHOWN:])]
    for item in pending[-_MOST_PENDING:]:
        parts += [Text(), *_pending(run.name, item)]
    return Panel(
        Group(*parts),
        title=Text(run.name, style="bold"),
        title_align="left",
        subtitle=Text(state_of(run)),
        subtitle_align="right",
        padding=(0, 1),
    )


def event_lines(event: runs_pb2.Event) -> Iterator[str]:
    """Yield the lines of one event: what happened, and below it what was decided on it and why."""
    attempt = f"attempt {event.attempt}" if event.attempt else ""
    yield (
        f"{event.seq:>6}  {when(event.recorded_at)}  {event.kind:<12}  {attempt:<10}  "
        f"{event_text(event)}"
    ).rstrip()
    for item in event.adjustments:
        if event.kind == "adjusted":
            # The line above has said the rest.
            yield f"        {item.id}: {change_text(item)}{_unusual(item)}"
        else:
            yield f"        {item.id} {decided_text(item)}"


def decided_text(item: runs_pb2.Adjustment) -> str:
    """Return what was decided on an event, by what and why."""
    return (
        f"{item.source} at {item.decided_at:,}: {item.summary}{_unusual(item)} "
        f"from {item.effective:,} on, {change_text(item)}: {item.reason}"
    )


def _unusual(item: runs_pb2.Adjustment) -> str:
    return "" if item.status in _USUAL else f" ({item.status})"


def event_text(event: runs_pb2.Event) -> str:
    """Return what happened, by whom and why."""
    losses = f"; {_losses(event.losses)}" if event.losses else ""
    author = f", by {event.author}" if event.author else ""
    reason = f": {event.reason}" if event.reason else ""
    return f"{event.summary}{losses}{author}{reason}"


def change_text(item: runs_pb2.Adjustment) -> str:
    """Return what an adjustment does where it takes effect to the first group that it changes.

    >>> change_text(runs_pb2.Adjustment(before=[2e-4, 1e-4], after=[1e-4, 5e-5]))
    'LR 0.0002 → 0.0001 (+1 group)'
    """
    parts = []
    for name, before, after in (
        ("LR", item.before, item.after),
        ("WD", item.weight_decay_before, item.weight_decay_after),
    ):
        moved = [pair for pair in zip(before, after, strict=False) if pair[0] != pair[1]]
        if moved:
            # The other groups move alike, up to their limits.
            more = f" (+{counted(len(moved) - 1, 'group')})" if len(moved) > 1 else ""
            parts.append(f"{name} {arrow(*moved[0])}{more}")
    return ", ".join(parts) or "LR and WD as before"


def arrow(before: float, after: float) -> str:
    """Return a value before and after a change; once where it is the same.

    >>> arrow(0.1, 0.05), arrow(0.1, 0.1)
    ('0.1 → 0.05', '0.1')
    """
    return rate(after) if before == after else f"{rate(before)} → {rate(after)}"


def when(stamp: Timestamp) -> str:
    """Return a time in UTC, to the second."""
    return f"{datetime.fromtimestamp(stamp.seconds, timezone.utc):%Y-%m-%d %H:%M:%S}Z"


def facts(run: runs_pb2.Run) -> Iterator[tuple[str, str]]:
    """Yield (what, text) for all that is said of where a run stands."""
    share = f" ({run.progress / run.total:.1%})" if run.total else ""
    yield "progress", f"{run.progress:,} of {run.total:,} {run.unit}{share}"
    if run.stage:
        yield "stage", run.stage
    if run.held:
        yield "held", f"LR and WD are frozen; `lrpilot run release {run.name} --reason …` ends it"
    yield (
        "fixed",
        f"losses below {run.frontier:,} (frontier), values below {run.horizon:,} (horizon), "
        f"delay {run.delay:,}",
    )
    if run.HasField("loss"):
        smoothed = f", smoothed {rate(run.smoothed_loss)}" if run.HasField("smoothed_loss") else ""
        yield "loss", f"{rate(run.loss)}{smoothed}"
    if run.validation_losses:
        yield "validation", _named(run.validation_losses)
    yield (
        "counts",
        f"{counted(run.losses, 'loss')}, {run.nonfinite_losses:,} of them not finite; "
        f"{counted(run.late_losses, 'late loss')}; {counted(run.waivers, 'waiver')}; "
        f"{counted(run.skipped, 'skipped update')}; {counted(run.rollbacks, 'rollback')}",
    )
    if run.attempt:
        yield "attempt", f"{run.attempt:,}, opened at {run.begin:,}"
    if run.imported_from:
        yield "imported", f"from {run.imported_from}: its job goes on here from its checkpoint"
    if run.leader:
        yield "leader mode", _leader_text(run)
    if run.HasField("ranks"):
        yield "ranks", ranks_text(run.ranks)
    yield "created", when(run.created_at)
    yield "updated", f"{when(run.updated_at)}, event {run.seq:,}, log {run.digest[:12]}"
    if run.etag:
        yield "plan", f"etag {run.etag}"


def _facts(run: runs_pb2.Run) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    for what, text in facts(run):
        table.add_row(what, Text(text))
    return table


def ranks_text(ranks: runs_pb2.Ranks) -> str:
    """Return how many ranks asked lately, which one is slowest, and whether any waits.

    >>> lag = runs_pb2.RankLag(rank=3, progress=90, lag=10, asked_s_ago=2.0)
    >>> ranks_text(runs_pb2.Ranks(active=8, waiting=2, blocked_s=1.5, slowest=[lag]))
    '8 asked lately; rank 3 is 10 behind, at 90, 2 s ago; 2 wait, for 1.5 s'
    """
    text = f"{ranks.active:,} asked lately"
    if ranks.slowest and ranks.slowest[0].lag:
        slowest = ranks.slowest[0]
        text += (
            f"; rank {slowest.rank} is {slowest.lag:,} behind, at {slowest.progress:,}, "
            f"{slowest.asked_s_ago:.0f} s ago"
        )
    if ranks.waiting:
        text += f"; {ranks.waiting:,} wait, for {ranks.blocked_s:.1f} s"
    return text


def _leader_text(run: runs_pb2.Run) -> str:
    """Return how far a job may go on alone, and over what it last did."""
    text = "the job may not go on alone yet"
    if run.permitted:
        text = f"the job may go on alone below {run.permitted:,}"
    if run.HasField("declaration"):
        last = run.declaration
        text += (
            f"; it did so for {counted(run.declared_steps, 'step')}, last from {last.begin:,} to "
            f"{last.end - 1:,}"
        )
    return text


def _values_table(run: runs_pb2.Run) -> Table:
    named = any(values.name for values in run.values)
    table = _table()
    for header in ("group",) if named else ():
        table.add_column(header)
    table.add_column("learning rate", justify="right")
    table.add_column("weight decay", justify="right")
    for values in run.values:
        decay = "-"
        if values.HasField("weight_decay"):
            decay = rate(values.weight_decay)
        name = (Text(values.name),) if named else ()
        table.add_row(*name, rate(values.learning_rate), decay)
    return table


def _adjustments_table(adjustments: Sequence[runs_pb2.Adjustment]) -> Table:
    table = _table()
    table.add_column("adjustment", no_wrap=True)
    table.add_column("from", justify="right", no_wrap=True)
    for header in ("what", "effect", "status", "by"):
        table.add_column(header, overflow="fold")
    table.add_column("why", ratio=1)
    for item in adjustments:
        table.add_row(
            item.id,
            f"{item.effective:,}",
            Text(item.summary),
            Text(change_text(item)),
            item.status if item.action != "note" else "-",
            Text(item.author or item.source),
            Text(item.reason),
            style="dim" if item.status in ("forgotten", "undone", "expired") else None,
        )
    return table


def _directives_table(directives: Sequence[runs_pb2.Adjustment]) -> Table:
    table = _table()
    table.add_column("directive", no_wrap=True)
    table.add_column("due", justify="right", no_wrap=True)
    for header in ("what", "outcome", "by"):
        table.add_column(header, overflow="fold")
    table.add_column("why", ratio=1)
    for item in directives:
        table.add_row(
            item.id,
            f"{item.effective:,}",
            Text(item.summary),
            "no answer yet" if item.status == "asked" else item.status,
            Text(item.author or item.source),
            Text(item.reason),
        )
    return table


def _pending(run: str, item: runs_pb2.Adjustment) -> Iterator[Text]:
    yield Text(f"advice {item.id}: {item.summary}, {change_text(item)}", style="bold")
    yield Text(
        f"  approve it while the horizon is below {item.expires:,}: "
        f"lrpilot run approve {run} {item.id}"
    )


def _table() -> Table:
    return Table(box=None, padding=(0, 2, 0, 0), header_style="dim")


def _named(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {rate(value)}" for name, value in sorted(values.items()))


def _losses(losses: Sequence[runs_pb2.LossRecord]) -> str:
    shown = [rate(item.loss) if item.HasField("loss") else "none" for item in losses]
    text = shown[0] if len(shown) == 1 else f"{shown[0]} … {shown[-1]}"
    notes = [
        f"{count:,} {word}"
        for count, word in (
            (sum(item.late for item in losses), "late"),
            (sum(item.skipped for item in losses), "skipped"),
        )
        if count
    ]
    validation: dict[str, float] = {}
    for item in losses:
        validation |= item.validation_losses
    more = f", {_named(validation)}" if validation else ""
    return f"loss {text}" + (f" ({', '.join(notes)})" if notes else "") + more
