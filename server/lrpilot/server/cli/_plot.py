"""The picture of a base schedule: LR and WD over progress, stages as bands.

What it shares with other pictures has names without an underscore.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from lrpilot.server.cli._chart import Band, Chart
from lrpilot.server.cli._output import decimal, group_text, short

COLORS = ("#1f5fbf", "#d9601a", "#2a8a4a", "#a0348f", "#8a6d00", "#008b99", "#b02a37", "#555555")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
INK, FAINT, GRID_LINE = "#22262b", "#6b737c", "#dfe3e8"
_BANDS = ("#eef2f8", "#ffffff")

_LONGEST_LEGEND = 12
_NAME_LINES = 3
"""Most lines of stage names; a name that fits into none is left out."""
_LETTER = 0.0085
"""About the width of a letter of a stage's name, as a share of the panel's."""

Row = tuple[float, ...]


def draw_curve(chart: Chart, form: str) -> bytes:
    """Return the picture of a base schedule, as `png` or `svg`.

    Groups with equal curves share a line. The same chart gives the same bytes with one release of
    matplotlib.
    """
    at = chart.groups[0].progress
    names = [group.name for group in chart.groups]
    panels = [("learning rate", [tuple(group.rates) for group in chart.groups])]
    if any(group.decays for group in chart.groups):
        panels.append(("weight decay", [tuple(group.decays) for group in chart.groups]))

    with picture_style():
        figure = Figure(figsize=(10, 3.8 if len(panels) == 1 else 6), layout="constrained")
        ratios = (3, 2)[: len(panels)]
        drawn = figure.subplots(
            len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios}
        )
        for axes, (label, curves) in zip(drawn[:, 0], panels, strict=True):
            _draw_panel(axes, label, at, curves, names)
            draw_bands(axes, chart.bands, at[0], at[-1], named=axes is drawn[0, 0])
        drawn[-1, 0].set_xlabel(f"progress ({chart.unit})")
        figure.suptitle(chart.title, x=0.01, ha="left", weight="bold", size=12)
        return rendered(figure, form)


@contextmanager
def picture_style() -> Iterator[None]:
    """Give pictures their type, and keep what a font lacks off standard error."""
    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.labelcolor": INK,
        "text.color": INK,
        # Names may hold a dollar sign.
        "text.parse_math": False,
        "svg.hashsalt": "lrpilot",
    }
    with mpl.rc_context(style), warnings.catch_warnings():
        # A name in a script that the font lacks shows as boxes, which needs no lines on stderr.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def rendered(figure: Figure, form: str) -> bytes:
    """Return a figure as `png` or `svg`, the same bytes each time with one matplotlib."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else {}
    figure.savefig(buffer, format=form, dpi=150, metadata=metadata)
    return buffer.getvalue()


def _draw_panel(
    axes: Axes, label: str, at: Sequence[int], curves: Sequence[Row], names: Sequence[str]
) -> None:
    shared: dict[Row, list[str]] = {}
    for name, curve in zip(names, curves, strict=True):
        shared.setdefault(curve, []).append(name)
    marker = "o" if len(at) == 1 else None
    for number, (curve, owners) in enumerate(shared.items()):
        # A group keeps its colour in both panels.
        index = names.index(owners[0])
        axes.plot(
            at,
            curve,
            color=COLORS[index % len(COLORS)],
            linestyle=DASHES[index % len(DASHES)],
            linewidth=1.9,
            marker=marker,
            label=group_label(owners) if number < _LONGEST_LEGEND else "_",
            zorder=3,
            clip_on=False,
        )
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    dress(axes)
    if names != [""]:
        axes.legend(frameon=True, framealpha=0.9, edgecolor=GRID_LINE, fontsize=9)


def dress(axes: Axes) -> None:
    """Give a panel over progress its ticks, grid and spines."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: decimal(value)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.margins(x=0)
    axes.grid(color=GRID_LINE, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=FAINT, labelsize=9)


def draw_bands(axes: Axes, bands: Sequence[Band], first: int, last: int, *, named: bool) -> None:
    """Draw stages as bands in a panel from `first` to `last`; `named`: their names above it.

    A name that would run into others is left out.
    """
    # Where the names in each line above the panel end, as shares of its width.
    ends = [-1.0] * _NAME_LINES
    for index, (name, begin, until) in enumerate(bands):
        if begin >= until:
            continue
        axes.axvspan(begin, until, color=_BANDS[index % len(_BANDS)], linewidth=0, zorder=-1)
        middle = ((begin + until) / 2 - first) / (last - first)
        half = len(name) * _LETTER / 2
        line = next((line for line, end in enumerate(ends) if middle - half > end), None)
        if named and line is not None:
            ends[line] = middle + half + _LETTER
            axes.text(
                middle,
                1.02 + 0.055 * line,
                name,
                transform=axes.transAxes,
                ha="center",
                va="bottom",
                fontsize=9,
                color=FAINT,
            )


def group_label(names: Sequence[str]) -> str:
    """Return the legend's text for groups that share a line."""
    label = group_text(names)
    # What begins with an underscore is left out of legends.
    return f" {label}" if label.startswith("_") else label
