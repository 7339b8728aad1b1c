"""`lrpilot run adjust|hold|release|approve|revise` against a server that folds a log."""

import asyncio
import getpass
import json
import os
import re
import shlex
import socket
import struct
import threading
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import Result

from lrpilot import core
from lrpilot.server._app import Server
from lrpilot.server._commit import GroupCommitter
from lrpilot.server._documents import read_spec
from lrpilot.server._memory_store import MemoryStore
from lrpilot.server._metrics import Metrics
from lrpilot.server._store import LogRow
from lrpilot.v1 import trainer_pb2
from lrpilot.v1.trainer_pb2_grpc import TrainerServiceStub

Cli = Callable[..., Result]

DEADLINE_S = 60.0

LR, WD = 1e-3, 0.1

PLAIN = """
name: small
total: 1000
learning_rate: {peak: 1e-3}
weight_decay: 0.1
policies: [{kind: plateau, patience: 0, mode: advise}, {kind: divergence, mode: act}]
feedback: {delay: 3, advice_expires: 20}
"""
"""Constant values; the plateau advises to halve the LR, and the other policy makes losses count."""

GROUPED = (
    PLAIN
    + """
groups:
  - {name: a}
  - {name: b, peak: 4e-3, weight_decay_multiplier: 0.0}
  - {name: c}
"""
)

STAGED = """
name: small
total: 1000
stages:
  - {name: first, until: 600, learning_rate: {peak: 1e-3}}
  - {name: second, learning_rate: {peak: 4e-4}}
feedback: {delay: 3}
"""

DECAYING = """
name: small
total: 1000
learning_rate: {peak: 1e-3, decay: {style: linear}}
weight_decay: {start: 0.0, end: 0.1, style: linear}
policies: [{kind: divergence, mode: act}]
feedback: {delay: 3}
"""


class Live:
    """The services over a store in memory, served by a thread of this process."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.address = self._wait(self._start())

    def _wait(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE_S)

    async def _start(self) -> str:
        metrics = Metrics()
        self._committer = GroupCommitter(self.store, metrics)
        self._server = Server(self.store, self._committer, metrics)
        address = self._server.bind("127.0.0.1:0")
        await self._server.start()
        return address

    async def _stop(self) -> None:
        await self._server.drain()
        await self._committer.close()

    def stop(self) -> None:
        self._wait(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_S)
        self._loop.close()

    def log(self) -> list[LogRow]:
        """Return every event of the run."""
        return self.store.read("small")


@pytest.fixture
def live() -> Iterator[Live]:
    server = Live()
    yield server
    server.stop()


@dataclass
class Job:
    """The only rank of an attempt on the run `small`."""

    stub: Any
    attempt: Any

    def report(self, first: int, *losses: float, last_moves_to: int | None = None) -> None:
        """Report losses from a progress on."""
        reports = [
            trainer_pb2.LossReport(progress=at, loss=loss, moves_to=at + 1)
            for at, loss in enumerate(losses, first)
        ]
        if last_moves_to is not None:
            reports[-1].moves_to = last_moves_to
        self.stub.ReportLosses(
            trainer_pb2.ReportLossesRequest(
                run="small", attempt=self.attempt, incarnation="one", reports=reports
            ),
            timeout=DEADLINE_S,
        )

    def values(self, begin: int) -> Any:
        """Return the fixed values from a progress on, and the directives among them."""
        request = trainer_pb2.GetValuesRequest(
            run="small", attempt=self.attempt, begin=begin, stride=1, count=128
        )
        return self.stub.GetValues(request, timeout=DEADLINE_S)

    def rates(self, begin: int) -> list[float]:
        return list(self.values(begin).block.learning_rates)

    def decays(self, begin: int) -> list[float]:
        return list(self.values(begin).block.weight_decays)

    def acknowledge(self, directive: str, outcome: int) -> None:
        request = trainer_pb2.AcknowledgeDirectiveRequest(
            run="small", attempt=self.attempt, rank=0, directive=directive, progress=4,
            outcome=outcome,  # type: ignore[arg-type]
        )  # fmt: skip
        self.stub.AcknowledgeDirective(request, timeout=DEADLINE_S)


@pytest.fixture
def start(live: Live, cli: Cli) -> Iterator[Callable[..., Job]]:
    """Create the run and open its first attempt, which has reported the loss at 0.

    The horizon is 4.
    """
    with grpc.insecure_channel(live.address) as channel:
        stub: Any = TrainerServiceStub(channel)

        def begin(spec: str = PLAIN) -> Job:
            created = cli("run", "create", "-", "--server", live.address, input=spec)
            assert created.exit_code == 0, created.stderr
            request = trainer_pb2.OpenAttemptRequest(
                run="small", request_id="open", incarnation="one"
            )
            job = Job(stub, stub.OpenAttempt(request, timeout=DEADLINE_S).attempt)
            job.report(0, 2.0)
            return job

        yield begin


@pytest.fixture
def run(live: Live, cli: Cli) -> Cli:
    """Run `lrpilot run …` against the server."""

    def invoke(command: str, *args: str, **kwargs: Any) -> Result:
        return cli("run", command, *args, "--server", live.address, **kwargs)

    return invoke


@pytest.fixture
def adjust(run: Cli) -> Callable[..., Any]:
    """Adjust the run and return what `--json` says."""

    def invoke(*args: str) -> Any:
        result = run("adjust", "small", *args, "--reason", "oscillates", "--json")
        assert (result.exit_code, result.stderr) == (0, ""), result.stderr
        return json.loads(result.stdout)

    return invoke


@pytest.fixture
def shown(run: Cli) -> Callable[[], Any]:
    """Return the run as `run show --json` has it."""
    return lambda: json.loads(run("show", "small", "--json").stdout)


Start = Callable[..., Job]
Adjust = Callable[..., Any]
Shown = Callable[[], Any]


# ---------------------------------------------------------------------------------------------
# What each change does.


@pytest.mark.parametrize(
    ("args", "rates", "decay", "summary"),
    [
        (["--scale-lr", "0.25"], [LR * 0.25] * 3, WD, "LR x 0.25"),
        (["--scale-lr", "3"], [LR * 3.0] * 3, WD, "LR x 3"),
        (["--set-lr", "7e-4"], [7e-4] * 3, WD, "LR to 0.0007"),
        (["--scale-wd", "0.5"], [LR] * 3, WD * 0.5, "WD x 0.5"),
        (["--scale-wd", "0"], [LR] * 3, 0.0, "WD x 0"),
        (
            ["--begin-decay", "2", "--style", "linear"],
            [LR, LR * 0.5, 0.0],
            WD,
            "anneal LR over 2 (linear)",
        ),
    ],
)
def test_what_ranks_get_from_the_horizon_on_is_what_was_said(
    start: Start,
    adjust: Adjust,
    shown: Shown,
    args: list[str],
    rates: list[float],
    decay: float,
    summary: str,
) -> None:
    job = start()
    fields = adjust(*args, "--author", "oncall@node")
    made = fields["adjustment"]
    assert (fields["effective"], fields["unchanged"], fields["dry_run"]) == (4, False, False)
    assert not fields["pending"]
    assert (made["summary"], made["effective"], made["mode"]) == (summary, 4, "act")
    assert (made["author"], made["reason"]) == ("oncall@node", "oscillates")
    assert (made["before"], made["after"]) == ([LR], [rates[0]])
    assert (made["weight_decay_before"], made["weight_decay_after"]) == ([WD], [decay])
    assert fields["changes"] == []
    assert fields["run"] == shown()
    assert shown()["adjustments"][-1] == made
    job.report(1, 1.9, 1.8, 1.7)
    assert job.rates(1) == [LR] * 3 + rates
    assert job.decays(1) == [WD] * 3 + [decay] * 3


def test_a_share_of_the_progress_so_far_and_the_usual_shape(start: Start, adjust: Adjust) -> None:
    job = start()
    job.report(1, 1.9, last_moves_to=97)
    fields = adjust("--begin-decay", "10%")
    assert fields["adjustment"]["summary"] == "anneal LR over 10 (minus_sqrt)"
    after = {point["progress"]: point["after"] for point in fields["preview"]}
    assert after[99] == after[100] == [LR]
    assert after[1000] == [0.0]


def test_the_next_stage(start: Start, adjust: Adjust, shown: Shown) -> None:
    job = start(STAGED)
    job.values(0)
    fields = adjust("--next-stage")
    effective = fields["effective"]
    assert fields["adjustment"]["summary"] == "leave stage first"
    assert (fields["adjustment"]["before"], fields["adjustment"]["after"]) == ([LR], [4e-4])
    assert shown()["stage"] == "first"
    after = {point["progress"]: point["after"] for point in fields["preview"]}
    assert (after[effective - 1], after[effective]) == ([LR], [4e-4])


def test_a_longer_run_ends_its_decays_later(start: Start, run: Cli, adjust: Adjust) -> None:
    job = start(DECAYING)
    fields = adjust("--total", "2000")
    assert fields["adjustment"] is None
    assert fields["changes"] == [
        {"field": "total", "before": "1000", "after": "2000"},
        {"field": "learning_rate.decay.end", "before": "1000", "after": "2000"},
        {"field": "weight_decay.over", "before": "1000", "after": "2000"},
    ]
    assert fields["run"]["total"] == 2000
    longer = core.base_schedule(read_spec(DECAYING.replace("total: 1000", "total: 2000")))
    shorter = core.base_schedule(read_spec(DECAYING))
    job.report(1, 1.9, 1.8)
    assert job.rates(3) == [shorter(3)[0][0], longer(4)[0][0], longer(5)[0][0]]
    history = run("history", "small").stdout
    assert re.search(r"new spec from progress 4 on, by \S+@\S+: oscillates", history)


def test_hold_and_release(start: Start, run: Cli, shown: Shown) -> None:
    job = start(DECAYING)
    schedule = core.base_schedule(read_spec(DECAYING))
    held = run("hold", "small", "--reason", "maintenance")
    assert (held.exit_code, held.stderr) == (0, "")
    assert held.stdout.startswith("small: hold LR and WD from progress 4 on\n")
    job.report(1, 1.9, 1.8, 1.7)
    assert job.rates(3) == [schedule(3)[0][0], *[schedule(4)[0][0]] * 3]
    assert job.decays(3) == [schedule(3)[0][1], *[schedule(4)[0][1]] * 3]
    assert shown()["held"] is True
    assert "LR and WD are frozen" in run("show", "small").stdout

    released = run("release", "small", "--reason", "it is over")
    assert released.stdout.startswith("small: take back ")
    job.report(4, 1.6)
    assert job.rates(6) == [schedule(4)[0][0]]
    assert job.rates(7) == [schedule(7)[0][0]]
    job.report(5, 1.5, 1.4, 1.3)
    assert shown()["held"] is False


def test_an_adjustment_is_taken_back_with_the_line_that_was_printed(
    start: Start, run: Cli, cli: Cli, shown: Shown
) -> None:
    job = start()
    result = run("adjust", "small", "--scale-lr", "0.5", "--reason", "too hot")
    assert (result.exit_code, result.stderr) == (0, "")
    *said, line = result.stdout.splitlines()
    assert said == [
        "small: LR x 0.5 from progress 4 on",
        "  progress  learning rate   weight decay",
        "  4         0.001 → 0.0005  0.1",
        "id 4-1-3000; take it back with",
    ]
    job.report(1, 1.9)
    words = [word if word != "…" else "no better" for word in shlex.split(line)]
    undone = cli(*words[1:])
    assert (undone.exit_code, undone.stderr) == (0, "")
    assert undone.stdout.splitlines()[:3] == [
        "small: take back 4-1-3000 from progress 5 on",
        "  progress  learning rate   weight decay",
        "  5         0.0005 → 0.001  0.1",
    ]
    # What takes a change back cannot itself be taken back.
    assert undone.stdout.splitlines()[3:] == ["id 6-2-3000"]
    job.report(2, 1.8)
    assert job.rates(3) == [LR, LR * 0.5, LR]
    assert [item["status"] for item in shown()["adjustments"]] == ["planned", "planned"]
    job.report(3, 1.7, 1.6, 1.5)
    assert [item["status"] for item in shown()["adjustments"]] == ["undone", "in force"]


def test_several_groups_have_a_line_each_and_those_alike_share_one(
    start: Start, run: Cli, adjust: Adjust
) -> None:
    start(GROUPED)
    result = run("adjust", "small", "--set-lr", "5e-4", "--reason", "too hot")
    assert result.stdout.splitlines()[:4] == [
        "small: LR to 0.0005 from progress 4 on",
        "  progress  group  learning rate   weight decay",
        "  4         a, c   0.001 → 0.0005  0.1",
        "  4         b      0.004 → 0.002   0",
    ]
    made = adjust("--scale-lr", "0.5")["adjustment"]
    assert made["before"] == [5e-4, 5e-4 * (4e-3 / 1e-3), 5e-4]
    assert made["after"] == [value * 0.5 for value in made["before"]]


def test_a_directive_and_what_became_of_it(start: Start, run: Cli, shown: Shown) -> None:
    job = start()
    result = run(
        "adjust", "small", "--ask", "rollback", "--before", "1", "--factor", "0.25", "--until",
        "3", "--reason", "diverged", "--author", "oncall@node",
    )  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "")
    what = "ask for rollback to before 1 with LR x 0.25 past data up to 3"
    first, *_, last = result.stdout.splitlines()
    assert (first, last) == (f"small: {what} from progress 4 on", "id 4-1-3000")
    job.report(1, 1.9, 1.8)
    (directive,) = job.values(4).directives
    assert (directive.id, directive.progress, directive.factor) == ("4-1-3000", 4, 0.25)
    job.report(3, 1.7, 1.6)
    assert "no answer yet" in run("show", "small").stdout
    job.acknowledge("4-1-3000", trainer_pb2.DIRECTIVE_OUTCOME_UNHANDLED)
    assert [item["status"] for item in shown()["adjustments"]] == ["unhandled"]
    text = " ".join(run("show", "small").stdout.replace("│", " ").split())
    assert re.search(r"4-1-3000 4 ask for rollback .* unhandled oncall@node diverged", text)
    history = run("history", "small").stdout
    assert f"{what} from progress 4 on, by oncall@node: diverged" in history
    assert "directive 4-1-3000 unhandled" in history


@pytest.mark.parametrize(
    ("args", "summary"),
    [
        (["--ask", "rollback", "--before", "1"], "ask for rollback to before 1 with LR x 0.5"),
        (["--ask", "skip", "--until", "9"], "ask for skip past data up to 9"),
        (["--ask", "evaluate"], "ask for evaluate"),
        (["--ask", "stop"], "ask for stop"),
    ],
)
def test_what_the_trainers_can_be_asked_for(
    start: Start, adjust: Adjust, args: list[str], summary: str
) -> None:
    start()
    assert adjust(*args)["adjustment"]["summary"] == summary


# ---------------------------------------------------------------------------------------------
# Advice.


@pytest.fixture
def advised(start: Start) -> Job:
    """A job whose plateau policy has advised, on the loss at 1, to halve the LR from 4 on."""
    job = start()
    job.report(1, 2.0)
    return job


ADVICE = "4-1-0"


def test_an_advice_is_shown_with_how_to_approve_it_and_approved_so(
    advised: Job, run: Cli, cli: Cli, live: Live, shown: Shown
) -> None:
    (advice,) = shown()["adjustments"]
    assert (advice["id"], advice["status"], advice["expires"]) == (ADVICE, "advice", 24)
    text = run("show", "small").stdout
    (line,) = re.findall(r"horizon is below 24: (lrpilot run approve \S+ \S+)", text)
    result = cli(*shlex.split(line)[1:], "--reason", "so it is", "--server", live.address)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[:3] == [
        "small: LR x 0.5 from progress 5 on",
        "  progress  learning rate   weight decay",
        "  5         0.001 → 0.0005  0.1",
    ]
    advice, made = shown()["adjustments"]
    assert (advice["status"], made["status"]) == ("approved", "planned")
    assert made["reason"] == f"{advice['reason']}; approved: so it is"
    assert "horizon is below" not in run("show", "small").stdout
    assert f"(approves advice {ADVICE})" in run("history", "small").stdout
    advised.report(2, 1.9)
    assert advised.rates(4) == [LR, LR * 0.5]


def test_an_advice_is_tried_first_and_needs_no_reason(
    advised: Job, run: Cli, live: Live, shown: Shown
) -> None:
    before = live.log()
    tried = json.loads(run("approve", "small", ADVICE, "--dry-run", "--json").stdout)
    assert live.log() == before
    assert (tried["dry_run"], tried["effective"], tried["unchanged"]) == (True, 5, False)
    done = json.loads(
        run("approve", "small", ADVICE, "--etag", tried["run"]["etag"], "--json").stdout
    )
    assert done["adjustment"] == tried["adjustment"]
    assert done["preview"] == tried["preview"]
    assert done["adjustment"]["reason"] == shown()["adjustments"][0]["reason"]


def test_an_advice_expires_in_progress(advised: Job, run: Cli, live: Live) -> None:
    advised.report(2, 1.9, last_moves_to=20)
    assert run("approve", "small", ADVICE, "--dry-run").exit_code == 0
    advised.report(20, 1.9)
    before = live.log()
    result = run("approve", "small", ADVICE)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"error: advice {ADVICE} of run 'small' cannot be approved: it could be approved up to "
        "horizon 23, which is 24 now; wait for the next one, or adjust the run by hand\n"
    )
    assert live.log() == before
    assert "expired" in run("show", "small").stdout


def test_an_advice_is_approved_once(advised: Job, run: Cli) -> None:
    assert advised.attempt.number == 1
    assert run("approve", "small", ADVICE).exit_code == 0
    result = run("approve", "small", ADVICE)
    assert result.exit_code == 1
    assert "it was approved already, as adjustment 5-2-3000" in result.stderr


# ---------------------------------------------------------------------------------------------
# Trying first.


@pytest.mark.parametrize(
    "args",
    [
        ["adjust", "small", "--scale-lr", "0.5"],
        ["adjust", "small", "--set-lr", "1e-4"],
        ["adjust", "small", "--scale-wd", "2"],
        ["adjust", "small", "--begin-decay", "100", "--style", "cosine"],
        ["adjust", "small", "--total", "2000"],
        ["adjust", "small", "--ask", "skip", "--until", "9"],
        ["adjust", "small", "--ask", "rollback", "--before", "1", "--factor", "0.25"],
        ["hold", "small"],
        ["revise", "SPEC"],
    ],
)
def test_a_dry_run_changes_nothing_and_its_line_does_what_it_showed(
    start: Start,
    run: Cli,
    cli: Cli,
    live: Live,
    spec_file: Callable[..., str],
    args: list[str],
) -> None:
    start()
    revised = spec_file(PLAIN.replace("1e-3", "5e-3"))
    args = [revised if word == "SPEC" else word for word in args]
    signed = [*args, "--reason", "it's too hot", "--author", "oncall@node"]
    before = live.log()
    tried = run(*signed, "--dry-run")
    assert (tried.exit_code, tried.stderr) == (0, "")
    shown_first = json.loads(run(*signed, "--dry-run", "--json").stdout)
    assert live.log() == before
    assert tried.stdout.startswith("dry run, nothing changed; small: ")
    assert shown_first["dry_run"] is True

    head, line = tried.stdout.splitlines()[-2:]
    assert head == "carry it out with"
    words = shlex.split(line)
    assert words[0] == "lrpilot"
    assert words[words.index("--etag") + 1] == shown_first["run"]["etag"]
    done = cli(*words[1:], "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    fields = json.loads(done.stdout)
    for name in ("effective", "adjustment", "changes", "preview"):
        assert fields[name] == shown_first[name]
    event = core.decode(live.log()[-1].payload)
    assert isinstance(event, (core.Adjusted, core.Revised))
    assert event.author == "oncall@node"
    assert len(live.log()) == len(before) + 1


def test_a_dry_run_has_a_table_up_to_the_end(start: Start, run: Cli) -> None:
    job = start()
    job.report(1, 1.9, last_moves_to=97)
    result = run("adjust", "small", "--scale-lr", "0.5", "--reason", "too hot", "--dry-run")
    lines = result.stdout.splitlines()
    assert lines[0] == "dry run, nothing changed; small: LR x 0.5 from progress 100 on"
    assert lines[1].split() == ["progress", "learning", "rate", "weight", "decay"]
    rows = [line.split(maxsplit=1) for line in lines[2:-2]]
    assert [progress for progress, _ in rows] == ["100", "108", "188", "548", "1,000"]
    assert {rest for _, rest in rows} == {"0.001 → 0.0005  0.1"}


def test_a_plan_that_changed_since_is_refused(start: Start, run: Cli, live: Live) -> None:
    start()
    signed = ["adjust", "small", "--scale-lr", "0.5", "--reason", "too hot"]
    etag = json.loads(run(*signed, "--dry-run", "--json").stdout)["run"]["etag"]
    assert run("hold", "small", "--reason", "maintenance").exit_code == 0
    before = live.log()
    result = run(*signed, "--etag", etag)
    assert (result.exit_code, result.stdout) == (1, "")
    message, hint = result.stderr.splitlines()
    assert message.startswith("error: the plan of run 'small' changed since it was looked at")
    assert hint.startswith("hint: --dry-run shows what it does to the plan as it is now")
    assert live.log() == before
    seen = json.loads(run(*signed, "--dry-run", "--json").stdout)["run"]["etag"]
    assert run(*signed, "--etag", seen).exit_code == 0


# ---------------------------------------------------------------------------------------------
# Nothing to do.


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["adjust", "small", "--scale-lr", "1"], "nothing is to be done"),
        (["adjust", "small", "--total", "1000"], "nothing is to be done"),
        (["release", "small"], "it is not held"),
        (["revise", "-"], "it has that spec already"),
    ],
)
def test_what_is_so_already_stays_as_it_is(
    start: Start, run: Cli, live: Live, tmp_path: Path, args: list[str], said: str
) -> None:
    start()
    before = live.log()
    picture = tmp_path / "none.png"
    signed = [*args, "--reason", "to be sure"]
    result = run(*signed, "-o", str(picture), input=PLAIN)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"unchanged: small: {said}\n"
    fields = json.loads(run(*signed, "--json", input=PLAIN).stdout)
    assert (fields["unchanged"], fields["adjustment"], fields["preview"]) == (True, None, [])
    assert live.log() == before
    assert not picture.exists()


def test_a_second_hold_is_none(start: Start, run: Cli) -> None:
    start()
    run("hold", "small", "--reason", "maintenance")
    result = run("hold", "small", "--reason", "maintenance")
    assert result.stdout == "unchanged: small: it is held already\n"


# ---------------------------------------------------------------------------------------------
# A new spec.


def test_a_revision_shows_its_fields_and_both_curves(
    start: Start, run: Cli, live: Live, tmp_path: Path, spec_file: Callable[..., str]
) -> None:
    job = start()
    revised = spec_file(
        PLAIN.replace("total: 1000", "total: 2000").replace("peak: 1e-3", "peak: 5e-3")
    )
    picture = tmp_path / "both.svg"
    result = run("revise", revised, "--reason", "longer", "-o", str(picture))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "small: new spec from progress 4 on",
        "  total: 1000 → 2000",
        "  learning_rate.peak: 0.001 → 0.005",
        "  learning_rate.decay.end: 1000 → 2000",
        "  progress  learning rate  weight decay",
        "  4         0.001 → 0.005  0.1",
    ]
    root = ET.fromstring(picture.read_text())
    assert root.tag.endswith("svg")
    job.report(1, 1.9)
    assert job.rates(3) == [LR, 5e-3]
    events = [core.decode(row.payload) for row in live.log()]
    (event,) = [event for event in events if isinstance(event, core.Revised)]
    assert event.reason == "longer"


def test_what_goes_and_what_comes_has_colours_on_a_terminal(
    start: Start, cli: Cli, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    monkeypatch.setenv("FORCE_COLOR", "1")
    words = ["run", "adjust", "small", "--total", "2000", "--reason", "longer", "--server"]
    from typer.testing import CliRunner

    from lrpilot.server.cli._main import app

    plain = cli(*words, live.address, "--dry-run")
    coloured = CliRunner().invoke(app, [*words, live.address, "--dry-run"], color=True)
    assert "\x1b" not in plain.stdout
    assert "  total: \x1b[31m1000\x1b[0m → \x1b[32m2000\x1b[0m\n" in coloured.stdout


def test_a_revision_is_refused_where_only_a_new_attempt_may_change_it(
    start: Start, run: Cli, live: Live
) -> None:
    start()
    before = live.log()
    result = run("revise", "-", "--reason", "longer", input=PLAIN.replace("delay: 3", "delay: 4"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "a revision may not change feedback.delay" in result.stderr
    assert live.log() == before


# ---------------------------------------------------------------------------------------------
# Pictures.


@pytest.mark.parametrize("spec", [PLAIN, GROUPED, STAGED, DECAYING])
@pytest.mark.parametrize("dry", [True, False])
def test_pictures_are_written(
    start: Start, run: Cli, live: Live, tmp_path: Path, spec: str, dry: bool
) -> None:
    start(spec)
    before = live.log()
    flags = ["--dry-run"] if dry else []
    picture = tmp_path / "change.PNG"
    result = run(
        "adjust", "small", "--begin-decay", "200", "--reason", "too hot $", "-o", str(picture),
        *flags,
    )  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "")
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width == 1500
    # Without WD there is one panel less.
    assert (height > 800) == (spec is not STAGED)
    assert (live.log() == before) == dry


def test_a_picture_names_groups_and_says_before_and_after(
    start: Start, run: Cli, tmp_path: Path
) -> None:
    start(GROUPED)
    picture = tmp_path / "change.svg"
    signed = ["adjust", "small", "--scale-lr", "0.5", "--dry-run", "-o", str(picture), "--reason"]
    run(*signed, "too hot")
    first = picture.read_text()
    # Text is drawn as shapes; each is preceded by what it says.
    for text in ("a, c", "b", "before", "fixed", "learning rate", "weight decay"):
        assert f"<!-- {text} -->" in first, text
    assert "<!-- small: LR x 0.5 from progress 4 on (dry run) -->" in first
    run(*signed, "too hot")
    assert picture.read_text() == first


def test_json_and_a_picture_at_once(start: Start, run: Cli, tmp_path: Path) -> None:
    start()
    picture = tmp_path / "change.png"
    result = run("hold", "small", "--reason", "x", "--json", "-o", str(picture))
    assert json.loads(result.stdout)["adjustment"]["action"] == "hold"
    assert picture.exists()


@pytest.mark.parametrize("name", ["change.jpg", "change", "-"])
def test_a_picture_of_another_kind_is_refused_before_anything_is_done(
    start: Start, run: Cli, live: Live, name: str
) -> None:
    start()
    before = live.log()
    result = run("hold", "small", "--reason", "x", "-o", name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "give a file that ends in .png or .svg" in " ".join(result.stderr.split())
    assert live.log() == before


def test_nothing_is_done_where_the_picture_cannot_be_written(
    start: Start, run: Cli, live: Live, tmp_path: Path
) -> None:
    start()
    before = live.log()
    picture = tmp_path / "absent" / "change.png"
    result = run("hold", "small", "--reason", "x", "-o", str(picture))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {picture}: No such file or directory\n"
    assert live.log() == before


# ---------------------------------------------------------------------------------------------
# What is refused.


@pytest.mark.parametrize(
    "args",
    [
        ["adjust", "small", "--scale-lr", "0.5"],
        ["hold", "small"],
        ["release", "small"],
        ["revise", "preset:llama3-8b-fp8"],
    ],
)
def test_a_reason_is_required(start: Start, run: Cli, live: Live, args: list[str]) -> None:
    start()
    before = live.log()
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Missing option '--reason'" in result.stderr
    assert live.log() == before


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "got none; give exactly one of --scale-lr, --set-lr,"),
        (["--scale-lr", "0.5", "--next-stage"], "got --scale-lr and --next-stage; give exactly"),
        (["--scale-lr", "0.5", "--style", "linear"], "--style goes with --begin-decay"),
        (["--ask", "stop", "--until", "9"], "--until goes with --ask rollback or --ask skip"),
        (["--ask", "skip", "--before", "9"], "--before goes with --ask rollback"),
        (["--scale-lr", "0.5", "--factor", "0.5"], "--factor goes with --ask rollback"),
        (["--ask", "rollback"], "--ask rollback needs --before N"),
        (["--ask", "rollback", "--before", "1", "--factor", "0"], "--factor: got 0.0; allowed"),
        (["--ask", "rollback", "--before", "1", "--factor", "nan"], "--factor: got nan; allowed"),
        (["--ask", "sleep"], "'--ask'"),
        (["--scale-lr", "half"], "'--scale-lr'"),
        (["--total", "9" * 20], "'--total'"),
        (["--total", "-1"], "'--total'"),
    ],
)
def test_a_command_line_that_says_no_change(
    start: Start, run: Cli, live: Live, args: list[str], said: str
) -> None:
    start()
    before = live.log()
    result = run("adjust", "small", *args, "--reason", "x")
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert live.log() == before


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--scale-lr", "nan"], 2, ["the change is invalid", "scale_lr: got nan"]),
        (["--scale-lr", "0"], 2, ["scale_lr: got 0.0; allowed: a number above 0 and up to 1e+100"]),
        (["--begin-decay", "soon"], 2, ["begin_decay.length: got 'soon'"]),
        (["--begin-decay", "9", "--style", "steep"], 2, ["begin_decay.style: got 'steep'"]),
        (["--ask", "rollback", "--before", "2"], 2, ["directive.before: got 2; allowed: 1 to 1"]),
        (["--total", "3"], 2, ["total: got 3; allowed: at least the horizon, 4"]),
        (["--next-stage"], 1, ["no stage comes next at progress 4: it has no stages"]),
        (["--undo", "9-9-9"], 1, ["run 'small' has no adjustment with the id '9-9-9'"]),
        (["--scale-lr", "2", "--reason", " "], 2, ["the change is not signed", "reason: got"]),
    ],
)
def test_a_change_that_the_server_refuses(
    start: Start, run: Cli, live: Live, args: list[str], code: int, said: list[str], dry: bool
) -> None:
    start()
    before = live.log()
    flags = ["--dry-run"] if dry else []
    result = run("adjust", "small", "--reason", "x", *args, *flags)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("error: ")
    for part in said:
        assert result.stderr.count(part) == 1, result.stderr
    assert live.log() == before


def test_a_run_that_is_not_there(start: Start, run: Cli) -> None:
    start()
    for args in (
        ["adjust", "smal", "--scale-lr", "0.5", "--reason", "x"],
        ["hold", "smal", "--reason", "x"],
        ["approve", "smal", "1-1-0"],
    ):
        result = run(*args)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == (
            "error: no run is named 'smal'; did you mean small?\n"
            "hint: `lrpilot run list` shows the runs of this server\n"
        )


# ---------------------------------------------------------------------------------------------
# Who did it.


def test_the_caller_is_the_author_unless_told_otherwise(
    start: Start, adjust: Adjust, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    monkeypatch.setattr(getpass, "getuser", lambda: "oncall")
    monkeypatch.setattr(socket, "gethostname", lambda: "node-7")
    assert adjust("--scale-lr", "0.5")["adjustment"]["author"] == "oncall@node-7"
    assert adjust("--scale-lr", "0.5", "--author", "lead")["adjustment"]["author"] == "lead"


def test_a_caller_without_a_name(
    start: Start, adjust: Adjust, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody() -> str:
        raise KeyError(4711)

    start()
    monkeypatch.setattr(getpass, "getuser", nobody)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    monkeypatch.setattr(socket, "gethostname", lambda: "node-7")
    assert adjust("--scale-lr", "0.5")["adjustment"]["author"] == "uid-4711@node-7"


def test_each_call_has_a_request_id_of_its_own(start: Start, adjust: Adjust, live: Live) -> None:
    start()
    first, second = adjust("--scale-lr", "0.5"), adjust("--scale-lr", "0.5")
    assert second["adjustment"]["before"] == first["adjustment"]["after"]
    events = [core.decode(row.payload) for row in live.log()[-2:]]
    ids = {event.request_id for event in events if isinstance(event, core.Adjusted)}
    assert len(ids) == 2
    assert {len(request_id) for request_id in ids} == {32}
