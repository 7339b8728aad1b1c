"""Work beside the test: in a thread that waits, or in processes that belong together."""

import json
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import Any

from lrpilot.client import LrpilotError

DEADLINE_S = 120.0


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Run a call that waits; return its thread, and what it returned or raised."""
    got: list[object] = []

    def run() -> None:
        try:
            got.append(call())
        except LrpilotError as error:
            got.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, got


def finish(thread: threading.Thread) -> None:
    """Wait, bounded, for the thread to end."""
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def said_by(commands: Sequence[Sequence[str]]) -> list[Any]:
    """Run programs at the same time; return what each wrote, one JSON document each."""
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    said = []
    try:
        for process in running:
            out, err = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 0, err
            said.append(json.loads(out))
    finally:
        for process in running:
            process.kill()
            process.communicate()
    return said
