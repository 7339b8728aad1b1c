"""`lrpilot curve`: the base schedule of a spec, offline."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated

import typer

from lrpilot.core._schedules import base_schedule
from lrpilot.core._spec import RunSpec
from lrpilot.server.cli._chart import Chart, chart_of_spec
from lrpilot.server.cli._failures import INVALID, CommandError, command
from lrpilot.server.cli._options import SpecArgument
from lrpilot.server.cli._output import (
    Format,
    check_picture_target,
    encoded,
    format_of,
    needs,
    rate,
    table_lines,
    write_output,
)
from lrpilot.server.cli._specs import chosen_groups, load_spec

LARGEST = 2**63 - 1
"""Progress is an int64 on the wire."""

ROWS = 50
"""About as many rows as are shown unless told otherwise."""

MAX_VALUES = 1_000_000
"""Most LRs that are held in memory, for a table or a picture."""


def _read_positions(text: str | None) -> list[int] | None:
    if text is None:
        return None
    positions = []
    for part in text.split(","):
        digits = part.strip()
        if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
            raise typer.BadParameter(f"{part!r} is no progress: non-negative integers are")
        if int(digits) > LARGEST:
            raise typer.BadParameter(f"{digits} is above the largest progress, {LARGEST}")
        positions.append(int(digits))
    return positions


@command
def curve(
    source: SpecArgument,
    *,
    at: Annotated[
        str | None,
        typer.Option(
            "--at", metavar="N,N,…", help="Only these progresses, in the order in which they stand."
        ),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            "--every",
            metavar="K",
            min=1,
            max=LARGEST,
            help="Every K of progress from 0, and the total. Default: some 50 rows; a picture "
            "takes as many points as its curves need.",
        ),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(
            "--group",
            metavar="NAME",
            help="Only this parameter group. Default: all; jsonl has the first.",
        ),
    ] = None,
    form: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="Default: what the name of FILE ends in, else table; on a terminal terminal, a "
            "picture, unless --at or --every asks for rows.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write there instead of to standard output."
        ),
    ] = None,
) -> None:
    """Show the base schedule of a spec: LR and WD before any policy or operator, offline."""
    positions = _read_positions(at)
    if positions is not None and every is not None:
        raise typer.BadParameter("--at and --every exclude each other")
    if form is None:
        form = format_of(output)
        if form is Format.TERMINAL and (positions is not None or every is not None):
            form = Format.TABLE
    check_picture_target(form, output, "curve")
    spec = load_spec(source)
    groups = chosen_groups(spec, group)
    if form is Format.JSONL:
        one_by_one = _every(spec.total, every) if positions is None else positions
        write_output(output, encoded(_jsonl(spec, groups[0], one_by_one)))
        return
    if positions is None and (every is not None or not form.is_picture):
        positions = _held(spec.total, every, len(groups))
    if form.is_picture:
        chart = chart_of_spec(spec, groups, positions)
    if form is Format.TERMINAL:
        _show(chart)
    elif form.is_file:
        write_output(output, [_draw(chart, form)])
    else:
        write_output(output, encoded(_table(spec, groups, positions or [])))


def _every(total: int, step: int | None) -> Iterator[int]:
    yield from range(0, total, step or max(1, total // ROWS))
    yield total


def _held(total: int, step: int | None, groups: int) -> list[int]:
    if step is not None and total // step * groups > MAX_VALUES:
        raise CommandError(
            f"--every {step} gives {total // step * groups:,} values; a table or a picture takes "
            f"at most {MAX_VALUES:,}",
            INVALID,
            hint="use a larger K, or --format jsonl, which has no limit",
        )
    return list(_every(total, step))


def _jsonl(spec: RunSpec, group: int, positions: Iterable[int]) -> Iterator[str]:
    values = base_schedule(spec)
    for progress in positions:
        lr, decay = values(progress)[group]
        line = {"progress": progress, "lr": lr, "weight_decay": decay}
        yield f"{json.dumps(line, allow_nan=False)}\n"


def _table(spec: RunSpec, groups: Sequence[int], positions: Iterable[int]) -> Iterator[str]:
    values, stage = base_schedule(spec), _stage_name(spec)
    names = [spec.group_names[index] for index in groups]
    decayed = spec.has_weight_decay
    headers = ["progress"]
    headers += ["stage"] if spec.stages else []
    for what in ("lr", "weight_decay") if decayed else ("lr",):
        headers += [f"{what}[{name}]" if spec.groups else what for name in names]
    rows = []
    for progress in positions:
        row = [str(progress)]
        row += [stage(progress)] if spec.stages else []
        at = values(progress)
        row += [rate(at[index][0]) for index in groups]
        row += [rate(at[index][1] or 0.0) for index in groups] if decayed else []
        rows.append(row)
    for line in table_lines(headers, rows):
        yield f"{line}\n"


def _stage_name(spec: RunSpec) -> Callable[[int], str]:
    def name(progress: int) -> str:
        for stage in spec.stages[:-1]:
            if stage.until is not None and progress < stage.until:
                return stage.name
        return spec.stages[-1].name

    return name


def _show(chart: Chart) -> None:
    with needs("plotext"):
        # A moment to import, and nothing else needs it.
        from lrpilot.server.cli._terminal import show_chart  # noqa: PLC0415
    show_chart(chart, losses=False)


def _draw(chart: Chart, form: Format) -> bytes:
    with needs("matplotlib"):
        # A second to import, and nothing else needs it.
        from lrpilot.server.cli._plot import draw_curve  # noqa: PLC0415
    return draw_curve(chart, form.value)
