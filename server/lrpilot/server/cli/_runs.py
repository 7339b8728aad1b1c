"""`lrpilot run …`: everything about the runs on a server."""

from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from typing import Annotated, Any

import typer
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lrpilot.core._errors import InvalidSpec, Violation
from lrpilot.server._documents import load_document
from lrpilot.server.cli._failures import command, invalid_fields
from lrpilot.server.cli._options import (
    CONTEXT,
    SERVER,
    TIMEOUT_S,
    AsJson,
    RunArgument,
    Server,
    SpecArgument,
    TimeoutS,
    examples,
)
from lrpilot.server.cli._output import counted, rate, table_lines, write_json
from lrpilot.server.cli._remote import connected
from lrpilot.server.cli._specs import spec_document
from lrpilot.v1 import runs_pb2

WIDTH = 120
"""Columns of a panel that does not go to a terminal."""

app = typer.Typer(
    name="run",
    help="Create, look at, revise and end the runs of a server.",
    no_args_is_help=True,
    context_settings=CONTEXT,
)

Force = Annotated[bool, typer.Option("--force", help="Although its ranks are active.")]


@app.command(
    epilog=examples(
        "lrpilot run create spec.yaml",
        "lrpilot run create preset:llama3-8b-fp8 --server 10.0.0.7:50051",
        "lrpilot run create - --json < spec.json",
    )
)
@command
def create(
    source: SpecArgument,
    *,
    server: Server = SERVER,
    as_json: AsJson = False,
    timeout_s: TimeoutS = TIMEOUT_S,
) -> None:
    """Create a run from a spec."""
    document = spec_document(source)
    with connected(server, timeout_s) as runs:
        run = runs.create(document)
    if as_json:
        write_json(run_fields(run))
    else:
        typer.echo(f"created {run.name}: {run.total:,} {run.unit}, delay {run.delay:,}")


@app.command("list", epilog=examples("lrpilot run list", "lrpilot run list --json | jq -r .name"))
@command
def list_runs(
    *, server: Server = SERVER, as_json: AsJson = False, timeout_s: TimeoutS = TIMEOUT_S
) -> None:
    """List the runs by name; with --json one line each, without adjustments and spec."""
    headers = ("run", "state", "attempt", "progress", "total", "unit", "lr", "loss", "updated")
    rows: list[Sequence[str]] = []
    with connected(server, timeout_s) as runs:
        for run in runs.list():
            if as_json:
                fields = run_fields(run)
                del fields["adjustments"], fields["spec"]
                write_json(fields)
            else:
                rows.append(_list_row(run))
    if not as_json and not rows:
        typer.echo("no runs")
    elif not as_json:
        for line in table_lines(headers, rows, left=2):
            typer.echo(line)


@app.command(
    epilog=examples("lrpilot run show my-run", "lrpilot run show my-run --json | jq .horizon")
)
@command
def show(
    name: RunArgument,
    *,
    server: Server = SERVER,
    as_json: AsJson = False,
    timeout_s: TimeoutS = TIMEOUT_S,
) -> None:
    """Show where a run stands: progress, values, loss, and the adjustments with their reasons."""
    with connected(server, timeout_s) as runs:
        run = runs.get(name)
    if as_json:
        write_json(run_fields(run))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(_panel(run))


@app.command(
    epilog=examples(
        "lrpilot run history my-run",
        "lrpilot run history my-run --json | jq -c 'select(.kind == \"waived\")'",
    )
)
@command
def history(
    name: RunArgument,
    *,
    server: Server = SERVER,
    as_json: AsJson = False,
    timeout_s: TimeoutS = TIMEOUT_S,
) -> None:
    """Print a run's log from its start: every event, and what was decided on it and why."""
    with connected(server, timeout_s) as runs:
        for event in runs.events(name):
            if as_json:
                write_json(fields_of(event))
            else:
                for line in _event_lines(event):
                    typer.echo(line)


@app.command(epilog=examples("lrpilot run revise spec.yaml", "lrpilot run revise new.yaml --json"))
@command
def revise(
    source: SpecArgument,
    *,
    server: Server = SERVER,
    as_json: AsJson = False,
    timeout_s: TimeoutS = TIMEOUT_S,
) -> None:
    """Give the run that a spec names this spec, from its horizon on."""
    document = spec_document(source)
    # The server checks the spec; all that is needed here is the run to ask it about.
    name = _name_in(document, source)
    with connected(server, timeout_s) as runs:
        answer = runs.revise(name, document)
    if as_json:
        write_json(
            {
                "effective": answer.effective,
                "unchanged": answer.unchanged,
                "run": run_fields(answer.run),
            }
        )
    elif answer.unchanged:
        typer.echo(f"unchanged: {name} has that spec already")
    else:
        typer.echo(f"revised {name}: the new spec shows from progress {answer.effective:,} on")


@app.command(epilog=examples("lrpilot run finish my-run", "lrpilot run finish my-run --force"))
@command
def finish(
    name: RunArgument,
    *,
    force: Force = False,
    server: Server = SERVER,
    as_json: AsJson = False,
    timeout_s: TimeoutS = TIMEOUT_S,
) -> None:
    """End a run: no attempt opens any more, and it becomes read-only."""
    with connected(server, timeout_s) as runs:
        run = runs.finish(name, force=force)
    if as_json:
        write_json(run_fields(run))
    else:
        typer.echo(f"finished {run.name} at progress {run.progress:,} of {run.total:,} {run.unit}")


@app.command(
    epilog=examples("lrpilot run delete my-run", "lrpilot run delete my-run --force --json")
)
@command
def delete(
    name: RunArgument,
    *,
    force: Force = False,
    server: Server = SERVER,
    as_json: AsJson = False,
    timeout_s: TimeoutS = TIMEOUT_S,
) -> None:
    """Remove a run and its log for good."""
    with connected(server, timeout_s) as runs:
        runs.delete(name, force=force)
    if as_json:
        write_json({"deleted": name})
    else:
        typer.echo(f"deleted {name}")


# ---------------------------------------------------------------------------------------------
# As JSON.


def run_fields(run: runs_pb2.Run) -> dict[str, Any]:
    """Return a run as plain data: the fields of the message, with the spec as a mapping."""
    fields = fields_of(run)
    document = fields.pop("spec_document")
    return fields | {
        "state": state_name(run.state),
        "spec": load_document(document) if document else None,
    }


def fields_of(message: Message) -> dict[str, Any]:
    """Return a message as plain data by field name: absent values are None, times RFC 3339."""
    fields: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        # An optional scalar of proto3 stands alone in a oneof.
        optional = field.message_type is not None or field.containing_oneof is not None
        if hasattr(value, "extend"):
            fields[field.name] = [
                fields_of(item) if isinstance(item, Message) else item for item in value
            ]
        elif optional and not message.HasField(field.name):
            fields[field.name] = None
        elif isinstance(value, Timestamp):
            fields[field.name] = value.ToJsonString()
        else:
            fields[field.name] = fields_of(value) if isinstance(value, Message) else value
    return fields


def state_name(state: int) -> str:
    """Return the word for where a run stands.

    >>> state_name(runs_pb2.RUN_STATE_RUNNING)
    'running'
    """
    return str(runs_pb2.RunState.Name(state)).removeprefix("RUN_STATE_").lower()  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------
# For people.


def _list_row(run: runs_pb2.Run) -> Sequence[str]:
    return (
        run.name,
        state_name(run.state),
        str(run.attempt),
        f"{run.progress:,}",
        f"{run.total:,}",
        run.unit,
        rate(run.values[0].learning_rate) if run.values else "-",
        rate(run.loss) if run.HasField("loss") else "-",
        _when(run.updated_at),
    )


def _panel(run: runs_pb2.Run) -> RenderableType:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column()
    share = f" ({run.progress / run.total:.1%})" if run.total else ""
    facts.add_row("progress", f"{run.progress:,} of {run.total:,} {run.unit}{share}")
    facts.add_row(
        "fixed",
        f"losses below {run.frontier:,} (frontier), values below {run.horizon:,} (horizon), "
        f"delay {run.delay:,}",
    )
    if run.HasField("loss"):
        smoothed = f", smoothed {rate(run.smoothed_loss)}" if run.HasField("smoothed_loss") else ""
        facts.add_row("loss", f"{rate(run.loss)}{smoothed}")
    facts.add_row(
        "counts",
        f"{counted(run.losses, 'loss')}, {run.nonfinite_losses:,} of them not finite; "
        f"{counted(run.late_losses, 'late loss')}; {counted(run.waivers, 'waiver')}",
    )
    if run.attempt:
        facts.add_row("attempt", f"{run.attempt:,}, opened at {run.begin:,}")
    facts.add_row("created", _when(run.created_at))
    facts.add_row("updated", f"{_when(run.updated_at)}, event {run.seq:,}, log {run.digest[:12]}")
    parts: list[RenderableType] = [facts, Text(), _values_table(run)]
    if run.adjustments:
        parts += [Text(), _adjustments_table(run.adjustments)]
    return Panel(
        Group(*parts),
        title=Text(run.name, style="bold"),
        title_align="left",
        subtitle=Text(state_name(run.state)),
        subtitle_align="right",
        padding=(0, 1),
    )


def _values_table(run: runs_pb2.Run) -> Table:
    named = any(values.name for values in run.values)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
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
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("from", justify="right")
    table.add_column("by", overflow="fold")
    table.add_column("what", overflow="fold")
    table.add_column("learning rate", overflow="fold")
    table.add_column("why", ratio=1)
    for item in adjustments:
        table.add_row(
            f"{item.effective:,}",
            Text(item.source),
            Text(_action(item)),
            Text(_change(item)),
            Text(item.reason),
            style="dim" if item.forgotten else None,
        )
    return table


def _event_lines(event: runs_pb2.Event) -> Iterator[str]:
    attempt = f"attempt {event.attempt}" if event.attempt else ""
    losses = f"; {_losses(event.losses)}" if event.losses else ""
    yield (
        f"{event.seq:>6}  {_when(event.recorded_at)}  {event.kind:<8}  {attempt:<10}  "
        f"{event.summary}{losses}"
    ).rstrip()
    for item in event.adjustments:
        yield (
            f"        {item.source} at {item.decided_at:,}: {_action(item)} from "
            f"{item.effective:,} on, LR {_change(item)}: {item.reason}"
        )


def _losses(losses: Sequence[runs_pb2.LossRecord]) -> str:
    shown = [rate(item.loss) if item.HasField("loss") else "none" for item in losses]
    late = sum(item.late for item in losses)
    text = shown[0] if len(shown) == 1 else f"{shown[0]} … {shown[-1]}"
    return f"loss {text}" + (f" ({late:,} late)" if late else "")


def _action(item: runs_pb2.Adjustment) -> str:
    action = f"{item.action} by {item.factor:g}" if item.factor else item.action
    notes = [
        note
        for note, holds in (("advice", item.mode == "advise"), ("forgotten", item.forgotten))
        if holds
    ]
    return f"{action} ({', '.join(notes)})" if notes else action


def _change(item: runs_pb2.Adjustment) -> str:
    if not item.before or not item.after:
        return "-"
    # The other groups move by the same factor, up to their limits.
    more = f" (+{counted(len(item.after) - 1, 'group')})" if len(item.after) > 1 else ""
    return f"{rate(item.before[0])} → {rate(item.after[0])}{more}"


def _when(stamp: Timestamp) -> str:
    return f"{datetime.fromtimestamp(stamp.seconds, timezone.utc):%Y-%m-%d %H:%M:%S}Z"


def _name_in(document: str, source: str) -> str:
    try:
        name = load_document(document).get("name")
    except InvalidSpec as error:
        raise invalid_fields(source, error) from None
    if not isinstance(name, str):
        missing = Violation("name", repr(name), "the name of the run to revise")
        raise invalid_fields(source, InvalidSpec("the run spec is invalid", [missing]))
    return name
