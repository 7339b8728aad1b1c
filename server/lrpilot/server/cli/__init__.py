"""The command line, `lrpilot`."""

from lrpilot.server.cli._main import main

__all__ = ["main"]
