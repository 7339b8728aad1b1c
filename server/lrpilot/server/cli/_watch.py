"""`lrpilot run watch`: a run, or all of them, on the whole terminal, kept up to date."""

import queue
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console, RenderableType
from rich.live import Live

from lrpilot.server.cli._failures import INVALID, UNREACHABLE, CommandError, command
from lrpilot.server.cli._options import SERVER, TIMEOUT_S, Server, TimeoutS
from lrpilot.server.cli._output import is_terminal, needs
from lrpilot.server.cli._remote import connected

_LONGEST_S = 10.0
"""Longest time between two screens, although nothing happens."""
_LOCAL_MODES = 3
"""Their place in what `termios.tcgetattr` returns."""


@command
def watch(
    name: Annotated[
        str | None, typer.Argument(metavar="RUN", help="Name of the run. Default: list them all.")
    ] = None,
    *,
    log: Annotated[bool, typer.Option("--log", help="Loss and LR on logarithmic axes.")] = False,
    group: Annotated[
        str | None,
        typer.Option(
            "--group", metavar="NAME", help="LR and WD of this parameter group. Default: all, to 8."
        ),
    ] = None,
    refresh_s: Annotated[
        float,
        typer.Option("--refresh-s", metavar="SECONDS", min=0.1, max=3600.0, help="Between looks."),
    ] = 1.0,
    server: Server = SERVER,
    timeout_s: TimeoutS = TIMEOUT_S,
) -> None:
    """Watch a run live: its curves, what was decided and why, its ranks and events.

    Ctrl-C ends it, and so does the end of the run. It changes nothing.
    """
    if name is None and (log or group is not None):
        raise typer.BadParameter("--log and --group are for one run: say which")
    console = Console(highlight=False)
    if not is_terminal() or console.is_dumb_terminal:
        hint = "`lrpilot run list` lists the runs"
        if name is not None:
            hint = f"see `lrpilot run show {name}` and `lrpilot run history {name}`"
        raise CommandError("watch draws on a terminal, and this is none", INVALID, hint=hint)
    with needs("plotext"):
        # It takes a moment to import.
        from lrpilot.server.cli import _screen  # noqa: PLC0415
    with connected(server, timeout_s) as runs:
        look: Look = _screen.all_runs(runs)
        if name is not None:
            look = _screen.OneRun(runs, name, log=log, group=group)
        try:
            _show_live(console, _Watcher(look, refresh_s), _screen.Screen)
        except _screen.Finished as finished:
            typer.echo(str(finished))


Look = Callable[[], RenderableType]
"""Asks the server and returns what to show; raises where there is nothing to show any more."""
Frame = Callable[[RenderableType, float | None], RenderableType]
"""Returns a screen of what there is to show and since when the server has been silent, if it is."""


def _show_live(console: Console, watcher: "_Watcher", frame: Frame) -> None:
    """Show what a watcher sees, until there is nothing more to see; raise why."""
    live = Live(
        console=console,
        screen=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with _signals(watcher), _silent_keys(), watcher, live:
        while watcher.failure is None:
            live.update(frame(watcher.view, watcher.silent_since), refresh=True)
            watcher.wait()
    raise watcher.failure


@contextmanager
def _signals(watcher: "_Watcher") -> Iterator[None]:
    """Draw anew when the terminal gets another size; end between two screens when told to."""

    def end(number: int, _: FrameType | None) -> None:
        is_ctrl_c = number == signal.SIGINT
        watcher.failure = KeyboardInterrupt() if is_ctrl_c else SystemExit(128 + number)
        watcher.wake()

    handlers = {
        signal.SIGWINCH: lambda *_: watcher.wake(),
        signal.SIGINT: end,
        signal.SIGTERM: end,
        signal.SIGHUP: end,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _silent_keys() -> Iterator[None]:
    """Keep what is typed off the screen, and away from the shell afterwards."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    modes = termios.tcgetattr(sys.stdin)
    modes[_LOCAL_MODES] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, modes)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSAFLUSH, before)


class _Watcher:
    """Looks in a thread of its own, so that a server that does not answer holds up nothing."""

    def __init__(self, look: Look, refresh_s: float) -> None:
        """Take a first look, which raises where there is nothing to watch."""
        self._look = look
        self._refresh_s = refresh_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        # Of what wakes threads this alone may be used by handlers of signals.
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.view = look()
        self.silent_since: float | None = None
        """When the server last answered, if it does not any more, in seconds since 1970."""
        self.failure: BaseException | None = None
        """Why there is nothing more to look at."""
        self._answered = time.time()

    def __enter__(self) -> "_Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def wake(self) -> None:
        """End a `wait`; handlers of signals may call it."""
        self._wakes.put(None)

    def wait(self) -> None:
        """Wait, bounded, until there is something new to see."""
        with suppress(queue.Empty):
            self._wakes.get(timeout=_LONGEST_S)
            while True:
                self._wakes.get_nowait()

    def _run(self) -> None:
        while self.failure is None and not self._ended.wait(self._refresh_s):
            try:
                self.view = self._look()
                self._answered, self.silent_since = time.time(), None
            except CommandError as error:
                if error.code == UNREACHABLE:
                    self.silent_since = self._answered
                else:
                    self.failure = error
            except Exception as error:
                # Raised where it ends the program, and not in a thread that nobody waits for.
                self.failure = error
            self.wake()
