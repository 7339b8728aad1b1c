"""How `lrpilot serve` writes its log to standard error: one line a record, for people or as JSON.

What a line is about, such as the run, comes as `extra={"fields": {…}}` with the record.
"""

import enum
import logging
import sys
import threading
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

from lrpilot.server._json import json_line


class LogFormat(str, enum.Enum):
    """How lines of the log are written."""

    HUMAN = "human"
    JSON = "json"


STYLES = {
    logging.DEBUG: Style(dim=True),
    logging.INFO: Style(color="green"),
    logging.WARNING: Style(color="yellow", bold=True),
    logging.ERROR: Style(color="red", bold=True),
    logging.CRITICAL: Style(color="red", bold=True, reverse=True),
}
"""Level to how its name looks on a terminal."""

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {
    ord("\n"): "\\n",
    ord("\r"): "\\r",
    ord("\t"): "\\t",
}
"""What a text from elsewhere, such as the reason of an operator, must do to no terminal."""


class HumanFormatter(logging.Formatter):
    """A line with the time here, the level, and the run with its attempt and progress in front."""

    def __init__(self, *, is_coloured: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._is_coloured = is_coloured

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line without a traceback, which follows on lines of its own."""
        level = record.levelname
        if self._is_coloured and record.levelno in STYLES:
            level = STYLES[record.levelno].render(level, color_system=ColorSystem.STANDARD)
        message = (_where(fields_of(record)) + record.message).translate(_CONTROLS)
        return f"{record.asctime} {level} {record.name}: {message}"


class JsonFormatter(logging.Formatter):
    """One JSON object: `time`, `level`, `logger`, `message`, then what the line is about.

    Of an exception `error` has its class, unless the line says it already, and `exception` the
    traceback. Floats that are not finite are strings, as everywhere in lrpilot's JSON.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        time = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, Any] = {
            "time": f"{time:%Y-%m-%dT%H:%M:%S.%fZ}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line.setdefault("error", record.exc_info[0].__name__)
            line["exception"] = self.formatException(record.exc_info)
        return json_line(line)


def fields_of(record: logging.LogRecord) -> Mapping[str, Any]:
    """Return what a record is about; empty: it does not say."""
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, Mapping) else {}


def write_logs(level: str, form: LogFormat) -> None:
    """Write what everything in this process logs, from `level` on, to standard error."""
    formatter: logging.Formatter
    if form is LogFormat.JSON:
        formatter = JsonFormatter()
    else:
        # It knows terminals, TERM and NO_COLOR.
        console = Console(file=sys.stderr)
        is_coloured = console.color_system is not None and not console.no_color
        formatter = HumanFormatter(is_coloured=is_coloured)
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # They would come as lines of another form.
    logging.captureWarnings(True)
    threading.excepthook = _log_failure


def _where(fields: Mapping[str, Any]) -> str:
    """Return what stands before a message about a run."""
    if "run" not in fields:
        return ""
    at = ", ".join(f"{name} {fields[name]}" for name in ("attempt", "progress") if name in fields)
    return f"run {fields['run']} ({at}): " if at else f"run {fields['run']}: "


def _log_failure(failed: threading.ExceptHookArgs) -> None:
    name = "a thread" if failed.thread is None else f"thread {failed.thread.name}"
    error = failed.exc_value
    trace = None if error is None else (failed.exc_type, error, failed.exc_traceback)
    logging.getLogger("lrpilot.server").error("%s failed", name, exc_info=trace)
