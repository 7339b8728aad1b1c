"""`lrpilot`, started again and again by a process that has imported it already.

Reads a JSON list a line: a file for standard error, and the arguments. A forked child runs the
program with them. Says "pid PID" once it has one, and "ended CODE" when it has ended.
"""

import json
import os
import sys
from pathlib import Path

import lrpilot.server._app  # noqa: F401 (what takes long to import)
from lrpilot.server.cli import main


def run(log: str, arguments: list[str]) -> None:
    """Be the program, in the child."""
    with Path(log).open("ab") as errors, Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(errors.fileno(), 2)
    sys.argv[1:] = arguments
    main()


for line in sys.stdin:
    file, *words = json.loads(line)
    child = os.fork()
    if child == 0:
        run(file, words)
        os._exit(0)
    sys.stdout.write(f"pid {child}\n")
    sys.stdout.flush()
    _, status = os.waitpid(child, 0)
    sys.stdout.write(f"ended {os.waitstatus_to_exitcode(status)}\n")
    sys.stdout.flush()
