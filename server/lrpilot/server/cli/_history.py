"""`lrpilot run history`: a run's log as text for people, as events, or as a table for pandas."""

import enum
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, BinaryIO

import typer
from rich.progress import Progress

from lrpilot.server._json import fields_of, json_line
from lrpilot.server.cli._failures import INVALID, CommandError, command
from lrpilot.server.cli._options import SERVER, TIMEOUT_S, AsJson, RunArgument, Server, TimeoutS
from lrpilot.server.cli._output import is_terminal
from lrpilot.server.cli._remote import Runs, connected
from lrpilot.server.cli._show import event_lines
from lrpilot.server.cli._table import Writer, write_csv, write_jsonl
from lrpilot.server.cli._transfer import TIMEOUT_S as LOG_TIMEOUT_S
from lrpilot.server.cli._transfer import progress_bar, whole_file

_PART_BYTES = 16 * 1024
"""Bytes of a packed log that are read between two looks of the progress bar: thousands of steps."""


class HistoryFormat(str, enum.Enum):
    """How a log is written."""

    TEXT = "text"
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"


@command
def history(
    name: RunArgument,
    *,
    form: Annotated[
        HistoryFormat | None,
        typer.Option(
            "--format",
            help="Text for people, or one flat table for pandas. "
            "Default: what the name of FILE ends in, else text.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write there, - for standard output, instead of to standard output.",
        ),
    ] = None,
    server: Server = SERVER,
    as_json: AsJson = False,
    timeout_s: TimeoutS = TIMEOUT_S,
) -> None:
    """Print a run's log from its start: every event, and what was decided on it and why.

    With --format jsonl, csv or parquet it is a table: a row for each loss with the LR and WD that
    its step used, each decision and each other event. With --json each event is as the server has
    it.
    """
    if as_json and form is not None:
        raise typer.BadParameter("--format and --json exclude each other")
    if as_json and _format_of(output) in {HistoryFormat.CSV, HistoryFormat.PARQUET}:
        raise typer.BadParameter(f"--json writes events, and {output} is called like a table")
    form = form or (HistoryFormat.TEXT if as_json else _format_of(output))
    target = output or "-"
    if form is HistoryFormat.TEXT:
        with connected(server, timeout_s) as runs, whole_file(target) as file:
            for line in _lines(runs, name, as_json=as_json):
                file.write(line.encode() + b"\n")
        return
    if form is HistoryFormat.PARQUET and target == "-" and is_terminal():
        raise CommandError(
            f"Parquet is nothing for a terminal: give a file, such as -o {name}.parquet", INVALID
        )
    write = _writer(form)
    # It takes the server's own fold, which the other commands do without.
    from lrpilot.server.cli._history_table import HistoryTable, fold_log  # noqa: PLC0415

    with (
        tempfile.TemporaryFile() as log,
        tempfile.TemporaryFile() as rows,
        whole_file(target) as file,
        progress_bar() as bar,
    ):
        table = HistoryTable(rows)
        with _scratch_errors():
            _fetch(name, server, timeout_s, log, bar)
            state = fold_log(name, _parts(name, log, bar), table)
        written = bar.track(
            table.rows(state), total=table.count, description=f"write {name}", update_period=1.0
        )
        write(file, table.columns, written)


def _format_of(output: str | None) -> HistoryFormat:
    suffix = Path(output or "").suffix.removeprefix(".").lower()
    known = {item.value: item for item in HistoryFormat}
    return known.get(suffix, HistoryFormat.TEXT)


def _lines(runs: Runs, name: str, *, as_json: bool) -> Iterator[str]:
    for event in runs.events(name):
        if as_json:
            yield json_line(fields_of(event))
        else:
            yield from event_lines(event)


@contextmanager
def _scratch_errors() -> Iterator[None]:
    """Say where there was no room for what is written between reading and writing a table."""
    try:
        yield
    except OSError as error:
        raise CommandError(
            f"{tempfile.gettempdir()}: {error.strerror}",
            INVALID,
            hint="TMPDIR says where there is room for the log, unpacked once",
        ) from None


def _fetch(name: str, server: str, timeout_s: float, log: BinaryIO, bar: Progress) -> None:
    """Write a run's log into `log`, as `run export` does."""
    with connected(server, timeout_s) as runs:
        # Whether the server answers, and knows the run, is not worth the wait for a whole log.
        runs.get(name)
    with connected(server, max(timeout_s, LOG_TIMEOUT_S)) as runs:
        parts = runs.export(name, force=True)
        task = bar.add_task(f"fetch {name}", total=next(parts).total_events)
        for part in parts:
            log.write(part.data)
            bar.update(task, completed=part.events)


def _parts(name: str, log: BinaryIO, bar: Progress) -> Iterator[bytes]:
    task = bar.add_task(f"read {name}", total=log.tell())
    log.seek(0)
    while data := log.read(_PART_BYTES):
        yield data
        bar.advance(task, len(data))


def _writer(form: HistoryFormat) -> Writer:
    if form is not HistoryFormat.PARQUET:
        return write_csv if form is HistoryFormat.CSV else write_jsonl
    try:
        # Its package is optional.
        from lrpilot.server.cli._parquet import write_parquet  # noqa: PLC0415
    except ImportError as error:
        raise CommandError(
            f"Parquet needs pyarrow: {error}", INVALID, hint="pip install 'lrpilot[parquet]'"
        ) from None
    return write_parquet
