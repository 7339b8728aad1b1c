"""The picture of a run, drawn with matplotlib. Needs the extra `plot`.

No pyplot: no display is opened, no setting is changed, and any thread may draw.
"""

import io
import math
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter

from lrpilot.v1 import runs_pb2 as pb

COLORS = ("#1f5fbf", "#d9601a", "#2a8a4a", "#a0348f", "#8a6d00", "#008b99", "#b02a37", "#555555")
"""Of groups and of validation losses."""
INK, FAINT, GRID_LINE, FIXED = "#22262b", "#6b737c", "#dfe3e8", "#f6dfa4"
LOSS, FORGOTTEN, SMOOTHED, BROKEN = "#8fa8cb", "#b9c1cb", "#22262b", "#b02a37"
_BANDS = ("#eef2f8", "#ffffff")

_MOST_LISTED = 12
"""Adjustments that get a number and a line in the list below, the newest."""
_LONGEST_LINE = 140
_LONGEST_LEGEND, _LONGEST_LABEL = 10, 40
"""Lines of a legend: the first 8 groups, with the base schedule and what is fixed. Characters."""
_FEW_POINTS = 60
"""A curve of fewer points shows them: a line alone shows nothing of a single one."""
_GREATEST = 1e100
"""Greater losses, which no float32 holds, count as not finite: matplotlib fails at the largest."""
_LEVELS = 3
"""Heights at which the numbers of adjustments stand that would run into each other."""


class RunFigure(Figure):
    """A figure that a notebook shows, also where no pyplot has told it how."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


class Marked(NamedTuple):
    """An adjustment or advice in the picture."""

    number: int | None
    """Its number in the list; None: it is not in it."""
    item: pb.Adjustment


def draw(run: pb.Run, curves: pb.GetCurvesResponse, *, log: bool) -> Figure:
    """Return the picture of a run from its curves; `log`: on logarithmic axes."""
    changes = _changes(run, curves)
    listed = [change for change in changes if change.number is not None]
    heights = {"rate": 2.3}
    if any(item.loss.progress for item in curves.losses) or curves.validation_losses:
        heights = {"loss": 2.6, **heights}
    if any(group.weight_decay for group in curves.groups):
        heights["decay"] = 1.3
    if listed:
        heights["list"] = 0.19 * len(listed) + 0.05
    figure = RunFigure(
        figsize=(10, sum(heights.values()) + 0.9), layout="constrained", facecolor="white"
    )
    # A figure alone has a canvas that draws nothing.
    FigureCanvasAgg(figure)
    drawn = figure.subplots(
        len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": list(heights.values())}
    )[:, 0]
    axes: dict[str, Axes] = dict(zip(heights, drawn, strict=True))
    below = axes.pop("list", None)
    if "loss" in axes:
        _draw_losses(axes["loss"], curves)
    _draw_rates(axes["rate"], curves)
    _draw_marks(axes["rate"], curves, changes)
    if "decay" in axes:
        _draw_decays(axes["decay"], curves)
    for index, panel in enumerate(axes.values()):
        _draw_present(panel, curves, is_named=panel is axes["rate"])
        _draw_bands(panel, curves, is_named=index == 0)
        _dress(panel, curves, log=log)
        _draw_changes(panel, changes)
        if panel is not axes.get("decay"):
            _legend(panel)
        panel.tick_params(labelbottom=index == len(axes) - 1)
    _label(panel.set_xlabel(f"progress ({run.unit})"))
    if below is not None:
        _draw_list(below, listed)
    title = figure.suptitle(_title(run), x=0.01, ha="left", weight="bold", size=12, color=INK)
    _label(title)
    return figure


def _title(run: pb.Run) -> str:
    known = pb.RunState.DESCRIPTOR.values_by_number.get(run.state)
    # A newer server may know others.
    state = str(run.state) if known is None else known.name.removeprefix("RUN_STATE_").lower()
    parts = [f"{run.name}: {run.progress:,} of {run.total:,} {run.unit}"]
    if run.attempt:
        parts.append(f"attempt {run.attempt}")
    parts.append(state)
    if run.stage:
        parts.append(f"stage {run.stage}")
    if run.held:
        parts.append("held")
    return ", ".join(parts)


# Losses.


def _draw_losses(axes: Axes, curves: pb.GetCurvesResponse) -> None:
    broken: list[int] = []
    counted, forgotten = _Parts([], []), _Parts([], [])
    for attempt in curves.losses:
        at, values = attempt.loss.progress, attempt.loss.value
        split = len(at)
        if attempt.HasField("forgotten_from"):
            split = bisect_left(at, attempt.forgotten_from)
        counted.add(at[:split], values[:split])
        if split < len(at):
            # From the point before, so that one sees where it left.
            begin = max(split - 1, 0)
            forgotten.add(at[begin:], values[begin:])
        broken += _broken(attempt.loss)
    if counted.progress:
        _line(axes, *counted, LOSS, "loss", linewidth=0.9)
    if forgotten.progress:
        _line(axes, *forgotten, FORGOTTEN, "forgotten", linewidth=0.9)
    smoothed = curves.smoothed_loss
    if smoothed.progress:
        _line(axes, smoothed.progress, smoothed.value, SMOOTHED, "smoothed", linewidth=1.8)
    for index, (name, curve) in enumerate(sorted(curves.validation_losses.items())):
        color = COLORS[index % len(COLORS)]
        _line(axes, curve.progress, curve.value, color, name, linewidth=1.2, marker="o")
        broken += _broken(curve)
    if broken:
        # There is no height at which they belong: they stand at the foot.
        axes.scatter(
            broken,
            [0.04] * len(broken),
            transform=axes.get_xaxis_transform(),
            marker="x",
            color=BROKEN,
            s=28,
            linewidths=1.4,
            label="not finite",
            zorder=5,
        )
    _label(axes.set_ylabel("loss"))


class _Parts(NamedTuple):
    """A line of several parts, with a gap behind each."""

    progress: list[int]
    values: list[float]

    def add(self, progress: Sequence[int], values: Sequence[float]) -> None:
        self.progress.extend((*progress, *progress[-1:]))
        self.values.extend((*values, *(math.nan for _ in progress[-1:])))


def _broken(curve: pb.Curve) -> list[int]:
    """Return where a curve is not finite."""
    pairs = zip(curve.progress, curve.value, strict=True)
    return [progress for progress, value in pairs if not _is_finite(value)]


# LR and WD.


def _draw_rates(axes: Axes, curves: pb.GetCurvesResponse) -> None:
    bases = {array("d", group.base_learning_rate).tobytes(): group for group in curves.groups}
    for base in bases.values():
        axes.plot(
            base.progress,
            base.base_learning_rate,
            color=FAINT,
            linestyle=":",
            linewidth=1.2,
            label="base schedule" if base is next(iter(bases.values())) else "_",
            zorder=2,
        )
    for group in _groups(curves, "learning_rate"):
        _draw_group(axes, curves, group)
    _label(axes.set_ylabel("learning rate"))


def _draw_decays(axes: Axes, curves: pb.GetCurvesResponse) -> None:
    for group in _groups(curves, "weight_decay"):
        _draw_group(axes, curves, group)
    _label(axes.set_ylabel("weight decay"))


class _Group(NamedTuple):
    """Groups that share a curve."""

    label: str
    color: str
    progress: Sequence[int]
    values: Sequence[float]


def _groups(curves: pb.GetCurvesResponse, field: str) -> list[_Group]:
    """Return the curves of LR or WD, each once; a group keeps its colour in both."""
    owners: dict[bytes, list[int]] = {}
    for index, group in enumerate(curves.groups):
        owners.setdefault(array("d", getattr(group, field)).tobytes(), []).append(index)
    found = []
    for indices in owners.values():
        first = curves.groups[indices[0]]
        # The only group of a run has no name.
        names = [curves.groups[index].name or "learning rate" for index in indices]
        shown = ", ".join(names[:3])
        label = shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
        color = COLORS[indices[0] % len(COLORS)]
        found.append(_Group(label, color, first.progress, getattr(first, field)))
    return found


def _draw_group(axes: Axes, curves: pb.GetCurvesResponse, group: _Group) -> None:
    """Draw what was used and what is fixed as a solid line, and what is planned as a dashed one."""
    at, values = group.progress, group.values
    split = bisect_left(at, curves.horizon)
    if split:
        _line(axes, at[:split], values[:split], group.color, group.label, linewidth=1.9)
    if split < len(at):
        # From the last one that is fixed, so that the line has no gap.
        begin = max(split - 1, 0)
        label = "_" if split else group.label
        line = _line(axes, at[begin:], values[begin:], group.color, label, linewidth=1.5)
        line.set_linestyle((0, (4, 2)))


# Adjustments and advice.


def _changes(run: pb.Run, curves: pb.GetCurvesResponse) -> list[Marked]:
    """Return the adjustments in the picture in order of progress; the newest have numbers."""
    seen = [item for item in run.adjustments if curves.begin <= item.effective <= curves.end]
    listed = {item.id for item in seen[-_MOST_LISTED:]}
    numbers = iter(range(1, len(listed) + 1))
    ordered = sorted(seen, key=lambda item: item.effective)
    return [Marked(next(numbers) if item.id in listed else None, item) for item in ordered]


def _draw_changes(axes: Axes, changes: Sequence[Marked]) -> None:
    for forgotten, alpha in ((False, 0.35), (True, 0.12)):
        at = [item.effective for _, item in changes if item.forgotten is forgotten]
        transform = axes.get_xaxis_transform()
        axes.vlines(at, 0, 1, INK, linewidth=0.7, alpha=alpha, zorder=1, transform=transform)


def _draw_marks(axes: Axes, curves: pb.GetCurvesResponse, changes: Sequence[Marked]) -> None:
    """Mark each adjustment at the head of a panel: hollow what was not applied; with its number."""
    transform = axes.get_xaxis_transform()
    heights = _heights(curves, changes)
    for forgotten, hollow in product((False, True), repeat=2):
        places = [
            (item.effective, height, 24 if number is None else 150)
            for (number, item), height in zip(changes, heights, strict=True)
            if (item.forgotten, item.mode != "act") == (forgotten, hollow)
        ]
        if places:
            at, levels, sizes = zip(*places, strict=True)
            axes.scatter(
                at,
                levels,
                sizes,
                transform=transform,
                facecolor="white" if hollow else INK,
                edgecolor=INK,
                linewidths=1.2,
                alpha=0.35 if forgotten else 1.0,
                zorder=6,
                clip_on=False,
                gid="marks",
            )
    for (number, item), height in zip(changes, heights, strict=True):
        if number is not None:
            text = axes.text(item.effective, height, str(number), transform=transform, zorder=7)
            text.set(
                horizontalalignment="center",
                verticalalignment="center_baseline",
                fontsize=7.5,
                color="white" if item.mode == "act" else INK,
                alpha=0.35 if item.forgotten else 1.0,
                in_layout=False,
            )


def _heights(curves: pb.GetCurvesResponse, changes: Sequence[Marked]) -> list[float]:
    """Return at which height of the panel each mark stands, so that numbers stay legible."""
    span = max(curves.end - curves.begin, 1)
    ends = [-math.inf] * _LEVELS
    found = []
    for number, item in changes:
        level = 0
        if number is not None:
            place = (item.effective - curves.begin) / span
            # Of many in one place some stand on each other all the same.
            level = next((level for level, end in enumerate(ends) if place > end), 0)
            ends[level] = place + 0.022
        found.append(1 - 0.1 * level)
    return found


def _draw_list(axes: Axes, listed: Sequence[Marked]) -> None:
    axes.set_axis_off()
    for index, (number, item) in enumerate(listed):
        what, who = item.summary or item.action, item.author or item.source
        line = f"at {item.effective:,}: {what}{_moved(item)}, {item.status}; {who}: {item.reason}"
        # What people write may have several lines.
        line = _cut(f"{number}   {' '.join(line.split()).removesuffix(':')}", _LONGEST_LINE)
        place = 1 - (index + 0.5) / len(listed)
        text = axes.text(0, place, line, va="center", fontsize=8.5, transform=axes.transAxes)
        text.set_in_layout(False)
        _label(text)


def _moved(item: pb.Adjustment) -> str:
    """Return the LR of the first group that an adjustment changes, before and after."""
    for before, after in zip(item.before, item.after, strict=False):
        if before != after:
            return f" ({before:.4g} → {after:.4g})"
    return ""


# What the panels share.


def _draw_bands(axes: Axes, curves: pb.GetCurvesResponse, *, is_named: bool) -> None:
    """Draw the stages as bands; a name that would run into the one before is left out."""
    first, last = curves.begin, max(curves.end, curves.begin + 1)
    taken = -1.0
    for index, stage in enumerate(curves.stages):
        begin, end = max(stage.begin, first), min(stage.end, last)
        if begin >= end:
            continue
        axes.axvspan(begin, end, color=_BANDS[index % len(_BANDS)], linewidth=0, zorder=-2)
        middle, half = ((begin + end) / 2 - first) / (last - first), len(stage.name) * 0.0045
        if is_named and middle - half > taken:
            taken = middle + half
            transform = axes.transAxes
            text = axes.text(middle, 1.02, stage.name, ha="center", fontsize=9, transform=transform)
            _label(text, FAINT)


def _draw_present(axes: Axes, curves: pb.GetCurvesResponse, *, is_named: bool) -> None:
    """Shade what is fixed and was not used yet."""
    begin, end = max(curves.progress, curves.begin), min(curves.horizon, curves.end)
    if begin < end:
        label = "fixed, not used yet" if is_named else "_"
        axes.axvspan(begin, end, color=FIXED, linewidth=0, label=label, zorder=-1)


def _dress(axes: Axes, curves: pb.GetCurvesResponse, *, log: bool) -> None:
    if log and any(value > 0 for line in axes.lines for value in _values(line)):
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _decimal(value)))
    axes.set_xlim(curves.begin, max(curves.end, curves.begin + 1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.set_facecolor("white")
    axes.grid(color=GRID_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=FAINT, labelsize=9, which="both")


def _line(
    axes: Axes, at: Sequence[int], values: Sequence[float], color: str, label: str, **style: Any
) -> Any:
    """Draw a line with gaps where values are not finite, and return it."""
    if len(at) < _FEW_POINTS:
        style = {"marker": "o", **style}
    # What begins with an underscore is left out of legends.
    name = f" {label}" if label.startswith("_") and label != "_" else label
    shown = [value if _is_finite(value) else math.nan for value in values]
    (line,) = axes.plot(at, shown, color=color, label=name, markersize=2.5, zorder=3, **style)
    return line


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    first = {label: handle for handle, label in zip(handles, labels, strict=True) if label}
    if not first:
        return
    kept = list(first.items())[:_LONGEST_LEGEND]
    legend = axes.legend(
        [handle for _, handle in kept],
        [_cut(label, _LONGEST_LABEL) for label, _ in kept],
        frameon=True,
        facecolor="white",
        framealpha=0.85,
        edgecolor=GRID_LINE,
        fontsize=8.5,
        loc="best",
    )
    for text in legend.get_texts():
        _label(text)


def _label(text: Text, color: str = INK) -> None:
    """Dress a text; names may hold a dollar sign."""
    text.set_color(color)
    text.set_parse_math(False)


def _is_finite(value: float) -> bool:
    # Comparisons with NaN are false.
    return abs(value) <= _GREATEST


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _values(line: Line2D) -> list[float]:
    """Return the values that a line goes through; NaN is a gap."""
    data: Any = line.get_ydata()
    return [float(value) for value in data]


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'K' else size):.4g}{letter}"
    return f"{value:.4g}"


def _decimal(value: float) -> str:
    """Return a tick's value; small ones as people write LRs, such as 1.5e-4."""
    if not 0 < abs(value) < 1e-2:
        return f"{value:.4g}"
    digits, _, power = f"{value:.3e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
