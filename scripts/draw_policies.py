"""Draw docs/images/policies: one picture for each policy, of what it does on made-up losses.

Each scene is a spec and a seeded series of losses, which `lrpilot.core.simulate` runs as a server
would. The losses are written beforehand: they do not answer to the LR. With the same releases of
matplotlib and Pillow the bytes are the same.

    python scripts/draw_policies.py [--out FOLDER] [KIND ...]
"""

import argparse
import io
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lrpilot.core import (
    Adjustment,
    Direct,
    Note,
    Report,
    SimulatedStep,
    base_schedule,
    parse_spec,
    simulate,
)
from lrpilot.server.cli._plot import COLORS, FAINT, GRID_LINE, INK, dress, picture_style

FOLDER = Path(__file__).resolve().parents[1] / "docs/images/policies"

_RAW, _SMOOTH, _PLANNED, _ALERT, _ADVICE = "#9db8dc", COLORS[0], "#8a929b", "#b02a37", "#8a6d00"
_WIDTH, _LEFT, _RIGHT = 9.0, 0.8, 0.25
"""Width of a picture, and what is left of its panels and right of them, inches."""
_HEAD, _GAP = 0.56, 0.22
"""Height above the panels and between two of them, inches."""
_LINE, _LETTERS = 0.18, 150
"""Height of a line of the list, inches, and the letters in it."""
_LISTED = 5
_NEWEST = 0.1
"""Weight of the newest loss in the smoothed one."""


@dataclass(frozen=True)
class Scene:
    """One policy, what happens to it, and what it makes of that."""

    spec: Mapping[str, Any]
    """The run, without name and feedback."""
    reports: Sequence[Report]
    title: str
    """What happened and when; `{0}`, `{1}`: where each decision takes effect, in order."""
    panels: tuple[str, ...] = ("loss", "learning rate")
    delay: int = 32


@dataclass(frozen=True)
class Picture:
    """A scene that was run."""

    kind: str
    scene: Scene
    steps: tuple[SimulatedStep, ...]

    @property
    def decided(self) -> tuple[Adjustment, ...]:
        """What the policy of the scene decided, in order; the detectors are left out."""
        found = (item for step in self.steps for item in step.decided)
        return tuple(item for item in found if item.kind == self.kind)

    @property
    def title(self) -> str:
        """What happened and when, with the numbers of the run."""
        places = [f"{item.effective:,}" for item in self.decided]
        return f"{self.kind}: {self.scene.title.format(*places)}"

    @property
    def lines(self) -> tuple[str, ...]:
        """What was decided, a line each."""
        return tuple(_told(item) for item in self.decided)


def run(kind: str) -> Picture:
    """Run the scene of a policy."""
    scene = SCENES[kind]()
    spec = parse_spec({**scene.spec, "name": kind, "feedback": {"delay": scene.delay}})
    return Picture(kind, scene, tuple(simulate(spec, scene.reports)))


def draw(picture: Picture) -> bytes:
    """Return the picture as PNG; its title and lines are in it as text, under `Description`."""
    listed = list(_listed(picture.lines))
    heights = {"loss": 2.1, "global batch": 0.9}
    rows = [(name, heights.get(name, 1.4)) for name in picture.scene.panels]
    tall = _HEAD + sum(height + _GAP for _, height in rows) + 0.32 + _LINE * len(listed)
    with picture_style():
        figure = Figure(figsize=(_WIDTH, tall))
        figure.text(0.01, 1 - 0.22 / tall, picture.title, weight="bold", size=10.5, va="center")
        top = tall - _HEAD
        for index, (name, height) in enumerate(rows):
            top -= height
            place = (_LEFT / _WIDTH, top / tall, 1 - (_LEFT + _RIGHT) / _WIDTH, height / tall)
            axes = figure.add_axes(place)
            dress(axes)
            axes.set_xlim(picture.steps[0].progress, picture.steps[-1].progress)
            axes.set_ylabel(name)
            _PANELS[name](axes, picture)
            _mark(axes, picture, numbered=index == 0)
            axes.tick_params(labelbottom=index == len(rows) - 1)
            if index == len(rows) - 1:
                axes.set_xlabel("progress (iterations)")
            top -= _GAP
        for index, (color, line) in enumerate(listed):
            y = (_LINE * (len(listed) - index - 0.5) + 0.06) / tall
            figure.text(0.012, y, line, size=8, va="center", color=color)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=110)
    about = PngInfo()
    about.add_text("Description", description(picture))
    small = io.BytesIO()
    # A palette: a third of the bytes, and nobody sees it.
    image = Image.open(drawn).convert("RGB").quantize(256)
    image.save(small, format="png", optimize=True, pnginfo=about)
    return small.getvalue()


def description(picture: Picture) -> str:
    """Return the title and what was decided, a line each."""
    return "\n".join((picture.title, *picture.lines))


def _listed(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines[:_LISTED], 1):
        wrapped = textwrap.wrap(f"{number}  {line}", _LETTERS, subsequent_indent="    ")
        yield from ((INK, part) for part in wrapped)
    if len(lines) > _LISTED:
        yield FAINT, f"and {len(lines) - _LISTED} more"


def _told(item: Adjustment) -> str:
    said = "" if item.mode == "act" else f"{item.mode}: "
    there = "" if isinstance(item.change, Note) else f" from {item.effective:,} on"
    return f"on the loss at {item.decided_at:,}: {said}{item.summary}{there}; {item.reason}"


def _draw_loss(axes: Axes, picture: Picture) -> None:
    reports = picture.scene.reports
    losses = [(report.progress, report.loss) for report in reports if report.loss is not None]
    finite = [(at, loss) for at, loss in losses if math.isfinite(loss)]
    average, smooth = finite[0][1], []
    for at, loss in finite:
        average += _NEWEST * (loss - average)
        smooth.append((at, average))
    axes.plot(*zip(*finite, strict=True), color=_RAW, linewidth=0.7, label="loss")
    axes.plot(*zip(*smooth, strict=True), color=_SMOOTH, linewidth=1.6, label="smoothed")
    lost = [at for at, loss in losses if not math.isfinite(loss)]
    if lost:
        axes.plot(
            lost, [0.04] * len(lost), "x", transform=axes.get_xaxis_transform(), color=_ALERT,
            markersize=5, label="not finite",
        )  # fmt: skip
    evaluations = [(r.progress, r.validation["val_loss"]) for r in reports if r.validation]
    if evaluations:
        axes.plot(
            *zip(*evaluations, strict=True), "o-", color=COLORS[1], markersize=3, linewidth=1.2,
            label="val_loss",
        )  # fmt: skip
    _legend(axes)


def _draw_rate(axes: Axes, picture: Picture) -> None:
    spec = parse_spec({**picture.scene.spec, "name": picture.kind})
    planned = base_schedule(spec)
    at = [step.progress for step in picture.steps]
    _draw_values(
        axes,
        at,
        [step.learning_rates[0] for step in picture.steps],
        [planned(progress)[0][0] for progress in at],
    )
    advised = [item for item in picture.decided if item.mode == "advise"]
    for item in advised:
        axes.plot(
            item.effective, item.after[0], "o", color=_ADVICE, markerfacecolor="white",
            markersize=5, label="advised" if item is advised[0] else "_", zorder=4,
        )  # fmt: skip
    _legend(axes)


def _draw_decay(axes: Axes, picture: Picture) -> None:
    used = [(step.weight_decays or (0.0,))[0] for step in picture.steps]
    planned = [picture.scene.spec["weight_decay"]] * len(used)
    _draw_values(axes, [step.progress for step in picture.steps], used, planned)
    _legend(axes)


def _draw_batch(axes: Axes, picture: Picture) -> None:
    batches = [(report.progress, report.batch or 0) for report in picture.scene.reports]
    axes.step(*zip(*batches, strict=True), color=COLORS[2], linewidth=1.6, where="post")
    axes.set_ylim(0, 1.2 * max(batch for _, batch in batches))


def _draw_values(
    axes: Axes, at: Sequence[int], used: Sequence[float], planned: Sequence[float]
) -> None:
    axes.plot(at, planned, color=_PLANNED, linewidth=1.1, linestyle=(0, (4, 3)), label="spec")
    axes.plot(at, used, color=COLORS[0], linewidth=1.9, label="used", zorder=3)
    axes.set_ylim(0, 1.25 * max(*used, *planned))


_PANELS: dict[str, Callable[[Axes, Picture], None]] = {
    "loss": _draw_loss,
    "learning rate": _draw_rate,
    "weight decay": _draw_decay,
    "global batch": _draw_batch,
}


def _legend(axes: Axes) -> None:
    axes.legend(
        loc="upper right", ncols=4, fontsize=8, framealpha=0.9, edgecolor=GRID_LINE,
        borderaxespad=0.2,
    )  # fmt: skip


def _mark(axes: Axes, picture: Picture, *, numbered: bool) -> None:
    """Mark where each decision takes effect, and on which loss it was made."""
    last_at = -math.inf
    width = picture.steps[-1].progress - picture.steps[0].progress
    for number, item in enumerate(picture.decided, 1):
        color = _ADVICE if item.mode == "advise" else _alert_or_ink(item)
        at = item.decided_at if isinstance(item.change, Note) else item.effective
        axes.axvline(at, color=color, linewidth=0.9, linestyle=(0, (1, 2)), zorder=2)
        if numbered and number <= _LISTED:
            # Decisions at one place, as a hold and its directive, share a label.
            side = "left" if at - last_at < 0.015 * width else "center"
            axes.text(
                at, 1.01, f" +{number}" if side == "left" else str(number),
                transform=axes.get_xaxis_transform(),
                ha=side, va="bottom", fontsize=8, color=color, weight="bold",
            )  # fmt: skip
            last_at = at


def _alert_or_ink(item: Adjustment) -> str:
    return _ALERT if isinstance(item.change, Direct) else INK


# The scenes.


def _falling(n: float, best: float = 2.2, scale: float = 250.0) -> float:
    """Return a loss at n that falls from 5 to `best`."""
    return best + (5.0 - best) * math.exp(-n / scale)


def _noisy(
    loss: Callable[[int], float], total: int, seed: int, noise: float = 0.05
) -> list[Report]:
    random = Random(seed)
    return [_report(n, loss(n) + random.gauss(0.0, noise)) for n in range(total)]


def _report(n: int, loss: float, every: int = 1, **seen: Any) -> Report:
    return Report(n, loss, 1.0, n + every, **seen)


def _cosine(total: int, warmup: int = 50) -> dict[str, Any]:
    rates = {"peak": 1e-3, "min": 1e-4, "warmup": warmup, "decay": {"style": "cosine"}}
    return {"total": total, "learning_rate": rates}


def _constant(total: int, warmup: int = 50) -> dict[str, Any]:
    return {"total": total, "learning_rate": {"peak": 1e-3, "warmup": warmup}}


def _nonfinite() -> Scene:
    lost = {300, *range(600, 621)}
    reports = [
        replace(report, loss=math.nan) if report.progress in lost else report
        for report in _noisy(_falling, 1200, 1)
    ]
    return Scene(
        {**_cosine(1200), "policies": [{"kind": "nonfinite", "mode": "act"}]},
        reports,
        "one NaN changes nothing; three in a row hold LR and WD from {0} on, and ask to go back",
    )


def _spike() -> Scene:
    def loss(n: int) -> float:
        if n == 350:
            return 4.6
        return _falling(n) + (1.0 if 700 <= n < 1230 else 0.0)

    return Scene(
        {**_constant(1800), "policies": [{"kind": "spike", "mode": "act"}]},
        _noisy(loss, 1800, 2),
        "one outlier changes nothing; a spike that stays cuts the LR at {1}, and more at {3}",
    )


def _divergence() -> Scene:
    def loss(n: int) -> float:
        return _falling(n) + 2.2 * min(1.0, max(0, n - 600) / 150)

    return Scene(
        {**_constant(1000), "policies": [{"kind": "divergence", "mode": "act"}]},
        _noisy(loss, 1000, 3),
        "the loss rises from 600 on; a cut at {0} does not help: asks at {1} to go back",
    )


def _warmup_guard() -> Scene:
    def loss(n: int) -> float:
        return _falling(n, scale=80.0) + 1.2 * math.exp(-(((n - 260) / 60) ** 2))

    return Scene(
        {**_cosine(1200, 400), "policies": [{"kind": "warmup-guard"}]},
        _noisy(loss, 1200, 4),
        "the loss rises in the warmup: from {0} on the rest of it takes twice as long",
    )


def _plateau() -> Scene:
    def loss(n: int) -> float:
        later = math.exp(-max(0, n - 840) / 50)
        return _falling(n, 2.2, 80.0) + 0.3 * later

    return Scene(
        {**_constant(1600), "policies": [{"kind": "plateau", "window": 20, "threshold": 2e-3}]},
        _noisy(loss, 1600, 5, noise=0.015),
        "the loss stops falling: LR x 0.5 at {0}, and again at {1}",
    )


def _greedy() -> Scene:
    def loss(n: int) -> float:
        return 3.0 - 0.001 * (n - min(max(0, n - 300), 200))

    policy = {"kind": "greedy", "factor": 0.9, "smooth": True, "window": 20}
    return Scene(
        {**_constant(1000, 0), "policies": [policy]},
        _noisy(loss, 1000, 14, noise=0.004),
        "the LR goes down while the loss stands still, from {0} on, and up while it falls",
        delay=16,
    )


def _decay_on_plateau() -> Scene:
    def loss(n: int) -> float:
        return _falling(n, 2.4, 120.0) - 0.2 * (1 - math.exp(-max(0, n - 1432) / 40))

    rates = {
        "peak": 1e-3,
        "min": 1e-5,
        "warmup": 50,
        "decay": {"style": "wsd", "anneal": "10%", "anneal_style": "minus_sqrt"},
    }
    policy = {"kind": "decay-on-plateau", "window": 50, "threshold": 2e-3}
    return Scene(
        {"total": 2400, "learning_rate": rates, "policies": [policy]},
        _noisy(loss, 1700, 7, noise=0.02),
        "the stable phase no longer pays: the anneal begins at {0}, not at 2,160",
    )


def _slow_convergence() -> Scene:
    random = Random(8)
    reports = [
        _report(n, 3.4 - 0.04 * math.log10(n + 1) + random.gauss(0.0, 0.02), every=10)
        for n in range(0, 30_000, 10)
    ]
    policy = {"kind": "slow-convergence", "again": 1000}
    return Scene(
        {**_cosine(40_000, 500), "policies": [policy]},
        reports,
        "falls by 0.04 a decade; advises a higher peak at {0}, a steeper decay at {1}",
    )


def _overfit() -> Scene:
    random = Random(9)
    reports = []
    for n in range(2400):
        loss = _falling(n, 2.0, 300.0) - 0.0004 * n + random.gauss(0.0, 0.05)
        value = _falling(n, 2.5, 250.0) + 0.0007 * max(0, n - 700)
        seen = {"val_loss": value} if n % 50 == 49 else {}
        reports.append(_report(n, loss, validation=seen))
    return Scene(
        {**_constant(2400), "weight_decay": 0.1, "policies": [{"kind": "overfit"}]},
        reports,
        "val_loss rises, the loss falls: WD up from {0} on, and the LR down at {4}",
        panels=("loss", "weight decay", "learning rate"),
    )


def _batch_size() -> Scene:
    def batch(n: int) -> int:
        return 256 if n < 400 else 512 if n < 800 else 1024

    reports = [replace(item, batch=batch(item.progress)) for item in _noisy(_falling, 1200, 10)]
    return Scene(
        {**_cosine(1200), "policies": [{"kind": "batch-size"}]},
        reports,
        "the batch doubles at 400 and at 800: LR x sqrt(2) at {0}, x 2 at {2}",
        panels=("loss", "global batch", "learning rate"),
    )


SCENES: Mapping[str, Callable[[], Scene]] = {
    "nonfinite": _nonfinite,
    "spike": _spike,
    "divergence": _divergence,
    "warmup-guard": _warmup_guard,
    "plateau": _plateau,
    "greedy": _greedy,
    "decay-on-plateau": _decay_on_plateau,
    "slow-convergence": _slow_convergence,
    "overfit": _overfit,
    "batch-size": _batch_size,
}
"""By kind of policy."""


def main() -> None:
    """Draw the pictures that are asked for; all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="default: every policy")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for kind in arguments.kinds or SCENES:
        picture = run(kind)
        (arguments.out / f"{kind}.png").write_bytes(draw(picture))
        print(description(picture).replace("\n", "\n  "))


if __name__ == "__main__":
    main()
