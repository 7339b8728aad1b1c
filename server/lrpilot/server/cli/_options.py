"""Arguments and options that several commands share, and how they are read."""

import math
import re
from typing import Annotated

import typer

_ADDRESS = re.compile(r"(?P<host>\[[^\s\[\]/]+\]|[^\s:/\[\]]+):(?P<port>[0-9]{1,5})")

CONTEXT = {"help_option_names": ["-h", "--help"]}
"""Settings of every group of commands."""


def address(text: str) -> str:
    """Return HOST:PORT as given; ValueError if it is none. An IPv6 host stands in brackets.

    >>> address("[::1]:0")
    '[::1]:0'
    """
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match["port"]) > 65535:
        raise ValueError(f"{text!r} is no HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051")
    return text


def read_address(text: str | None) -> str | None:
    """Read HOST:PORT from the command line."""
    if text is None:
        return None
    try:
        return address(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _read_timeout(value: float) -> float:
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is no number of seconds above 0")
    return value


SpecArgument = Annotated[
    str,
    typer.Argument(
        metavar="SPEC",
        help="A run spec: a YAML or JSON file, - for standard input, or preset:NAME.",
    ),
]
LossTag = Annotated[
    str | None,
    typer.Option(
        "--tag",
        metavar="TAG",
        help="TensorBoard: the scalar that is the loss. Default: the one called like a loss.",
    ),
]
ValidationTag = Annotated[
    str | None,
    typer.Option(
        "--val-tag",
        metavar="TAG",
        help="TensorBoard: the scalar that is the validation loss, to the policies val_loss.",
    ),
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")]
Server = Annotated[
    str,
    typer.Option(
        "--server",
        metavar="HOST:PORT",
        envvar="LRPILOT_SERVER",
        callback=read_address,
        help="Where the server listens.",
    ),
]
TimeoutS = Annotated[
    float,
    typer.Option(
        "--timeout-s",
        metavar="SECONDS",
        callback=_read_timeout,
        help="Longest wait for each answer of the server.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Although its ranks are active.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON instead of text for people.")]

SERVER = "127.0.0.1:50051"
"""Where a server listens unless told otherwise."""
TIMEOUT_S = 10.0


def examples(*lines: str) -> str:
    """Return the examples of a command as an epilog."""
    return "\n\n".join(("Examples:", *(f"  {line}" for line in lines)))
