"""How commands write: tables of plain text, numbers, JSON, pictures, files."""

import enum
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from lrpilot.server._json import json_line
from lrpilot.server.cli._failures import INVALID, CommandError


class Format(str, enum.Enum):
    """How values over progress are written."""

    TABLE = "table"
    JSONL = "jsonl"
    TERMINAL = "terminal"
    PNG = "png"
    SVG = "svg"

    @property
    def is_file(self) -> bool:
        """Whether it is a picture that only a file can hold."""
        return self in (Format.PNG, Format.SVG)

    @property
    def is_picture(self) -> bool:
        """Whether it is no list of values."""
        return self.is_file or self is Format.TERMINAL


def format_of(output: str | None) -> Format:
    """Return the format that the name of a file ends in, else a table; on a terminal a picture."""
    if output is None:
        return Format.TERMINAL if is_terminal() else Format.TABLE
    suffix = Path(output).suffix.removeprefix(".").lower()
    known = {item.value for item in Format} - {Format.TERMINAL.value}
    return Format(suffix) if suffix in known else Format.TABLE


def picture_form(output: str) -> str:
    """Return `png` or `svg`, as the name of a file ends."""
    form = Path(output).suffix.removeprefix(".").lower()
    if form not in (Format.PNG.value, Format.SVG.value):
        raise typer.BadParameter(f"-o {output}: give a file that ends in .png or .svg")
    return form


def check_picture_target(form: Format, output: str | None, stem: str) -> None:
    """Refuse to write a picture where it cannot be seen."""
    if form is Format.TERMINAL and output is not None:
        raise CommandError(
            "--format terminal goes to standard output: give -o a file of .png or .svg", INVALID
        )
    if form.is_file and output is None and is_terminal():
        raise CommandError(
            f"a picture is nothing for a terminal: give a file, such as -o {stem}.{form.value}",
            INVALID,
        )


@contextmanager
def needs(package: str) -> Iterator[None]:
    """Say what to install where an import in the block fails."""
    try:
        yield
    except ImportError as error:
        raise CommandError(
            f"pictures need {package}: {error}", INVALID, hint="pip install 'lrpilot[server]'"
        ) from None


def encoded(lines: Iterable[str]) -> Iterator[bytes]:
    """Return lines of text as UTF-8."""
    return (line.encode() for line in lines)


def write_output(output: str | None, parts: Iterable[bytes]) -> None:
    """Write to the file `output`, or to standard output where it is None or `-`."""
    if output in (None, "-"):
        sys.stdout.flush()
        sys.stdout.buffer.writelines(parts)
        sys.stdout.buffer.flush()
        return
    try:
        with Path(str(output)).open("wb") as file:
            file.writelines(parts)
    except OSError as error:
        raise CommandError(f"{output}: {error.strerror}", INVALID) from None


def check_output(output: str | None) -> None:
    """Raise CommandError where `write_output` could not write; call it before what has effects."""
    if output in (None, "-"):
        return
    path = Path(str(output))
    was_there = path.exists()
    try:
        # Appending nothing leaves a file that is there as it is.
        path.open("ab").close()
        if not was_there:
            path.unlink()
    except OSError as error:
        raise CommandError(f"{output}: {error.strerror}", INVALID) from None


def write_json(value: Any) -> None:
    """Write one line of JSON; see `json_line`."""
    typer.echo(json_line(value))


def table_lines(
    headers: Sequence[str], rows: Iterable[Sequence[str]], left: int = 0
) -> Iterator[str]:
    """Return the lines of a table: columns fit their widest cell, the first `left` flush left."""
    cells = [headers, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()


def rate(value: float) -> str:
    """Return an LR, a WD or a loss with the digits that people look at."""
    return f"{value:.6g}"


def decimal(value: float) -> str:
    """Return a tick's value; small ones as people write LRs.

    >>> decimal(0.00015), decimal(0.25), decimal(0.0)
    ('1.5e-4', '0.25', '0')
    """
    if not 0 < abs(value) < 1e-2:
        return f"{value:.4g}"
    digits, _, power = f"{value:.3e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def short(value: float) -> str:
    """Return a progress at a tick.

    >>> short(500), short(250_000), short(1_500_000)
    ('500', '250K', '1.5M')
    """
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'K' else size):.4g}{letter}"
    return f"{value:.4g}"


def counted(number: int, noun: str) -> str:
    """Return a number and its noun, in the plural unless it is one.

    >>> counted(1, "loss"), counted(1200, "waiver")
    ('1 loss', '1,200 waivers')
    """
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def group_text(names: Sequence[str]) -> str:
    """Return the names of parameter groups that are shown as one.

    >>> group_text(["a"]), group_text(["a", "b", "c", "d", "e"])
    ('a', 'a, b, c and 2 more')
    """
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def is_terminal() -> bool:
    """Return whether standard output goes to a person."""
    return sys.stdout.isatty()
