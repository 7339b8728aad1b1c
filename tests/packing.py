"""Packing a whole log at once, which a server does step by step."""

from lrpilot.server._store import Store


def compact_all(store: Store, run: str, through_seq: int) -> int:
    """Pack all rows of a log that `compact` packs; return how many."""
    count = 0
    while packed := store.compact(run, through_seq):
        count += packed
    return count
