"""The program `lrpilot` on a terminal: a pseudo-terminal, and what stands on its screen.

It knows as much of a terminal as the program uses, and refuses the rest.
"""

import codecs
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Mapping

DEADLINE_S = 60.0
"""Every wait ends by then."""

_TOKEN = re.compile(r"\x1b\[([0-?]*)([@-~])|[\x00-\x1f]|[^\x00-\x1f]+")
_ON_TERMINAL = """
import fcntl, os, signal, sys, termios
# What a shell starts in the background ignores Ctrl-C, and so does what that starts.
signal.signal(signal.SIGINT, signal.SIG_DFL)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "lrpilot.server.cli", *sys.argv[1:]])
"""
"""Takes the terminal, and becomes the program. A `preexec_fn` would run in a copy of this process,
which may die of what grpc does at a fork, by SIGABRT."""
_UNFINISHED = re.compile(r"\x1b(\[[0-?]*)?$")


class _Page:
    """What stands on a screen, and how often it was moved up."""

    def __init__(self, columns: int, lines: int) -> None:
        self.columns, self.lines = columns, lines
        self.scrolled = 0
        self.row = self.column = 0
        self.cells = [[" "] * columns for _ in range(lines)]

    def write(self, text: str) -> None:
        for letter in text:
            if self.column == self.columns:
                # What a terminal does with what follows a full line.
                self.column = 0
                self.line_feed()
            self.cells[self.row][self.column] = letter
            self.column += 1

    def line_feed(self) -> None:
        if self.row + 1 < self.lines:
            self.row += 1
            return
        del self.cells[0]
        self.cells.append([" "] * self.columns)
        self.scrolled += 1

    @property
    def text(self) -> str:
        return "\n".join("".join(line).rstrip() for line in self.cells)


class Terminal:
    """A program on a terminal of its own; Ctrl-C reaches it as the key would."""

    def __init__(
        self,
        *arguments: str,
        size: tuple[int, int] = (80, 24),
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Start `lrpilot` with arguments, on a terminal of (columns, lines)."""
        self._master, slave = pty.openpty()
        self._pages = {name: _Page(*size) for name in ("normal", "alternate")}
        self._now = "normal"
        self._picture = ""
        self.is_cursor_shown = True
        self.moved = 0
        """By how many lines the last whole picture of a full screen moved up what was there."""
        self.raw = ""
        """All that was written, as it came."""
        self._changed = threading.Condition()
        self._set_size(*size)
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "LRPILOT_SERVER")
        }
        environment |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **(env or {})}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _ON_TERMINAL, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        self._encoding = environment["PYTHONIOENCODING"]
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def resize(self, columns: int, lines: int) -> None:
        """Give the terminal another size, of which its program is told."""
        with self._changed:
            self._pages = {name: _Page(columns, lines) for name in self._pages}
            self._picture = ""
            self._set_size(columns, lines)

    def press(self, keys: str) -> None:
        """Type something; "\\x03" is Ctrl-C."""
        os.write(self._master, keys.encode())

    @property
    def echoes(self) -> bool:
        """Whether what is typed shows on the screen."""
        return bool(termios.tcgetattr(self._master)[3] & termios.ECHO)

    @property
    def screen(self) -> str:
        """What a person sees; of a full screen the last whole picture."""
        return self._picture if self.is_full_screen else self._pages[self._now].text

    @property
    def is_full_screen(self) -> bool:
        """Whether the program has the alternate screen."""
        return self._now == "alternate"

    def wait_for(self, shown: str | Callable[[str], object]) -> str:
        """Wait until a text is on the screen, or what holds of the screen; return the screen."""

        def holds() -> bool:
            return shown in self.screen if isinstance(shown, str) else bool(shown(self.screen))

        with self._changed:
            assert self._changed.wait_for(holds, DEADLINE_S), f"never {shown!r}:\n{self.screen}"
            return self.screen

    def ended(self) -> int:
        """Return the exit code once it ends; everything it wrote has been read then."""
        code = self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        assert not self._reader.is_alive()
        return code

    def dispose(self) -> None:
        """Leave nothing of it behind."""
        if self.process.poll() is None:
            self.process.kill()
        self.ended()
        os.close(self._master)

    def _set_size(self, columns: int, lines: int) -> None:
        size = struct.pack("HHHH", lines, columns, 0, 0)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)

    def _read(self) -> None:
        # Ctrl-C throws away what is on its way, also in the middle of a letter or a sequence.
        decoder = codecs.getincrementaldecoder(self._encoding)("replace")
        rest = ""
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:
                # Nobody has the other end any more.
                data = b""
            text = rest + decoder.decode(data)
            cut = _UNFINISHED.search(text)
            rest = text[cut.start() :] if cut and data else ""
            with self._changed:
                self.raw += text[: len(text) - len(rest)]
                self._feed(text[: len(text) - len(rest)])
                self._changed.notify_all()
            if not data:
                return

    def _feed(self, text: str) -> None:
        for token in _TOKEN.finditer(text):
            page = self._pages[self._now]
            whole, (arguments, final) = token[0], token.groups()
            if whole == "\n":
                page.line_feed()
            elif whole == "\r":
                page.column = 0
            elif final == "H" and not arguments:
                # One is whole once the next one begins.
                self._picture = page.text
                self.moved, page.scrolled = page.scrolled, 0
                page.row = page.column = 0
            elif (arguments, final) in (("?1049", "h"), ("?1049", "l")):
                self._now = "alternate" if final == "h" else "normal"
            elif (arguments, final) in (("?25", "h"), ("?25", "l")):
                self.is_cursor_shown = final == "h"
            elif whole == "\x1b":
                continue
            elif final is None:
                assert whole.isprintable(), f"{whole!r} in {text!r}"
                page.write(whole)
            else:
                assert final == "m", f"{whole!r} in {text!r}"
