"""What a change does to a run: the server's answer, as numbers for people and for programs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import typer

from lrpilot.server._json import fields_of
from lrpilot.server.cli._messages import run_fields
from lrpilot.server.cli._output import group_text, table_lines
from lrpilot.server.cli._show import arrow
from lrpilot.v1 import runs_pb2

Answer: TypeAlias = (
    runs_pb2.AdjustRunResponse | runs_pb2.ApproveAdviceResponse | runs_pb2.ReviseRunResponse
)

SHARES = (0.0, 0.01, 0.1, 0.5, 1.0)
"""Where a dry run shows values: shares of the way from the first changed progress to the end."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What became, or would become, of a change; the same for each way to ask for one."""

    run: runs_pb2.Run
    effective: int
    """First progress at which it shows."""
    is_dry: bool
    is_unchanged: bool
    is_pending: bool
    """Whether it shows later if the job, in leader mode, goes on alone beyond `effective`."""
    adjustment: runs_pb2.Adjustment | None
    changes: Sequence[runs_pb2.SpecChange]
    preview: Sequence[runs_pb2.PreviewPoint]

    @property
    def what(self) -> str:
        """What changes, as one phrase."""
        return "new spec" if self.adjustment is None else self.adjustment.summary

    @property
    def title(self) -> str:
        """What changes, of which run and from where on."""
        return f"{self.run.name}: {self.what} from progress {self.effective:,} on"


class Column(NamedTuple):
    """Parameter groups that have the same values before and after, at every progress shown."""

    name: str
    """The groups' names; empty where there is only one without a name."""
    group: int
    """Index of one of them."""


def effect_of(answer: Answer, *, is_dry: bool) -> Effect:
    """Return what an answer of the server says."""
    adjustment = None
    if not isinstance(answer, runs_pb2.ReviseRunResponse) and answer.HasField("adjustment"):
        adjustment = answer.adjustment
    unchanged = False
    changes: tuple[runs_pb2.SpecChange, ...] = ()
    if not isinstance(answer, runs_pb2.ApproveAdviceResponse):
        unchanged, changes = answer.unchanged, tuple(answer.changes)
    return Effect(
        run=answer.run,
        effective=answer.effective,
        is_dry=is_dry,
        is_unchanged=unchanged,
        is_pending=answer.pending,
        adjustment=adjustment,
        changes=changes,
        preview=answer.preview,
    )


def effect_fields(effect: Effect) -> dict[str, Any]:
    """Return an effect as plain data, with the same fields for every command."""
    made = effect.adjustment
    return {
        "effective": effect.effective,
        "unchanged": effect.is_unchanged,
        "pending": effect.is_pending,
        "dry_run": effect.is_dry,
        "adjustment": None if made is None else fields_of(made),
        "changes": [fields_of(item) for item in effect.changes],
        "preview": [fields_of(item) for item in effect.preview],
        "run": run_fields(effect.run),
    }


def change_lines(changes: Sequence[runs_pb2.SpecChange]) -> Iterator[str]:
    """Yield a line for each changed field of the spec: what goes in red, what comes in green."""
    for item in changes:
        before = typer.style(item.before, fg="red")
        after = typer.style(item.after, fg="green")
        yield f"{item.field}: {before} → {after}"


def value_lines(effect: Effect) -> Iterator[str]:
    """Yield a table of LR and WD before and after; a dry run shows them up to the run's end.

    The answer to a repeated request has no values; then there is no table.
    """
    points = _shown_points(effect)
    if not points:
        return
    columns = columns_of(effect.run, effect.preview)
    named = [column.name for column in columns] != [""]
    decayed = any(point.weight_decay_before or point.weight_decay_after for point in points)
    headers = ["progress", *(["group"] if named else []), "learning rate"]
    headers += ["weight decay"] if decayed else []
    rows = []
    for point in points:
        for name, group in columns:
            row = [f"{point.progress:,}", *([name] if named else [])]
            row.append(_cell(point.before, point.after, group))
            if decayed:
                row.append(_cell(point.weight_decay_before, point.weight_decay_after, group))
            rows.append(row)
    yield from table_lines(headers, rows, left=len(headers))


def columns_of(run: runs_pb2.Run, preview: Sequence[runs_pb2.PreviewPoint]) -> list[Column]:
    """Return the groups of a preview; those whose values are the same all along as one."""
    names = [values.name for values in run.values]
    groups = max((max(len(point.before), len(point.after)) for point in preview), default=0)
    # Before the first attempt a revision may bring groups that the run does not have yet.
    names += [f"group {index}" for index in range(len(names), groups)]
    alike: dict[tuple[float | None, ...], list[int]] = {}
    for group in range(groups):
        alike.setdefault(tuple(_values(preview, group)), []).append(group)
    return [
        Column(group_text([names[group] for group in members]), members[0])
        for members in alike.values()
    ]


def value_of(values: Sequence[float], group: int) -> float | None:
    """Return the value of a group, or None where the run has no such group or sets no value."""
    return values[group] if group < len(values) else None


def _values(preview: Sequence[runs_pb2.PreviewPoint], group: int) -> Iterator[float | None]:
    for point in preview:
        yield value_of(point.before, group)
        yield value_of(point.after, group)
        yield value_of(point.weight_decay_before, group)
        yield value_of(point.weight_decay_after, group)


def _shown_points(effect: Effect) -> list[runs_pb2.PreviewPoint]:
    points = [point for point in effect.preview if point.progress >= effect.effective]
    if not points or not effect.is_dry:
        return points[:1]
    begin, end = points[0].progress, points[-1].progress

    def nearest(wanted: float) -> runs_pb2.PreviewPoint:
        return min(points, key=lambda point: abs(point.progress - wanted))

    near = [nearest(begin + share * (end - begin)) for share in SHARES]
    return list({point.progress: point for point in near}.values())


def _cell(before: Sequence[float], after: Sequence[float], group: int) -> str:
    old, new = value_of(before, group), value_of(after, group)
    if old is None or new is None:
        return " → ".join("none" if value is None else arrow(value, value) for value in (old, new))
    return arrow(old, new)
