"""Which runs changed since somebody last looked."""

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager


class Touched:
    """The names of runs in the order in which they last changed, while somebody follows them.

    What it costs to look does not grow with the number of runs, but of those that changed. Use it
    from one event loop.
    """

    def __init__(self) -> None:
        self._last: OrderedDict[str, int] = OrderedDict()
        """Name to the number of its last change, in the order of those numbers."""
        self._count = 0
        self._followers = 0
        self._changed = asyncio.Event()

    @property
    def is_followed(self) -> bool:
        """Whether anybody follows what changes."""
        return self._followers > 0

    def touch(self, name: str) -> None:
        """Tell that a run changed, or came to be, or is gone."""
        if not self.is_followed:
            return
        self._count += 1
        self._last[name] = self._count
        self._last.move_to_end(name)
        self._changed.set()
        self._changed = asyncio.Event()

    @contextmanager
    def followed(self) -> Iterator["Follower"]:
        """Follow what changes from now on, within the block."""
        self._followers += 1
        try:
            yield Follower(self)
        finally:
            self._followers -= 1
            if not self._followers:
                self._last.clear()


class Follower:
    """One who follows all runs, and has seen the changes up to some number."""

    def __init__(self, touched: Touched) -> None:
        self._touched = touched
        self._seen = touched._count

    async def wait(self, timeout_s: float) -> bool:
        """Return at once, or within `timeout_s`, whether anything changed since `take`."""
        if self._touched._count == self._seen:
            try:
                await asyncio.wait_for(self._touched._changed.wait(), timeout_s)
            except asyncio.TimeoutError:
                return False
        return True

    def take(self) -> list[str]:
        """Return the names of what changed since the last call, each once."""
        names = []
        for name, number in reversed(self._touched._last.items()):
            if number <= self._seen:
                break
            names.append(name)
        self._seen = self._touched._count
        return names
