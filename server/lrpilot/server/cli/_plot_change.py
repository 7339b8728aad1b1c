"""The picture of a change: LR and WD before and after, over the whole attempt."""

import textwrap
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lrpilot.server.cli._effect import Effect, value_of
from lrpilot.server.cli._plot import (
    COLORS,
    FAINT,
    GRID_LINE,
    INK,
    dress,
    group_label,
    picture_style,
    rendered,
)

_BEFORE, _FIXED = "#8a929b", "#eef0f3"
_DASHED = (0, (4, 3))

_MOST_LINES = 8
"""Most lines that the legend names; beyond them it names none."""
_LETTERS = 130
"""Letters in a line below the title."""
_NOTE_LINES = 3
_NOTE_LINE = 0.17
"""Height of a line below the title, inches."""


class _Line(NamedTuple):
    """Groups whose values in one panel are the same, before and after."""

    names: list[str]
    before: tuple[float | None, ...]
    after: tuple[float | None, ...]


def draw_change(effect: Effect, form: str) -> bytes:
    """Return the picture of an effect that has a preview, as `png` or `svg`.

    Groups with equal values share a line. What is fixed already lies on a grey ground.
    """
    points = effect.preview
    names = [values.name for values in effect.run.values]
    rates = _lines(names, [point.before for point in points], [point.after for point in points])
    decays = _lines(
        names,
        [point.weight_decay_before for point in points],
        [point.weight_decay_after for point in points],
    )
    panels = [("learning rate", rates), *([("weight decay", decays)] if decays else [])]
    notes = list(_notes(effect))
    with picture_style():
        space = _NOTE_LINE * len(notes)
        figure = Figure(figsize=(10, (4.0 if len(panels) == 1 else 6.2) + space))
        figure.set_layout_engine("constrained")
        drawn = figure.subplots(
            len(panels), 1, sharex=True, squeeze=False,
            gridspec_kw={"height_ratios": (3, 2)[: len(panels)]},
        )  # fmt: skip
        for axes, (label, lines) in zip(drawn[:, 0], panels, strict=True):
            _draw_panel(axes, label, lines, effect)
        drawn[-1, 0].set_xlabel(f"progress ({effect.run.unit})")
        title = effect.title if not effect.is_dry else f"{effect.title} (dry run)"
        figure.suptitle(title, x=0.01, ha="left", weight="bold", size=12)
        if notes:
            drawn[0, 0].set_title("\n".join(notes), loc="left", size=8.5, color=FAINT)
        return rendered(figure, form)


def _draw_panel(axes: Axes, label: str, lines: Sequence[_Line], effect: Effect) -> None:
    progress = [point.progress for point in effect.preview]
    at, first = effect.effective, progress[0]
    dress(axes)
    axes.set_ylabel(label)
    if at > first:
        axes.axvspan(first, at, color=_FIXED, linewidth=0, zorder=-1, label="fixed")
    axes.axvline(at, color=INK, linewidth=0.9, linestyle=(0, (1, 2)), zorder=2)
    named = len(lines) > 1
    is_changed = any(line.before != line.after for line in lines)
    # Below it nothing changes.
    changed = slice(max(0, bisect_left(progress, at) - 1), None)
    for number, line in enumerate(lines):
        color = COLORS[number % len(COLORS)]
        after = group_label(line.names) if named else "after" if is_changed else "unchanged"
        # The first lines are the thickest: what meets them does not hide them.
        width = max(1.3, 2.9 - 0.8 * number) if named else 1.9
        axes.plot(
            progress, _drawable(line.after), color=color, linewidth=width, zorder=3,
            label=after if len(lines) <= _MOST_LINES else "_", clip_on=False,
        )  # fmt: skip
        if line.before != line.after:
            axes.plot(
                progress[changed], _drawable(line.before[changed]),
                color=color if named else _BEFORE, linewidth=1.3, linestyle=_DASHED, label="_",
                zorder=4,
            )  # fmt: skip
    if is_changed:
        # One entry for all of them.
        axes.plot([], [], color=_BEFORE, linewidth=1.3, linestyle=_DASHED, label="before")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=True, framealpha=0.9, edgecolor=GRID_LINE, fontsize=9)


def _lines(
    names: Sequence[str], before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]
) -> list[_Line]:
    """Return the lines of a panel; none where no group has a value."""
    alike: dict[tuple[tuple[float | None, ...], tuple[float | None, ...]], list[str]] = {}
    for group in range(max(len(values) for values in (*before, *after))):
        name = names[group] if group < len(names) else f"group {group}"
        key = tuple(
            tuple(value_of(values, group) for values in series) for series in (before, after)
        )
        alike.setdefault((key[0], key[1]), []).append(name)
    return [_Line(owners, old, new) for (old, new), owners in alike.items()]


def _drawable(values: Sequence[float | None]) -> list[float]:
    # Of a group that is not there nothing is drawn.
    return [float("nan") if value is None else value for value in values]


def _notes(effect: Effect) -> Iterator[str]:
    """Yield the lines below the title: the changed fields, or why and by whom."""
    made = effect.adjustment
    text = "; ".join(f"{item.field}: {item.before} → {item.after}" for item in effect.changes)
    if made is not None:
        text = f"{made.reason} ({made.author})"
    yield from textwrap.wrap(text, _LETTERS, max_lines=_NOTE_LINES, placeholder=" …")
