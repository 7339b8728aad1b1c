"""`python -m lrpilot.server.cli` is `lrpilot`."""

from lrpilot.server.cli._main import main

main()
