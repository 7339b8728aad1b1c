"""`lrpilot serve`: which configuration reaches the server, and what is refused before it."""

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import Result

import lrpilot.server

Cli = Callable[..., Result]
SpecFile = Callable[..., str]


@dataclass(frozen=True, kw_only=True)
class Config:
    """As ServerConfig."""

    data: Path
    store: str | None
    listen: str
    http: str | None
    insecure: bool
    keep_finished_days: float | None
    traces: str | None


class StartupFailedError(Exception):
    """As StartupError."""


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server that only remembers its configuration."""
    fake: Any = ModuleType("lrpilot.server._app")
    fake.served = []
    fake.failure = None

    async def serve(config: Config) -> None:
        if fake.failure is not None:
            raise fake.failure
        fake.served.append(config)

    fake.ServerConfig, fake.StartupError, fake.serve = Config, StartupFailedError, serve
    monkeypatch.setitem(sys.modules, "lrpilot.server._app", fake)
    monkeypatch.setattr(lrpilot.server, "_app", fake, raising=False)
    root = logging.getLogger()
    handlers, level, hook = root.handlers[:], root.level, threading.excepthook
    yield fake
    logging.captureWarnings(False)
    root.handlers[:], threading.excepthook = handlers, hook
    root.setLevel(level)


def test_the_defaults_are_loopback_and_a_folder_here(cli: Cli, app: Any) -> None:
    result = cli("serve")
    assert (result.exit_code, result.output) == (0, "")
    assert app.served == [
        Config(
            data=Path("lrpilot-data"),
            store=None,
            listen="127.0.0.1:50051",
            http="127.0.0.1:50052",
            insecure=False,
            keep_finished_days=None,
            traces=None,
        )
    ]


def test_every_option_reaches_the_server(cli: Cli, app: Any) -> None:
    result = cli(
        "serve", "--data", "d", "--store", "sqlite:///x", "--listen", "0.0.0.0:0",
        "--http", "[::]:0", "--insecure", "--log-level", "debug",
        "--keep-finished", "30.5", "--log-format", "json",
        "--traces", "http://127.0.0.1:4318",
    )  # fmt: skip
    assert (result.exit_code, result.stdout) == (0, "")
    assert app.served == [
        Config(
            data=Path("d"),
            store="sqlite:///x",
            listen="0.0.0.0:0",
            http="[::]:0",
            insecure=True,
            keep_finished_days=30.5,
            traces="http://127.0.0.1:4318/v1/traces",
        )
    ]
    assert logging.getLogger().level == logging.DEBUG


FILE = """
data: /var/lib/lrpilot
store: sqlite:////var/lib/lrpilot/other.db
listen: 127.0.0.1:1234
http: null
insecure: true
keep_finished: 90
log_level: error
log_format: json
traces: https://o11y.example/otlp/v1/traces
"""


def test_a_file_says_the_same(cli: Cli, app: Any, spec_file: SpecFile) -> None:
    assert cli("serve", "--config", spec_file(FILE)).exit_code == 0
    assert app.served == [
        Config(
            data=Path("/var/lib/lrpilot"),
            store="sqlite:////var/lib/lrpilot/other.db",
            listen="127.0.0.1:1234",
            http=None,
            insecure=True,
            keep_finished_days=90.0,
            traces="https://o11y.example/otlp/v1/traces",
        )
    ]
    assert logging.getLogger().level == logging.ERROR


def test_options_win_over_the_file(cli: Cli, app: Any, spec_file: SpecFile) -> None:
    result = cli(
        "serve", "--config", spec_file(FILE), "--data", "here", "--http", "127.0.0.1:9",
        "--log-level", "info",
    )  # fmt: skip
    assert result.exit_code == 0
    (config,) = app.served
    assert (config.data, config.http, config.listen) == (
        Path("here"), "127.0.0.1:9", "127.0.0.1:1234",
    )  # fmt: skip
    assert logging.getLogger().level == logging.INFO


def test_a_file_may_say_part(cli: Cli, app: Any, spec_file: SpecFile) -> None:
    cli("serve", "--config", spec_file("listen: 127.0.0.1:0"))
    (config,) = app.served
    assert (config.listen, config.data) == ("127.0.0.1:0", Path("lrpilot-data"))


def test_everything_wrong_in_a_file_is_named(cli: Cli, app: Any, spec_file: SpecFile) -> None:
    path = spec_file(
        "listn: a\nlisten: here\nhttp: 1\ninsecure: 'yes'\nlog_level: loud\ndata: 3\n"
        "log_format: xml\ntraces: here\nkeep_finished: 0"
    )
    result = cli("serve", "--config", path)
    assert (result.exit_code, result.stdout, app.served) == (2, "", [])
    message, *lines = result.stderr.splitlines()
    assert message == f"error: {path}: the configuration is invalid"
    assert {line.split(":")[0].strip() for line in lines} == {
        "listn", "listen", "http", "insecure", "log_level", "data",
        "keep_finished", "log_format", "traces",
    }  # fmt: skip
    assert (
        "  listn: got 'a'; allowed: one of data, store, listen, http, insecure, keep_finished, "
        "log_level, log_format, traces" in lines
    )


@pytest.mark.parametrize("days", ["0", "-1", "nan", "inf"])
def test_finished_runs_are_kept_for_some_time(cli: Cli, app: Any, days: str) -> None:
    result = cli("serve", "--keep-finished", days)
    assert (result.exit_code, app.served) == (2, [])
    assert "is no number of days above 0" in result.stderr


@pytest.mark.parametrize(
    "url", ["127.0.0.1:4318", "grpc://127.0.0.1:4317", "http://", "http://a:port", "http://[::1"]
)
def test_a_collector_is_a_url(cli: Cli, app: Any, url: str) -> None:
    result = cli("serve", "--traces", url)
    assert (result.exit_code, app.served) == (2, [])
    assert "is not a URL such as" in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize("text", ["", "- a", "a: [", "data: a\ndata: b"])
def test_a_file_that_cannot_be_read(cli: Cli, app: Any, spec_file: SpecFile, text: str) -> None:
    path = spec_file(text)
    result = cli("serve", "--config", path)
    assert (result.exit_code, app.served) == (2, [])
    assert result.stderr.startswith(f"error: {path}: the document cannot be read\n  ")


def test_a_file_that_is_not_there(cli: Cli, app: Any) -> None:
    result = cli("serve", "--config", "absent.yaml")
    assert (result.exit_code, app.served) == (2, [])
    assert result.stderr == "error: absent.yaml: No such file or directory\n"


@pytest.mark.parametrize("option", ["--listen", "--http"])
def test_an_address_that_is_none(cli: Cli, app: Any, option: str) -> None:
    result = cli("serve", option, "50051")
    assert (result.exit_code, app.served) == (2, [])
    assert "HOST:PORT" in result.stderr


def test_a_start_that_is_refused(cli: Cli, app: Any) -> None:
    app.failure = StartupFailedError("another server holds the folder d\nits process is 12")
    result = cli("serve")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: another server holds the folder d\n  its process is 12\n"


def test_ctrl_c_is_quiet(cli: Cli, app: Any) -> None:
    app.failure = KeyboardInterrupt()
    result = cli("serve")
    assert (result.exit_code, result.output) == (130, "")
