"""SIGTERM: what was reported is delivered before the process dies of it.

Left alone, SIGTERM ends a process at once, with no function of `atexit`. Where nobody handles it, a
pilot does, for as long as one is open. Another thread does the work: the training thread may be in
a call that never returns, such as a collective of which a rank has died, and Python calls no
handler there. Through the wakeup descriptor the signal reaches the other thread all the same.

Whoever takes the signal over has it: a handler that is set later is neither replaced nor disturbed
by this one, even where it calls this one as the handler before it.
"""

import ctypes
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from lrpilot.client import _timing

_END = b"\0"
"""Ends the thread; no signal has this number."""


class _Watch:
    """The handler, its pipe and its thread; made and ended on the main thread."""

    def __init__(self, deliver: Callable[[], None]) -> None:
        self._deliver = deliver
        self.has_ended = False
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._thread = threading.Thread(target=self._run, name="lrpilot-sigterm", daemon=True)
        self._thread.start()
        signal.signal(signal.SIGTERM, self._handle)
        others = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._is_woken = others == -1
        if not self._is_woken:
            # An event loop has it. The handler then wakes the thread, once Python calls it.
            signal.set_wakeup_fd(others)

    def end(self) -> None:
        """Leave the signal as it was found."""
        self.forget()
        os.write(self._writing, _END)
        self._thread.join(_timing.JOIN_S)
        os.close(self._writing)

    def forget(self) -> None:
        """Take the handler and the descriptor back; all that a forked child has to do."""
        self.has_ended = True
        if self._is_ours():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._is_woken:
            found = signal.set_wakeup_fd(-1)
            if found not in (-1, self._writing):
                signal.set_wakeup_fd(found)

    def _is_ours(self) -> bool:
        return signal.getsignal(signal.SIGTERM) == self._handle

    def _handle(self, *_: object) -> None:
        # Nothing may be waited for here: the training thread may hold a lock.
        if not self._is_ours():
            return
        if self.has_ended:
            # Somebody had taken the signal over, and gave it back too late.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        else:
            os.write(self._writing, bytes([signal.SIGTERM]))

    def _run(self) -> None:
        while True:
            # Every signal with a handler comes through the descriptor.
            numbers = os.read(self._reading, 64)
            if _END[0] in numbers:
                os.close(self._reading)
                return
            if signal.SIGTERM in numbers and self._is_ours():
                break
        try:
            self._deliver()
        finally:
            _die()


def _die() -> None:
    # Python sets handlers on the main thread alone, and that may be stuck.
    ctypes.CDLL(None).signal(int(signal.SIGTERM), None)
    os.kill(os.getpid(), signal.SIGTERM)


_watch: _Watch | None = None


def watch(deliver: Callable[[], None]) -> None:
    """Have SIGTERM call `deliver` on a thread of its own and then end the process.

    Does nothing where the signal has a handler or is ignored, off the main thread, and where
    another call has done it.
    """
    global _watch  # noqa: PLW0603 (a process has one handler)
    is_main = threading.current_thread() is threading.main_thread()
    if _watch is None and is_main and _is_free(signal.getsignal(signal.SIGTERM)):
        _watch = _Watch(deliver)


def _is_free(handler: Any) -> bool:
    """Return whether nobody handles the signal; one of ours that has ended is nobody."""
    watch = getattr(handler, "__self__", None)
    return handler == signal.SIG_DFL or (isinstance(watch, _Watch) and watch.has_ended)


def unwatch() -> None:
    """Leave the signal as it was found; off the main thread it stays as it is."""
    global _watch  # noqa: PLW0603
    if _watch is not None and threading.current_thread() is threading.main_thread():
        _watch.end()
        _watch = None


_held: dict[int, set[int]] = {}
"""Signals that were blocked already in a thread that forks, by the thread."""


def _before_fork() -> None:
    # Before it has its own handler back, the child must not write to the pipe of its parent.
    if _watch is not None:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        _held[threading.get_ident()] = {int(number) for number in blocked}


def _after_fork() -> None:
    blocked = _held.pop(threading.get_ident(), None)
    if blocked is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _in_child() -> None:
    global _watch  # noqa: PLW0603
    if _watch is not None:
        _watch.forget()
        _watch = None
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)
