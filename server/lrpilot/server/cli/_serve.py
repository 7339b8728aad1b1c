"""`lrpilot serve`: the server, started."""

import asyncio
import enum
import logging
import math
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit, urlunsplit

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lrpilot.core._errors import InvalidSpec, Violation
from lrpilot.server._documents import load_document
from lrpilot.server.cli._failures import INVALID, REFUSED, CommandError, command, invalid_fields
from lrpilot.server.cli._logs import LogFormat, write_logs
from lrpilot.server.cli._options import SERVER, address, read_address
from lrpilot.server.cli._specs import read_text

logger = logging.getLogger("lrpilot.server")

HTTP = "127.0.0.1:50052"
"""Where the page, metrics and probes are served unless told otherwise."""


class LogLevel(str, enum.Enum):
    """From which severity on lines are logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Settings(BaseModel):
    """What a configuration file may say; the names are those of the options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path = Path("lrpilot-data")
    """Folder of the database and its lock."""
    store: str | None = None
    """URL of the event log; None: SQLite in `data`."""
    listen: str = SERVER
    """HOST:PORT for gRPC; port 0: the kernel picks."""
    http: str | None = HTTP
    """HOST:PORT for the page, metrics and probes; None: not served."""
    insecure: bool = Field(default=False, strict=True)
    """Whether to listen beyond loopback although nothing is encrypted."""
    keep_finished: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Days that finished runs are kept after their last event; None: for ever."""
    log_level: LogLevel = LogLevel.INFO
    """From which severity on lines are logged, to stderr."""
    log_format: LogFormat = LogFormat.HUMAN
    """How lines are logged."""
    traces: str | None = None
    """URL of the collector that gets traces; None: none does."""

    @field_validator("listen", "http")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        return None if value is None else address(value)

    @field_validator("traces")
    @classmethod
    def _collector(cls, value: str | None) -> str | None:
        return None if value is None else collector(value)


def collector(text: str) -> str:
    """Return the whole URL of a collector; where it has no path, the one for traces is added.

    Raises ValueError.

    >>> collector("http://127.0.0.1:4318"), collector("https://o11y.example/otlp/v1/traces")
    ('http://127.0.0.1:4318/v1/traces', 'https://o11y.example/otlp/v1/traces')
    """
    wanted = "a URL such as http://127.0.0.1:4318"
    try:
        url = urlsplit(text)
        is_url = url.scheme in {"http", "https"} and bool(url.hostname) and url.port != 0
    except ValueError:
        raise ValueError(wanted) from None
    if not is_url:
        raise ValueError(wanted)
    return text if url.path.strip("/") else urlunsplit(url._replace(path="/v1/traces"))


def _read_collector(value: str | None) -> str | None:
    try:
        return None if value is None else collector(value)
    except ValueError as error:
        raise typer.BadParameter(f"{value!r} is not {error}") from None


def _read_days(value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value:g} is no number of days above 0; never: leave it out")
    return value


@command
def serve(
    *,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="A YAML file with the options below by name; options given here win.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="DIR", help="Folder of the database and its lock. [./lrpilot-data]"
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            metavar="URL",
            help="Event log, such as postgresql+psycopg://USER@HOST/DATABASE, which several "
            "servers may share. [SQLite in the data folder]",
        ),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            "--listen",
            metavar="HOST:PORT",
            callback=read_address,
            help=f"Where gRPC is served; port 0: the kernel picks. [{SERVER}]",
        ),
    ] = None,
    http: Annotated[
        str | None,
        typer.Option(
            "--http",
            metavar="HOST:PORT",
            callback=read_address,
            help=f"Where the page, metrics and probes are served. [{HTTP}]",
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Listen beyond loopback although nothing is encrypted."),
    ] = False,
    keep_finished: Annotated[
        float | None,
        typer.Option(
            "--keep-finished",
            metavar="DAYS",
            callback=_read_days,
            help="Delete finished runs so long after their last event. [never]",
        ),
    ] = None,
    log_level: Annotated[
        LogLevel | None,
        typer.Option("--log-level", help="From which severity on lines are logged. [info]"),
    ] = None,
    log_format: Annotated[
        LogFormat | None,
        typer.Option("--log-format", help="Lines for people, or a JSON object each. [human]"),
    ] = None,
    traces: Annotated[
        str | None,
        typer.Option(
            "--traces",
            metavar="URL",
            callback=_read_collector,
            help="OpenTelemetry collector that gets traces over OTLP/HTTP, such as "
            "http://127.0.0.1:4318. [none]",
        ),
    ] = None,
) -> None:
    """Run the server until SIGTERM or Ctrl-C.

    Writes one line to standard output once it serves: lrpilot ready grpc=HOST:PORT
    http=HOST:PORT. Logs go to standard error.
    """
    settings = read_settings(config) if config is not None else Settings()
    given = {
        "data": data,
        "store": store,
        "listen": listen,
        "http": http,
        "keep_finished": keep_finished,
        "log_level": log_level,
        "log_format": log_format,
        "traces": traces,
    }
    settings = settings.model_copy(
        update={name: value for name, value in given.items() if value is not None}
        | ({"insecure": True} if insecure else {})
    )
    write_logs(settings.log_level.value.upper(), settings.log_format)
    # The server and its database layer take a second to import, which other commands need not.
    from lrpilot.server import _app  # noqa: PLC0415

    server_config = _app.ServerConfig(
        data=settings.data,
        store=settings.store,
        listen=settings.listen,
        http=settings.http,
        insecure=settings.insecure,
        keep_finished_days=settings.keep_finished,
        traces=settings.traces,
    )
    try:
        asyncio.run(_app.serve(server_config))
    except _app.StartupError as error:
        if settings.log_format is LogFormat.JSON:
            logger.critical("cannot start: %s", error)
            raise typer.Exit(REFUSED) from None
        message, *lines = str(error).splitlines() or ["the server cannot start"]
        raise CommandError(message, REFUSED, lines=lines) from None
    except Exception as error:
        if settings.log_format is LogFormat.HUMAN or isinstance(error, BrokenPipeError):
            raise
        logger.critical("the server ends, which nobody foresaw", exc_info=True)
        raise typer.Exit(REFUSED) from None


def read_settings(source: str) -> Settings:
    """Return the settings in a configuration file; CommandError names all that is wrong."""
    try:
        return Settings.model_validate(load_document(read_text(source)))
    except InvalidSpec as error:
        raise invalid_fields(source, error) from None
    except ValidationError as error:
        lines = [str(_violation(detail)) for detail in error.errors(include_url=False)]
        raise CommandError(
            f"{source}: the configuration is invalid", INVALID, lines=lines
        ) from None


def _violation(detail: Any) -> Violation:
    field = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        allowed = f"one of {', '.join(Settings.model_fields)}"
    else:
        allowed = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    # The address of a store may hold a password.
    got = type(detail["input"]).__name__ if field == "store" else repr(detail["input"])
    return Violation(field, got, allowed)
