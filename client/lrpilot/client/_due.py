"""What comes with the values ahead of its step: met once, in order of progress."""

import threading
from collections.abc import Callable, Collection, Iterable
from typing import Generic, Protocol, TypeVar

from lrpilot.client._changes import Change
from lrpilot.client._directives import Directive


class _Item(Protocol):
    @property
    def id(self) -> str:
        """Name within the run."""

    @property
    def progress(self) -> int:
        """Progress from which on it is due."""


Item = TypeVar("Item", bound=_Item)


class Due(Generic[Item]):
    """Directives or changes that were not met yet; for several threads."""

    def __init__(self, met: Collection[str] = ()) -> None:
        self._items: dict[str, Item] = {}
        """By id, in the order in which they came."""
        self._met = set(met)
        self._lock = threading.Lock()

    def add(self, items: Iterable[Item]) -> None:
        """Keep those that are new and were not met."""
        with self._lock:
            for item in items:
                if item.id not in self._met:
                    self._items.setdefault(item.id, item)

    def next(self, progress: int) -> Item | None:
        """Return the first one that is due at a progress in use; it is met now."""
        if not self._items:
            return None
        with self._lock:
            due = [item for item in self._items.values() if item.progress <= progress]
            if not due:
                return None
            first = min(due, key=lambda item: item.progress)
            del self._items[first.id]
            self._met.add(first.id)
            return first

    def forget(self) -> None:
        """Drop those that were not met; each may come again."""
        with self._lock:
            self._items.clear()

    def has(self, wanted: Callable[[Item], bool]) -> bool:
        """Return whether one that was not met yet is wanted."""
        with self._lock:
            return any(wanted(item) for item in self._items.values())


class WithValues:
    """What comes with the values of an attempt: directives, and the changes that they follow."""

    def __init__(self, carried_out: Collection[str]) -> None:
        self._directives: Due[Directive] = Due(carried_out)
        self._changes: Due[Change] = Due()

    def next_due(self, progress: int) -> Directive | None:
        """Return the first directive that is due at a progress in use; it is met now."""
        return self._directives.next(progress)

    def next_change(self, progress: int) -> Change | None:
        """Return the first change that shows at a progress in use, once."""
        return self._changes.next(progress)

    def awaits_rollback(self) -> bool:
        """Return whether a rollback was asked for and not met yet."""
        return self._directives.has(lambda item: item.kind == "rollback")
