"""`lrpilot run …`: everything about the runs on a server."""

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from lrpilot.server.cli._chart import chart_of_run
from lrpilot.server.cli._failures import command
from lrpilot.server.cli._history import history
from lrpilot.server.cli._messages import run_fields
from lrpilot.server.cli._operate import COMMANDS
from lrpilot.server.cli._options import (
    CONTEXT,
    SERVER,
    TIMEOUT_S,
    AsJson,
    Force,
    RunArgument,
    Server,
    SpecArgument,
    TimeoutS,
    examples,
)
from lrpilot.server.cli._output import (
    check_output,
    is_terminal,
    needs,
    picture_form,
    table_lines,
    write_json,
    write_output,
)
from lrpilot.server.cli._remote import connected
from lrpilot.server.cli._show import LIST_HEADERS, list_row, panel
from lrpilot.server.cli._specs import spec_document
from lrpilot.server.cli._transfer import export, import_
from lrpilot.server.cli._watch import watch
from lrpilot.v1 import runs_pb2

WIDTH = 120
"""Columns of a panel that does not go to a terminal."""

app = typer.Typer(
    name="run",
    help="Create, look at, change, move and end the runs of a server.",
    no_args_is_help=True,
    context_settings=CONTEXT,
)


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
    rows: list[Sequence[str]] = []
    with connected(server, timeout_s) as runs:
        for run in runs.list():
            if as_json:
                fields = run_fields(run)
                del fields["adjustments"], fields["spec"]
                write_json(fields)
            else:
                rows.append(list_row(run))
    if not as_json and not rows:
        typer.echo("no runs")
    elif not as_json:
        for line in table_lines(LIST_HEADERS, rows, left=2):
            typer.echo(line)


@app.command(
    epilog=examples(
        "lrpilot run show my-run",
        "lrpilot run show my-run -o my-run.png",
        "lrpilot run show my-run --json | jq .horizon",
    )
)
@command
def show(
    name: RunArgument,
    *,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Draw it into FILE, which ends in .png or .svg, and not on the terminal.",
        ),
    ] = None,
    log: Annotated[
        bool, typer.Option("--log", help="Pictures: the loss on a logarithmic axis.")
    ] = False,
    server: Server = SERVER,
    as_json: AsJson = False,
    timeout_s: TimeoutS = TIMEOUT_S,
) -> None:
    """Show where a run stands: progress, values, loss, and the adjustments with their reasons.

    On a terminal its losses, LR and WD are drawn below.
    """
    form = None if output is None else picture_form(output)
    check_output(output)
    is_drawn = form is None and is_terminal() and not as_json
    if log and form is None and not is_drawn:
        raise typer.BadParameter("--log is for pictures alone")
    chart = None
    with connected(server, timeout_s) as runs:
        run = runs.get(name)
        if form is not None or is_drawn:
            chart = chart_of_run(run, runs.curves(runs_pb2.GetCurvesRequest(run=name)))
    if as_json:
        write_json(run_fields(run))
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = WIDTH
        console.print(panel(run))
    if chart is None:
        return
    if log:
        chart.check_logarithmic()
    if form is None:
        with needs("plotext"):
            # A moment to import, and nothing else needs it.
            from lrpilot.server.cli._terminal import show_chart  # noqa: PLC0415
        show_chart(chart, log=log)
    else:
        with needs("matplotlib"):
            # A second to import, likewise.
            from lrpilot.server.cli._plot_chart import draw_chart  # noqa: PLC0415
        write_output(output, [draw_chart(chart, log=log, form=form)])


app.command(
    epilog=examples(
        "lrpilot run watch my-run",
        "lrpilot run watch my-run --log --group embedding",
        "lrpilot run watch --server 10.0.0.7:50051",
    )
)(watch)
app.command(
    epilog=examples(
        "lrpilot run history my-run",
        "lrpilot run history my-run --json | jq -c 'select(.kind == \"waived\")'",
        "lrpilot run history my-run -o my-run.parquet",
    )
)(history)
for _function, _epilog in COMMANDS:
    app.command(epilog=_epilog)(_function)


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


app.command(
    epilog=examples(
        "lrpilot run export my-run",
        "lrpilot run export my-run -o - | zcat | jq -c .payload.kind",
    )
)(export)
app.command(
    "import",
    epilog=examples(
        "lrpilot run import my-run.jsonl.gz --server 10.0.0.8:50051 --reason 'a new cluster'"
    ),
)(import_)
