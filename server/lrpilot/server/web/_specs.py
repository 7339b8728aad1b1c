"""The specs that a run had, each with what it changed, who gave it and why."""

from collections.abc import Sequence
from typing import Any

from lrpilot import core
from lrpilot.server._documents import dump_document
from lrpilot.server._json import fields_of
from lrpilot.server._messages import event_message
from lrpilot.server._store import LogRow

MAX_SPECS = 100
"""Most specs in an answer, the newest."""


def spec_fields(
    revisions: Sequence[core.Revision], rows: Sequence[LogRow | None], pending: core.RunSpec | None
) -> dict[str, Any]:
    """Return the specs of a run, the oldest first, and the one that the next attempt begins with.

    `rows` has the event that brought each of the last `len(rows)` revisions, where it is known.
    """
    shown = revisions[-len(rows) :]
    before = [None, *(item.spec for item in revisions)][-len(rows) - 1 : -1]
    specs = [
        _given(item, row) | _spec(item.spec, earlier)
        for item, row, earlier in zip(shown, rows, before, strict=True)
    ]
    return {
        "specs": specs,
        "left_out": len(revisions) - len(shown),
        "pending": None if pending is None else _spec(pending, revisions[-1].spec),
    }


def _given(item: core.Revision, row: LogRow | None) -> dict[str, Any]:
    event = None if row is None else fields_of(event_message(row, set()))
    return {
        "effective": item.effective,
        "observes_from": item.observes_from,
        "by_trainer": item.by_trainer,
        "seq": item.seq or 1,
        "recorded_at": None if event is None else event["recorded_at"],
        "author": "" if event is None else event["author"],
        "reason": "" if event is None else event["reason"],
    }


def _spec(spec: core.RunSpec, before: core.RunSpec | None) -> dict[str, Any]:
    changes = [] if before is None else core.spec_difference(before, spec)
    return {
        "spec_document": dump_document(spec.to_mapping()),
        "changes": [{"field": field, "before": old, "after": new} for field, old, new in changes],
    }
