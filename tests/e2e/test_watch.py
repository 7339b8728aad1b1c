"""`lrpilot run watch` on a terminal, while a real client trains on a real server."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import lrpilot.client as lrpilot
from tests.e2e.harness import Spec
from tests.e2e.training import Optimizer
from tests.server.conftest import Program
from tests.terminal import Terminal

Servers = Callable[..., Program]
Terminals = Callable[..., Terminal]
Connect = Callable[..., lrpilot.Pilot]

QUICK = ("--refresh-s", "0.1")


def spec(name: str = "watched", **fields: Any) -> Spec:
    """Return a spec whose LR halves at 9 + 8: the loss at 9 is the ninth that is no better."""
    return {
        "name": name,
        "total": 200,
        "learning_rate": {"peak": 4e-4},
        "weight_decay": 0.1,
        "policies": [{"kind": "plateau", "patience": 8, "factor": 0.5, "cooldown": 1000}],
        "feedback": {"delay": 8, "timeout": "60s"},
    } | fields


@pytest.fixture
def terminals() -> Iterator[Terminals]:
    """Start `lrpilot` on terminals."""
    started: list[Terminal] = []

    def start(*arguments: str, **options: Any) -> Terminal:
        started.append(Terminal(*arguments, **options))
        return started[-1]

    yield start
    for terminal in started:
        terminal.dispose()


class Job:
    """A training in this process, that goes on when it is told to."""

    def __init__(self, connect: Connect, address: str, document: Spec) -> None:
        self.pilot = connect(address, document["name"], spec=document, resume_at=0)
        self._scheduler = self.pilot.scheduler(Optimizer())

    def train(self, steps: int, loss: float = 2.0) -> None:
        for _ in range(steps):
            self._scheduler.step(loss=loss)


def columns_of(lines: list[str], sign: str) -> set[int]:
    return {column for line in lines for column, letter in enumerate(line) if letter == sign}


@pytest.mark.parametrize("size", [(80, 24), (200, 50)], ids=["80x24", "200x50"])
def test_a_cut_shows_while_a_client_trains(
    servers: Servers, terminals: Terminals, connect: Connect, size: tuple[int, int]
) -> None:
    server = servers()
    job = Job(connect, server.grpc, spec())
    job.train(8)
    terminal = terminals("run", "watch", "watched", "--server", server.grpc, *QUICK, size=size)
    first = terminal.wait_for("8 of 200 iterations (4.0%)")
    assert terminal.is_full_screen
    assert not terminal.is_cursor_shown
    assert first.startswith("watched  running")
    assert "LR 0.0004, WD 0.1" in first
    assert "LR x 0.5" not in first
    assert "attempt 1 opened at progress 0" in first
    assert "created by a trainer" in first
    # The axes end where the data does, and progress is in the run's unit.
    assert "200 iterations" in first
    assert "4e-4" in first
    job.train(92)
    last = terminal.wait_for(lambda screen: "100 of 200" in screen and "LR x 0.5" in screen)
    assert "LR 0.0002, WD 0.1" in last
    told = " ".join(last.partition("the newest first")[2].split())
    assert told.startswith(
        "1 at 17 (policies.0 (plateau)): LR x 0.5, in force, LR 0.0004 → 0.0002: loss 2: none below"
    )
    # Its number stands above the dotted bar in each panel, and the ranks in the middle.
    lines = last.splitlines()
    number, now = (next(line for line in lines if sign in line and "▼" in line) for sign in "1▼")
    assert number.index("1") in columns_of(lines, "┊")
    assert now.index("▼") in columns_of(lines, "│")
    axis = next(line for line in lines if "└" in line)
    panel = axis.index("└") + 1, axis.index(" ", axis.index("└"))
    assert now.index("▼") == pytest.approx(sum(panel) / 2, abs=2)
    # What lies ahead is dots, and nothing of the past is.
    first_rate = next(row for row, line in enumerate(lines) if "learning rate" in line) + 1
    first_decay = next(row for row, line in enumerate(lines) if "weight decay" in line)
    rates = lines[first_rate:first_decay]
    right = now.rindex("▼")
    dots = {column for column in columns_of(rates, "·") if column > panel[1]}
    assert dots
    assert min(dots) > right
    assert terminal.moved == 0
    terminal.press("\x03")
    assert terminal.ended() == 130
    assert not terminal.is_full_screen
    assert terminal.is_cursor_shown
    assert terminal.screen.strip() == ""


def test_keys_leave_no_trace(servers: Servers, terminals: Terminals, connect: Connect) -> None:
    server = servers()
    job = Job(connect, server.grpc, spec())
    job.train(5)
    terminal = terminals("run", "watch", "watched", "--server", server.grpc, *QUICK)
    terminal.wait_for("5 of 200")
    assert not terminal.echoes
    terminal.press("hello\nq")
    job.train(15)
    assert "hello" not in terminal.wait_for("20 of 200")
    terminal.press("\x03")
    assert terminal.ended() == 130
    assert terminal.echoes
    assert terminal.screen.strip() == ""


def test_it_outlives_its_server(servers: Servers, terminals: Terminals, connect: Connect) -> None:
    server = servers()
    job = Job(connect, server.grpc, spec())
    job.train(10)
    terminal = terminals("run", "watch", "watched", "--server", server.grpc, *QUICK)
    terminal.wait_for("10 of 200")
    server.end()
    silent = terminal.wait_for("trying again")
    assert silent.splitlines()[0].startswith("no answer since ")
    # What was known stays.
    assert "10 of 200" in silent
    server = servers(server.grpc)
    job.train(40)
    back = terminal.wait_for("50 of 200")
    assert "no answer" not in back
    assert terminal.process.poll() is None


def test_it_ends_with_the_run(servers: Servers, terminals: Terminals, connect: Connect) -> None:
    server = servers()
    job = Job(connect, server.grpc, spec())
    job.train(10)
    watching = terminals("run", "watch", "watched", "--server", server.grpc, *QUICK)
    watching.wait_for("10 of 200")
    job.pilot.close()
    assert terminals("run", "finish", "watched", "--force", "--server", server.grpc).ended() == 0
    assert watching.ended() == 0
    assert not watching.is_full_screen
    said = "watched is finished, at progress 10 of 200 iterations"
    assert watching.screen.strip() == said
    # Afterwards there is nothing to watch.
    later = terminals("run", "watch", "watched", "--server", server.grpc)
    assert later.ended() == 0
    assert later.screen.strip() == said


def test_a_deleted_run_is_said(servers: Servers, terminals: Terminals, connect: Connect) -> None:
    server = servers()
    job = Job(connect, server.grpc, spec())
    job.train(10)
    watching = terminals("run", "watch", "watched", "--server", server.grpc, *QUICK)
    watching.wait_for("10 of 200")
    job.pilot.close()
    assert terminals("run", "delete", "watched", "--force", "--server", server.grpc).ended() == 0
    assert watching.ended() == 1
    assert not watching.is_full_screen
    assert watching.is_cursor_shown
    assert watching.screen.strip() == "error: run 'watched' was deleted"


def test_show_draws_below_its_panel_on_a_terminal(
    servers: Servers, terminals: Terminals, connect: Connect
) -> None:
    server = servers()
    Job(connect, server.grpc, spec()).train(100)
    shown = terminals("run", "show", "watched", "--server", server.grpc, size=(120, 70))
    assert shown.ended() == 0, shown.screen
    panel, _, picture = shown.screen.partition("╯")
    assert "LR x 0.5" in panel
    for name in ("loss", "learning rate", "weight decay"):
        assert f"\n{name}" in picture
    assert "4e-4┤" in picture
    assert "200 iterations" in picture
    assert "1 at 17 (policies.0 (plateau)): LR x 0.5, in force" in picture
    as_json = terminals("run", "show", "watched", "--json", "--server", server.grpc)
    assert as_json.ended() == 0
    assert as_json.raw.strip().startswith("{")
    assert "┤" not in as_json.raw


def test_it_follows_the_size_of_the_terminal(
    servers: Servers, terminals: Terminals, connect: Connect
) -> None:
    server = servers()
    Job(connect, server.grpc, spec()).train(10)
    terminal = terminals("run", "watch", "watched", "--server", server.grpc)
    terminal.wait_for("events, the newest first")
    for columns, lines in ((120, 40), (40, 12), (10, 3), (80, 24)):
        terminal.resize(columns, lines)
        # What was on its way when the size changed may still have the old one.
        screen = terminal.wait_for(lambda screen: "watched" in screen and terminal.moved == 0)
        assert max(map(len, screen.splitlines())) <= columns
    terminal.wait_for("attempt 1 opened at progress 0")
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.ended() == 143
    assert not terminal.is_full_screen
    assert terminal.is_cursor_shown


def test_without_a_name_all_runs_are_listed(
    servers: Servers, terminals: Terminals, connect: Connect
) -> None:
    server = servers()
    terminal = terminals("run", "watch", "--server", server.grpc, *QUICK)
    terminal.wait_for("no runs")
    job = Job(connect, server.grpc, spec("first"))
    terminal.wait_for("first")
    Job(connect, server.grpc, spec("second"))
    job.train(30)
    screen = terminal.wait_for(lambda screen: "second" in screen and " 30 " in screen)
    header, first, second, *_ = screen.splitlines()
    assert header.split()[:4] == ["run", "state", "attempt", "progress"]
    assert first.split()[:4] == ["first", "running", "1", "30"]
    assert second.split()[:4] == ["second", "running", "1", "0"]
    terminal.press("\x03")
    assert terminal.ended() == 130


def test_what_there_is_not_is_refused_at_once(servers: Servers, terminals: Terminals) -> None:
    server = servers()
    unknown = terminals("run", "watch", "wathced", "--server", server.grpc)
    assert unknown.ended() == 1
    assert "\x1b[?1049h" not in unknown.raw
    assert "error:" in unknown.screen
    server.end()
    alone = terminals("run", "watch", "watched", "--server", server.grpc)
    assert alone.ended() == 3
    assert "no answer from the server" in alone.screen
    dumb = terminals("run", "watch", "watched", env={"TERM": "dumb"})
    assert dumb.ended() == 2
    assert "watch draws on a terminal" in dumb.screen
