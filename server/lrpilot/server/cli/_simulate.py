"""`lrpilot simulate`: recorded losses through the policies of a spec, offline."""

import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer

from lrpilot.core import Adjustment, SimulatedStep
from lrpilot.server._json import json_line
from lrpilot.server.cli._chart import Chart, chart_of_trace
from lrpilot.server.cli._failures import INVALID, CommandError, command
from lrpilot.server.cli._losses import read_losses
from lrpilot.server.cli._options import LossTag, SpecArgument, ValidationTag
from lrpilot.server.cli._output import (
    Format,
    check_picture_target,
    counted,
    encoded,
    format_of,
    needs,
    rate,
    table_lines,
    write_output,
)
from lrpilot.server.cli._specs import chosen_groups, load_spec
from lrpilot.server.cli._trace import Trace, simulated

MAX_VALUES = 10_000_000
"""Most LRs that are held in memory for a picture."""


@command
def simulate(
    source: SpecArgument,
    *,
    losses: Annotated[
        str,
        typer.Option(
            "--losses",
            metavar="FILE",
            help="Recorded losses: CSV or JSONL (- for standard input), or a TensorBoard run, a "
            "folder or an event file.",
        ),
    ],
    group: Annotated[
        str | None,
        typer.Option(
            "--group",
            metavar="NAME",
            help="The LR and WD of this parameter group. Default: the first; pictures have all.",
        ),
    ] = None,
    form: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="Default: what the name of -o FILE ends in, else table; on a terminal terminal, "
            "a picture.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write there instead of to standard output."
        ),
    ] = None,
    log: Annotated[
        bool, typer.Option("--log", help="Pictures: the loss on a logarithmic axis.")
    ] = False,
    tag: LossTag = None,
    val_tag: ValidationTag = None,
) -> None:
    """Replay recorded losses through the policies of a spec: what they would have done, and why.

    The losses stay as they were recorded, although with another LR they would have been others.
    """
    if source == "-" and losses == "-":
        raise typer.BadParameter("SPEC and --losses cannot both be standard input")
    form = form or format_of(output)
    check_picture_target(form, output, "simulation")
    if log and not form.is_picture:
        raise typer.BadParameter("--log is for pictures alone")
    spec = load_spec(source)
    groups = chosen_groups(spec, group)
    rows = read_losses(losses, tag=tag, validation_tag=val_tag)
    if form.is_picture and len(rows) * len(groups) > MAX_VALUES:
        raise CommandError(
            f"a picture of {counted(len(rows), 'loss')} and {counted(len(groups), 'group')} takes "
            f"too many values; at most {MAX_VALUES:,}",
            INVALID,
            hint="choose one group with --group",
        )
    quiet = form is Format.JSONL and output in (None, "-") and sys.stdout.isatty()
    steps = simulated(spec, rows, show_progress=not quiet)
    if form is Format.JSONL:
        write_output(output, encoded(_jsonl(steps, groups[0])))
    elif form.is_picture:
        trace = Trace.of(steps, groups)
        chart = chart_of_trace(spec, groups, trace, log=log)
        if log:
            chart.check_logarithmic()
        if form is Format.TERMINAL:
            _show(chart, trace, log)
        else:
            write_output(output, [_draw(chart, form, log)])
    else:
        trace = Trace.of(steps, groups[:1])
        write_output(output, encoded(f"{line}\n" for line in _table(trace, groups[0])))


def _jsonl(steps: Iterable[SimulatedStep], group: int) -> Iterator[str]:
    for step in steps:
        line: dict[str, Any] = {
            "progress": step.progress,
            "loss": step.loss,
            "lr": step.learning_rates[group],
            "weight_decay": None if step.weight_decays is None else step.weight_decays[group],
            "adjustments": [_shown(item) for item in step.decided if item.mode == "act"],
        }
        advice = [_shown(item) for item in step.decided if item.mode != "act"]
        if advice:
            line["advice"] = advice
        yield f"{json_line(line)}\n"


def _shown(adjustment: Adjustment) -> dict[str, Any]:
    shown = {
        "policy": adjustment.kind,
        "effective": adjustment.effective,
        "reason": adjustment.reason,
        "action": adjustment.change.action,
        "summary": adjustment.summary,
        "source": adjustment.source,
        "id": adjustment.id,
    }
    return shown if adjustment.mode == "act" else {**shown, "mode": adjustment.mode}


def _table(trace: Trace, group: int) -> Iterator[str]:
    if trace.decided:
        rows = [_row(item, group) for item in trace.decided]
        headers = ("loss at", "effective", "policy", "mode", "what", "lr or wd there", "why")
        yield from table_lines(headers, rows, left=len(headers))
        yield ""
    yield _summary(trace)


def _summary(trace: Trace) -> str:
    acts = sum(item.mode == "act" for item in trace.decided)
    advice = len(trace.decided) - acts
    first, last = trace.learning_rates[0][0], trace.learning_rates[-1][0]
    found = f" ({trace.nonfinite:,} not finite)" if trace.nonfinite else ""
    return (
        f"{counted(trace.count, 'loss')}{found}, {counted(acts, 'adjustment')}"
        f"{f', {advice:,} advice' if advice else ''}; "
        f"lr {rate(first)} at {trace.progress[0]:,}, {rate(last)} at {trace.progress[-1]:,}"
    )


def _row(adjustment: Adjustment, group: int) -> tuple[str, ...]:
    before, after = adjustment.before[group], adjustment.after[group]
    there = "" if before == after else f"{rate(before)} -> {rate(after)}"
    if adjustment.decays_before != adjustment.decays_after:
        decays = adjustment.decays_before[group], adjustment.decays_after[group]
        there = " ".join(filter(None, (there, f"wd {rate(decays[0])} -> {rate(decays[1])}")))
    return (
        str(adjustment.decided_at),
        str(adjustment.effective),
        adjustment.kind,
        adjustment.mode,
        adjustment.summary,
        there,
        adjustment.reason,
    )


def _show(chart: Chart, trace: Trace, log: bool) -> None:
    with needs("plotext"):
        # A moment to import, and nothing else needs it.
        from lrpilot.server.cli._terminal import show_chart  # noqa: PLC0415
    show_chart(chart, log=log)
    typer.echo(_summary(trace))


def _draw(chart: Chart, form: Format, log: bool) -> bytes:
    with needs("matplotlib"):
        # A second to import, and nothing else needs it.
        from lrpilot.server.cli._plot_chart import draw_chart  # noqa: PLC0415
    return draw_chart(chart, log=log, form=form.value)
