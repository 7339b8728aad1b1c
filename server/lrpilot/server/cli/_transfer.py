"""`lrpilot run export` and `lrpilot run import`: a whole run as one file, and back."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, BinaryIO

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lrpilot.server._author import caller
from lrpilot.server._json import json_line
from lrpilot.server.cli._failures import INVALID, CommandError, command
from lrpilot.server.cli._messages import run_fields
from lrpilot.server.cli._operate import Author
from lrpilot.server.cli._options import SERVER, AsJson, Force, RunArgument, Server, TimeoutS
from lrpilot.server.cli._output import counted, is_terminal, write_json
from lrpilot.server.cli._remote import connected
from lrpilot.v1 import runs_pb2

TIMEOUT_S = 900.0
"""The whole transfer; a server takes no longer either."""

PART_BYTES = 256 * 1024

Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Where to write it, - for standard output. [RUN.jsonl.gz]",
    ),
]
FileArgument = Annotated[
    str,
    typer.Argument(metavar="FILE", help="A file of `run export`, or - for standard input."),
]
Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why, for the log.")]


@command
def export(
    name: RunArgument,
    *,
    output: Output = None,
    force: Force = False,
    server: Server = SERVER,
    as_json: AsJson = False,
    timeout_s: TimeoutS = TIMEOUT_S,
) -> None:
    """Write a run's whole log into one file, for a backup or another server."""
    target = f"{name}.jsonl.gz" if output is None else output
    if target == "-" and is_terminal():
        raise CommandError("a packed log is nothing for a terminal: give -o FILE", INVALID)
    written = 0
    with (
        whole_file(target) as file,
        progress_bar() as progress,
        connected(server, timeout_s) as runs,
    ):
        parts = runs.export(name, force=force)
        head = next(parts)
        bar = progress.add_task(f"export {name}", total=head.total_events)
        for part in parts:
            file.write(part.data)
            written += len(part.data)
            progress.update(bar, completed=part.events)
    if as_json:
        summary = json_line(
            {
                "run": name,
                "file": target,
                "bytes": written,
                "events": head.total_events,
                "digest": head.digest,
                "active": head.active,
            }
        )
    else:
        summary = f"exported {name}: {counted(head.total_events, 'event')}, {decimal(written)}"
        summary += "" if target == "-" else f", to {target}"
        if head.active:
            summary += "\nits ranks are active: what they do from now on is not in the file"
    # Standard output may have the file.
    typer.echo(summary, err=target == "-")


@command
def import_(
    source: FileArgument,
    *,
    reason: Reason = "",
    author: Author = None,
    server: Server = SERVER,
    as_json: AsJson = False,
    timeout_s: TimeoutS = TIMEOUT_S,
) -> None:
    """Take over a run from a file of `run export`: all of it or nothing.

    The attempts in it have ended here. Its job goes on when it is started from its checkpoint.
    """
    first = runs_pb2.ImportRunRequest(reason=reason, author=caller() if author is None else author)
    failed: list[OSError] = []
    with ExitStack() as stack:
        file = stack.enter_context(_read(source))
        progress = stack.enter_context(progress_bar())
        # Of a pipe nobody knows how long it is.
        size = os.fstat(file.fileno()).st_size if source != "-" else None
        bar = progress.add_task(f"import {source}", total=size or None)

        def parts() -> Iterator[runs_pb2.ImportRunRequest]:
            yield first
            try:
                while data := file.read(PART_BYTES):
                    yield runs_pb2.ImportRunRequest(data=data)
                    progress.advance(bar, len(data))
            except OSError as error:
                # The server finds the file cut off; here is why.
                failed.append(error)

        runs = stack.enter_context(connected(server, timeout_s))
        try:
            answer = runs.import_(first, parts())
        except CommandError:
            if failed:
                raise CommandError(f"{source}: {failed[0].strerror}", INVALID) from None
            raise
    name, events = answer.run.name, counted(answer.events, "event")
    if as_json:
        write_json(
            {
                "run": run_fields(answer.run),
                "events": answer.events,
                "unchanged": answer.unchanged,
            }
        )
    elif answer.unchanged:
        typer.echo(f"unchanged: {name}: it is here already, with the file's {events}")
    else:
        typer.echo(f"imported {name}: {events}; its job goes on from its checkpoint")


def progress_bar() -> Progress:
    """Return a bar on standard error, where that is a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextmanager
def whole_file(target: str) -> Iterator[BinaryIO]:
    """Yield a file that gets its name once the block has written all of it, and else is gone.

    `-` is standard output. A device or a pipe is written to as it is: nothing may take the place
    of /dev/null. Raises CommandError.
    """
    if target == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    # What a link leads to is written, and the link stays.
    path = Path(target).resolve()
    if path.exists() and not path.is_file():
        try:
            with path.open("wb") as file:
                yield file
        except OSError as error:
            raise CommandError(f"{target}: {error.strerror}", INVALID) from None
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise CommandError(f"{target}: {error.strerror}", INVALID) from None
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _read(source: str) -> Iterator[BinaryIO]:
    if source == "-":
        yield sys.stdin.buffer
        return
    try:
        with Path(source).open("rb") as file:
            yield file
    except OSError as error:
        raise CommandError(f"{source}: {error.strerror}", INVALID) from None
