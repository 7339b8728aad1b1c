"""Pictures in a terminal: what stands where, and what a terminal cannot show."""

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from rich.console import Console
from typer.testing import Result

from lrpilot.server.cli._chart import (
    Chart,
    Decision,
    GroupCurve,
    Point,
    chart_of_run,
    split,
)
from lrpilot.server.cli._screen import RunView, joined
from lrpilot.server.cli._terminal import ChartView, Plain
from lrpilot.v1 import runs_pb2
from tests.terminal import Terminal

Cli = Callable[..., Result]
SpecFile = Callable[..., str]

WIDTH, HEIGHT = 80, 30


def chart(**fields: Any) -> Chart:
    """Return a run of 1,000 that is at 400: its LR falls from 4e-4 to 0, its loss from 4 to 2."""
    at = [0, 1000]
    falling = [Point(n, 4.0 - 2.0 * n / 400) for n in range(0, 401, 10)]
    whole = Chart(
        title="a run",
        unit="samples",
        first=0,
        last=1000,
        groups=[GroupCurve("", at, [4e-4, 0.0], [4e-4, 0.0], [0.1, 0.1])],
        losses=falling,
        smoothed=falling,
        progress=400,
        horizon=400,
    )
    return replace(whole, **fields)


def drawn(
    shown: Chart, width: int = WIDTH, height: int = HEIGHT, encoding: str = "ascii", **options: Any
) -> list[str]:
    """Return the lines of a chart on a terminal without colours."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    console = Console(file=file, width=width, height=height, _environ={})
    console.print(Plain(ChartView(shown, height=height, **options)))
    file.flush()
    return file.buffer.getvalue().decode(encoding).splitlines()


class Panel:
    """One plot of a chart, in ASCII."""

    def __init__(self, lines: Sequence[str], title: str) -> None:
        start = next(index for index, line in enumerate(lines) if line.startswith(title))
        self.title = lines[start]
        body = lines[start + 1 :]
        rows: list[tuple[str, str]] = []
        for line in body:
            found = re.match(r"( *(?:[-+.0-9e]+)?)\|", line)
            if found is None and rows:
                break
            if found is not None:
                rows.append((found[1].strip(), line[found.end() :]))
        self.left = len(re.match(r" *[-+.0-9e]*\|", body[1] if "|" in body[1] else body[0])[0])  # type: ignore[index]
        self.labels = {index: float(label) for index, (label, _) in enumerate(rows) if label}
        self.rows = [row.ljust(WIDTH - self.left) for _, row in rows]
        self.above = body[0][self.left :] if "|" not in body[0] else ""
        self.width = len(self.rows[0])

    def columns(self, sign: str) -> list[int]:
        """Return the columns with a sign in them."""
        return sorted({c for row in self.rows for c, letter in enumerate(row) if letter == sign})

    def row_of(self, column: int, signs: str) -> list[int]:
        """Return the rows in which one of the signs stands in a column."""
        return [index for index, row in enumerate(self.rows) if row[column] in signs]


def test_curves_stand_where_their_values_are() -> None:
    rates = Panel(drawn(chart()), "learning rate")
    # The greatest value is at the left, at the top, and labelled; the least at the right.
    assert rates.labels[0] == 4e-4
    assert rates.labels[len(rates.rows) - 1] == 0.0
    assert rates.row_of(0, "*.") == [0]
    assert rates.row_of(rates.width - 1, "*.") == [len(rates.rows) - 1]
    # Half way it is at half the height.
    for row in rates.row_of(rates.width // 2, "*."):
        assert row == pytest.approx((len(rates.rows) - 1) / 2, abs=1)
    losses = Panel(drawn(chart()), "loss")
    assert losses.row_of(0, "*.") == [0]
    assert max(losses.labels.values()) == 4.0
    assert losses.columns("*")[-1] == pytest.approx(0.4 * losses.width, abs=1)


def test_past_and_plan_are_told_apart_at_the_progress() -> None:
    lines = drawn(chart())
    rates = Panel(lines, "learning rate")
    now = rates.above.index("v")
    assert now == pytest.approx(0.4 * (rates.width - 1), abs=1)
    assert set(rates.columns("|")) == {now}
    assert max(rates.columns("*")) <= now
    assert min(rates.columns(".")) >= now
    assert max(rates.columns(".")) == rates.width - 1
    assert "* fixed" in rates.title
    assert ". planned" in rates.title
    # What is told apart by nothing is all one line.
    plain = Panel(drawn(chart(progress=None, horizon=None)), "learning rate")
    assert (plain.columns("."), plain.columns("|"), plain.above) == ([], [], "")
    assert lines[-1].split()[-2:] == ["1000", "samples"]


def test_the_base_shows_where_adjustments_have_left_it() -> None:
    curve = GroupCurve("", [0, 499, 500, 1000], [4e-4, 4e-4, 2e-4, 2e-4], [4e-4] * 4, [])
    rates = Panel(drawn(chart(groups=[curve], progress=None, horizon=None)), "learning rate")
    assert min(rates.columns("-")) == pytest.approx(rates.width / 2, abs=2)
    assert rates.row_of(rates.width - 2, "-") == [0]
    (used,) = rates.row_of(rates.width - 2, "*")
    assert rates.labels[used] == 2e-4
    assert "base" not in Panel(drawn(chart()), "learning rate").title


def test_decisions_have_their_numbers_above_them() -> None:
    decisions = [
        Decision(200, 168, is_applied=True, text="first"),
        Decision(600, 568, is_applied=False, text="second"),
        # Off the picture.
        Decision(2000, 968, is_applied=True, text="third"),
    ]
    for name in ("loss", "learning rate"):
        panel = Panel(drawn(chart(decisions=decisions)), name)
        for number, share in (("1", 0.2), ("(2)", 0.6)):
            middle = panel.above.index(number) + len(number) // 2
            assert middle == pytest.approx(share * (panel.width - 1), abs=1)
        bars = panel.columns(":")
        assert len(bars) == 2
        assert "3" not in panel.above


def test_of_numbers_that_would_touch_the_newest_shows() -> None:
    near = [Decision(500 + n, 0, is_applied=True, text="") for n in range(3)]
    above = Panel(drawn(chart(decisions=near)), "loss").above
    assert above.split() == ["v", "3"]


def test_what_is_not_finite_or_far_above_stands_at_the_edge() -> None:
    losses = [*chart().losses, Point(405, 1e9)]
    panel = Panel(drawn(chart(losses=losses, missing=[800, 801])), "loss")
    assert "x 2 not finite" in panel.title
    assert "^ 1 above" in panel.title
    assert max(panel.labels.values()) < 20
    assert panel.rows[0].index("x") == pytest.approx(0.8 * (panel.width - 1), abs=1)
    assert panel.rows[0].index("^") == pytest.approx(0.405 * (panel.width - 1), abs=1)
    alone = drawn(chart(losses=[], smoothed=[], missing=[500]))
    assert "x 1 not finite" in alone[0]


def test_logarithmic_axes() -> None:
    at = list(range(0, 1001, 10))
    rates = [0.0] + [10.0 ** (-2 - n / 500) for n in at[1:]]
    losses = [Point(n, value) for n, value in zip(at, [0.0, *rates[1:]], strict=True)]
    logarithmic = chart(
        groups=[GroupCurve("", at, rates, rates, [])],
        losses=losses,
        smoothed=losses,
        progress=None,
        horizon=None,
    )
    for name in ("learning rate", "loss"):
        panel = Panel(drawn(logarithmic, log=True), name)
        powers = [math.log10(value) for value in panel.labels.values()]
        assert powers == sorted(powers, reverse=True)
        assert all(power == pytest.approx(round(power)) for power in powers)
        # A straight line: half way it is at half the height. The LR of 0 is not there.
        (middle,) = panel.row_of(panel.width // 2, "*")
        assert middle == pytest.approx((len(panel.rows) - 1) / 2, abs=1)
        assert panel.row_of(panel.width - 1, "*") == [len(panel.rows) - 1]


def test_groups_with_equal_values_share_a_line() -> None:
    curve = chart().groups[0]
    groups = [
        replace(curve, name="a"),
        replace(curve, name="b"),
        replace(curve, name="c", rates=[2e-4, 0.0], base=[2e-4, 0.0]),
    ]
    lines = drawn(chart(groups=groups, progress=None, horizon=None), encoding="utf-8")
    rates = next(line for line in lines if line.startswith("learning rate"))
    assert [part.strip() for part in rates.split("━")[1:]] == ["a, b", "c"]
    decays = next(line for line in lines if line.startswith("weight decay"))
    assert "a, b, c" in decays


def test_of_many_groups_some_are_drawn_and_the_others_counted() -> None:
    groups = [
        replace(chart().groups[0], name=f"g{n}", rates=[n * 1e-4, 0.0], base=[])
        for n in range(1, 8)
    ]
    title = Panel(drawn(chart(groups=groups), 120), "learning rate").title
    assert "g4" in title
    assert "g5" not in title
    assert "and 3 more" in title


def test_a_run_without_losses_says_so() -> None:
    lines = drawn(chart(losses=[], smoothed=[], progress=0, horizon=8))
    assert any("no loss yet" in line for line in lines)
    rates = Panel(lines, "learning rate")
    assert len(rates.columns(".")) > rates.width - 3
    none = drawn(chart(losses=[], smoothed=[]), losses=False)
    assert not any("loss" in line for line in none)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [(0.0, 0.0), (1.0, 1.0), (5e-324, 5e-324), (0.0, 5e-324), (-1e308, 1e308), (1e308, 1.7e308),
     (1.0, math.nextafter(1.0, 2.0)), (-3.0, -1.0)],
    ids=str,
)  # fmt: skip
def test_any_finite_values_are_drawn(values: tuple[float, float], log: bool) -> None:
    points = [Point(0, values[0]), Point(2**53, values[1])]
    rates = [abs(value) for value in values]
    curve = GroupCurve("", [0, 2**53], rates, rates[::-1], rates)
    shown = chart(
        last=2**53, groups=[curve], losses=points, smoothed=points, progress=2**52, horizon=2**52
    )
    lines = drawn(shown, log=log)
    assert len(lines) == HEIGHT
    assert lines[-1].split()[-1] == "samples"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.parametrize("width", [1, 2, 5, 23, 24, 40, 71, 72, 139, 140, 300])
@pytest.mark.parametrize("height", [1, 2, 4, 5, 6, 9, 12, 24])
def test_every_size_is_filled_and_none_is_exceeded(width: int, height: int, encoding: str) -> None:
    decisions = [Decision(300, 268, is_applied=True, text="")]
    lines = drawn(chart(decisions=decisions, missing=[77]), width, height, encoding)
    assert len(lines) == height
    assert max(map(len, lines)) <= width


def test_one_step_is_a_picture() -> None:
    curve = GroupCurve("", [0], [1e-3], [1e-3], [])
    once = [Point(0, 2.5)]
    shown = chart(last=1, groups=[curve], losses=once, smoothed=once, progress=0, horizon=1)
    losses = Panel(drawn(shown), "loss")
    assert losses.columns("*") == [0] or losses.columns(".") == [0]
    assert any(value == 2.5 for value in losses.labels.values())


def test_a_curve_is_split_where_the_plan_begins() -> None:
    points = [Point(0, 0.0), Point(10, 1.0), Point(20, 1.0)]
    assert split(points, None) == (points, [])
    assert split(points, 20) == (points, [])
    assert split(points, 0) == ([], points)
    fixed, planned = split(points, 5)
    assert fixed == [Point(0, 0.0), Point(5, 0.5)]
    assert planned == [Point(5, 0.5), *points[1:]]
    assert split([], 5) == ([], [])


# A run as the server tells it.


def curve_of(points: Sequence[tuple[int, float]]) -> runs_pb2.Curve:
    return runs_pb2.Curve(progress=[at for at, _ in points], value=[value for _, value in points])


def run(**fields: Any) -> runs_pb2.Run:
    known: dict[str, Any] = {
        "name": "a",
        "state": runs_pb2.RUN_STATE_RUNNING,
        "unit": "tokens",
        "total": 1000,
        "progress": 500,
        "frontier": 501,
        "horizon": 532,
        "values": [runs_pb2.GroupValues(learning_rate=2e-4)],
    }
    return runs_pb2.Run(**(known | fields))


def test_a_chart_of_a_run_counts_what_counts() -> None:
    curves = runs_pb2.GetCurvesResponse(
        end=1000,
        progress=500,
        horizon=532,
        losses=[
            runs_pb2.LossCurve(
                attempt=1,
                forgotten_from=20,
                loss=curve_of([(10, 3.0), (15, math.nan), (20, 9.0), (21, math.inf)]),
            ),
            runs_pb2.LossCurve(attempt=2, begin=20, loss=curve_of([(20, 2.0), (30, -math.inf)])),
        ],
        smoothed_loss=curve_of([(10, 3.0), (20, 2.5)]),
        groups=[
            runs_pb2.GroupCurve(
                progress=[0, 1000], learning_rate=[1e-3, 0.0], base_learning_rate=[1e-3, 0.0]
            )
        ],
        stages=[runs_pb2.StageSpan(name="warm", begin=0, end=100)],
    )
    statuses = ("in force", "forgotten", "undone", "advice", "held back", "expired", "planned")
    adjustments = [
        runs_pb2.Adjustment(id=f"{n}-1-0", effective=100 + n, status=status, summary="LR x 0.5")
        for n, status in enumerate(statuses)
    ]
    shown = chart_of_run(run(adjustments=adjustments), curves)
    assert shown.losses == [Point(10, 3.0), Point(20, 2.0)]
    assert shown.missing == [15, 30]
    assert shown.forgotten == [[Point(20, 9.0)]]
    assert (shown.first, shown.last, shown.progress, shown.horizon) == (0, 1000, 500, 532)
    assert [item.effective for item in shown.decisions] == [100, 103, 106]
    assert [item.sign(3) for item in shown.decisions] == ["3", "(3)", "3"]
    assert "advice (lrpilot run approve a 3-1-0)" in shown.decisions[1].text
    many = [adjustments[0]] * 20
    assert (
        chart_of_run(run(adjustments=many), curves).more
        == "and 8 older ones: lrpilot run history a"
    )


def test_the_newest_part_of_curves_takes_the_place_of_what_was_planned() -> None:
    def answer(begin: int, end: int, rate: float) -> runs_pb2.GetCurvesResponse:
        points = [(n, float(n)) for n in range(begin, end)]
        return runs_pb2.GetCurvesResponse(
            begin=begin,
            end=100,
            progress=end,
            losses=[runs_pb2.LossCurve(attempt=1, loss=curve_of(points))],
            smoothed_loss=curve_of(points),
            groups=[
                runs_pb2.GroupCurve(
                    progress=[begin, 100],
                    learning_rate=[rate, rate],
                    base_learning_rate=[1.0, 1.0],
                    weight_decay=[0.1, 0.1],
                )
            ],
        )

    whole = joined(answer(0, 20, 1.0), answer(15, 40, 0.5))
    assert list(whole.losses[0].loss.progress) == list(range(40))
    assert list(whole.losses[0].loss.value) == [float(n) for n in range(40)]
    assert list(whole.smoothed_loss.progress) == list(range(40))
    assert list(whole.groups[0].progress) == [0, 15, 100]
    assert list(whole.groups[0].learning_rate) == [1.0, 0.5, 0.5]
    assert (whole.begin, whole.end, whole.progress) == (0, 100, 40)
    # Attempts that the newest part knows nothing of stay; new ones follow.
    other = answer(15, 40, 0.5)
    other.losses[0].attempt = 2
    assert [item.attempt for item in joined(answer(0, 20, 1.0), other).losses] == [1, 2]


def screen(view: RunView, width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, _environ={}, record=True)
    console.print(view, height=height)
    return console.export_text().splitlines()


def view_of(shown: runs_pb2.Run, losses: Mapping[int, float] = MappingProxyType({})) -> RunView:
    drawn_losses = {n: 3.0 - n / 500 for n in range(500)} | dict(losses)
    curves = runs_pb2.GetCurvesResponse(
        end=1000,
        progress=500,
        horizon=532,
        losses=[runs_pb2.LossCurve(attempt=1, loss=curve_of(list(drawn_losses.items())))],
        groups=[runs_pb2.GroupCurve(progress=[0, 1000], learning_rate=[1e-3, 0.0])],
    )
    events = [runs_pb2.Event(seq=n, summary=f"event {n}") for n in range(9, 0, -1)]
    return RunView(shown, curves, events, log=False)


def test_trouble_comes_first_on_a_screen() -> None:
    ranks = runs_pb2.Ranks(
        active=8,
        waiting=2,
        blocked_s=12.34,
        slowest=[runs_pb2.RankLag(rank=3, progress=460, lag=40)],
    )
    troubled = run(forgotten="the log has forgotten it", ranks=ranks, held=True, loss=2.0)
    lines = screen(view_of(troubled), 100, 40)
    assert lines[0].startswith("a  forgotten")
    assert lines[1].strip() == "the log has forgotten it"
    assert lines[2].strip() == (
        "2 training threads blocked for 12.3 s: 8 ranks active, 2 waiting; slowest rank 3 at 460, "
        "40 behind"
    )
    assert lines[3].startswith("held        LR and WD are frozen")
    assert lines[4].split() == ["progress", "500", "of", "1,000", "tokens", "(50.0%)"]
    quiet = screen(view_of(run()), 100, 40)
    assert quiet[1].startswith("progress")


@pytest.mark.parametrize(("at", "is_trouble"), [(460, True), (440, False)])
def test_a_loss_that_was_not_finite_is_trouble_only_lately(at: int, is_trouble: bool) -> None:
    view = view_of(run(frontier=500, losses=500, nonfinite_losses=1), {at: math.nan})
    text = "1 loss not finite, the last at"
    assert (screen(view, 100, 40)[1].strip() == f"{text} {at}") == is_trouble


@pytest.mark.parametrize("width", [1, 10, 40, 80, 200])
@pytest.mark.parametrize("height", [1, 3, 8, 12, 24, 50])
def test_a_screen_of_every_size_is_filled_to_the_last_line(width: int, height: int) -> None:
    adjustments = [
        runs_pb2.Adjustment(id=f"{n}", effective=100 * n, status="in force", reason="word " * 60)
        for n in range(1, 6)
    ]
    lines = screen(view_of(run(adjustments=adjustments)), width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    if width >= 10 and height >= 12:
        assert any("loss" in line for line in lines)
    if width >= 40 and height >= 24:
        # The newest decisions and events, whatever else there is.
        assert any(line.startswith("   5 at 500") for line in lines)
        assert any("event 9" in line for line in lines)


# The commands on terminals.


@pytest.fixture
def terminals() -> Iterator[Callable[..., Terminal]]:
    """Start `lrpilot` on terminals."""
    started: list[Terminal] = []

    def start(*arguments: str, **options: Any) -> Terminal:
        started.append(Terminal(*arguments, **options))
        return started[-1]

    yield start
    for terminal in started:
        terminal.dispose()


LOSSES = "progress,loss\n" + "".join(f"{n},2\n" for n in range(0, 900, 10)) + "900,nan\n"
CUTTING = """
name: cutting
total: 1000
learning_rate: {peak: 1e-3}
policies: [{kind: plateau, factor: 0.5, patience: 4, cooldown: 2000}]
"""


@pytest.fixture
def losses_file(tmp_path: Any) -> str:
    path = tmp_path / "losses.csv"
    path.write_text(LOSSES)
    return str(path)


def test_curve_draws_on_a_terminal_alone(
    cli: Cli, spec_file: SpecFile, specs: Any, terminals: Any
) -> None:
    path = spec_file(specs.plain)
    terminal = terminals("curve", path, size=(80, 30))
    assert terminal.ended() == 0
    lines = [line for line in terminal.screen.splitlines() if line]
    assert lines[0] == "small: base schedule"
    assert lines[1].startswith("learning rate")
    assert any(line.startswith("weight decay") for line in lines)
    assert re.match(r" *2e-4┤ +[⠀-⣿]", lines[2])
    assert lines[-1].split()[-2:] == ["1000", "iterations"]
    assert "\x1b[" in terminal.raw
    # Rows where they are asked for, and in a pipe.
    rows = terminals("curve", path, "--every", "500")
    assert rows.ended() == 0
    assert rows.screen.splitlines()[0].split() == ["progress", "lr", "weight_decay"]
    table = terminals("curve", path, "--format", "table", size=(80, 60))
    assert table.ended() == 0
    assert table.screen.strip().splitlines() == cli("curve", path).stdout.splitlines()
    forced = cli("curve", path, "--format", "terminal")
    assert (forced.exit_code, forced.stderr) == (0, "")
    assert "\x1b" not in forced.stdout
    assert "2e-4┤" in forced.stdout
    assert max(map(len, forced.stdout.splitlines())) == 100


def test_simulate_draws_on_a_terminal_alone(
    cli: Cli, spec_file: SpecFile, losses_file: str, terminals: Any
) -> None:
    path = spec_file(CUTTING)
    terminal = terminals("simulate", path, "--losses", losses_file, size=(80, 36))
    assert terminal.ended() == 0
    text = terminal.screen
    assert "cutting: simulation of 91 losses" in text
    assert "x 1 not finite" in text
    told = " ".join(text.split())
    assert "1 at 82 (plateau): LR x 0.5; on the loss at 50: loss 2: none below 2" in told
    table = cli("simulate", path, "--losses", losses_file).stdout
    assert text.strip().splitlines()[-1] == table.splitlines()[-1]
    assert "┤" not in table
    forced = cli("simulate", path, "--losses", losses_file, "--format", "terminal", "--log").stdout
    assert forced.splitlines()[-1] == table.splitlines()[-1]
    assert "1e-3┤" in forced


def test_no_colour_and_no_unicode_where_there_is_none(
    spec_file: SpecFile, losses_file: str, terminals: Any
) -> None:
    path = spec_file(CUTTING)
    plain = terminals("simulate", path, "--losses", losses_file, env={"NO_COLOR": "1"})
    assert plain.ended() == 0
    assert "LR x 0.5" in plain.screen
    styles = {
        code for found in re.findall(r"\x1b\[([0-9;]*)m", plain.raw) for code in found.split(";")
    }
    # Bold and dim are no colours.
    assert styles <= {"", "0", "1", "2"}
    old = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    ascii_only = terminals("simulate", path, "--losses", losses_file, env=old)
    assert ascii_only.ended() == 0
    assert ascii_only.raw.isascii()
    assert "?" not in ascii_only.screen
    assert re.search(r"1e-3\|\*{3}", ascii_only.screen)


def test_a_terminal_of_40_columns(spec_file: SpecFile, losses_file: str, terminals: Any) -> None:
    terminal = terminals("simulate", spec_file(CUTTING), "--losses", losses_file, size=(40, 30))
    assert terminal.ended() == 0
    assert "learning rate" in terminal.screen


def test_a_picture_in_a_terminal_goes_nowhere_else(cli: Cli, spec_file: SpecFile) -> None:
    result = cli("curve", spec_file(), "--format", "terminal", "-o", "a.txt")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "error: --format terminal goes to standard output: give -o a file of .png or .svg\n"
    )
