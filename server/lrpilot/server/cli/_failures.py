"""How a command ends: its exit code, and one block of text on stderr when it failed."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import ParamSpec

import typer

from lrpilot.core._errors import InvalidFields

REFUSED = 1
"""The server refused the call or does not know the run; `serve`: it could not start."""
INVALID = 2
"""A wrong command line, or an invalid document."""
UNREACHABLE = 3
"""No answer from the server."""
INTERRUPTED = 130
"""Ctrl-C; what shells say of a program that SIGINT ended."""
BROKEN_PIPE = 141
"""The reader of the output left; what shells say of a program that SIGPIPE ended."""

P = ParamSpec("P")


class CommandError(Exception):
    """What went wrong, for people: one line, more lines below it, and what to do about it."""

    def __init__(
        self,
        message: str,
        code: int,
        *,
        lines: Sequence[str] = (),
        hint: str | None = None,
        reason: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.lines = tuple(lines)
        self.hint = hint
        self.reason = reason
        """Name of the server's error, such as RunNotFound; empty: it gave none."""


def invalid_fields(what: str, error: InvalidFields) -> CommandError:
    """Return the failure that names every violation in `what`, such as a file."""
    message, *lines = str(error).splitlines()
    return CommandError(f"{what}: {message}", INVALID, lines=[line.strip() for line in lines])


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Turn the failures of a command into its exit code and a text on stderr."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
            # A pipe that broke shows here, not when the interpreter has nobody to tell any more.
            sys.stdout.flush()
        except CommandError as error:
            _show(error)
            raise typer.Exit(error.code) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # What is still buffered has to go somewhere when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from None

    return run


def _show(error: CommandError) -> None:
    typer.echo(f"{typer.style('error:', fg='red', bold=True)} {error.message}", err=True)
    for line in error.lines:
        typer.echo(f"  {line}", err=True)
    if error.hint is not None:
        typer.echo(f"{typer.style('hint:', bold=True)} {error.hint}", err=True)
