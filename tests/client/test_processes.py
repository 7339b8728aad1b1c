"""Processes that end, fork, spawn and compile, with a real server: nothing reported is lost."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Runs, make_spec, serve

LOSSES = 40
TIMEOUT_S = 120

HEAD = """
import os, signal, sys, threading, time
import lrpilot.client as lrpilot

# What a shell starts in the background ignores it, and so does what that starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

class Optimizer:
    def __init__(self):
        self.param_groups = [{{"lr": 1.0, "weight_decay": 0.1}}]

def begin():
    pilot = lrpilot.connect({address!r}, run={run!r}, spec={spec!r})
    return pilot, pilot.scheduler(Optimizer())

def train(scheduler, until={losses}):
    while scheduler.progress < until:
        scheduler.step(loss=float(scheduler.progress))
"""

PLAIN = "pilot, scheduler = begin()\ntrain(scheduler)\n"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of its own."""
    program = serve(tmp_path_factory.mktemp("server") / "data")
    yield program.grpc
    program.dispose()


class Trained:
    """Runs programs that train `run`, and says what the server has of it."""

    def __init__(self, address: str, run: str, folder: Path) -> None:
        self._address, self._run, self._folder = address, run, folder
        self._text = HEAD.format(
            address=address, run=run, spec=make_spec(run, delay=64), losses=LOSSES
        )

    def start(self, text: str, *options: str) -> subprocess.Popen[str]:
        """Start a program; a file, since a spawned process reads it again."""
        file = self._folder / "program.py"
        file.write_text(self._text + text)
        return subprocess.Popen(
            [sys.executable, "-W", "error", *options, os.fspath(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ended(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        """Return exit code and both outputs; a program that hangs fails the test."""
        try:
            out, err = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
        return process.returncode, out, err

    def run(self, text: str, *options: str) -> tuple[int, str, str]:
        """Run a program to its end."""
        return self.ended(self.start(text, *options))

    def losses(self) -> dict[int, float | None]:
        """Return what is in the log of the run, where each loss must be once."""
        with Runs(self._address) as runs:
            (attempt,) = runs.losses(self._run).values()
        return attempt


_NUMBERS = itertools.count()

ALL = {at: float(at) for at in range(LOSSES)}


@pytest.fixture
def trained(address: str, tmp_path: Path) -> Trained:
    """A run of this test alone."""
    return Trained(address, f"run-{next(_NUMBERS)}", tmp_path)


# The end.


@pytest.mark.parametrize(
    ("way", "code", "said"),
    [
        ("", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("raise ZeroDivisionError", 1, "ZeroDivisionError"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", -signal.SIGTERM, ""),
        (
            "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)",
            -signal.SIGINT,
            "KeyboardInterrupt",
        ),
        ("signal.raise_signal(signal.SIGTERM); time.sleep(60)", -signal.SIGTERM, ""),
    ],
)
def test_however_the_process_ends_what_was_reported_arrives(
    trained: Trained, way: str, code: int, said: str
) -> None:
    ended, _, err = trained.run(PLAIN + way)
    assert ended == code, err
    assert said in err
    assert said or err == ""
    assert trained.losses() == ALL


@pytest.mark.parametrize("error", ["ZeroDivisionError", "SystemExit(4)", "KeyboardInterrupt"])
def test_an_error_in_the_loop_delivers(trained: Trained, error: str) -> None:
    text = f"pilot, scheduler = begin()\nwith pilot:\n    train(scheduler)\n    raise {error}\n"
    code, _, err = trained.run(text)
    assert code == {"SystemExit(4)": 4, "KeyboardInterrupt": -signal.SIGINT}.get(error, 1), err
    assert trained.losses() == ALL


def test_sigterm_ends_a_process_that_python_cannot_interrupt(trained: Trained) -> None:
    """As a rank that waits in a collective of which another rank has died."""
    process = trained.start(
        PLAIN
        + """
import torch
print("stuck", flush=True)
torch.cumsum(torch.ones(400_000_000), 0, dtype=torch.float64).sum()
os._exit(9)
"""
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "stuck\n"
    process.send_signal(signal.SIGTERM)
    code, _, err = trained.ended(process)
    assert (code, err) == (-signal.SIGTERM, "")
    assert trained.losses() == ALL


def test_sigterm_without_a_server_is_bounded_and_loud(trained: Trained) -> None:
    code, _, err = trained.run(
        PLAIN
        + """
from lrpilot.client import _timing
_timing.ABANDON_FLUSH_S = 0.3
pilot._session.link.undelivered = lambda: 7
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""
    )
    assert code == -signal.SIGTERM
    assert "SIGTERM: 7 reports were NOT delivered" in err


@pytest.mark.parametrize("when", ["before", "after", "chained"])
def test_a_handler_of_somebody_else_stays(trained: Trained, when: str) -> None:
    """Set before the pilot or after it, and even where it calls the handler before it."""
    own = """
def own(number, frame):
    print("own", flush=True)
    if CHAINED and callable(former):
        former(number, frame)
former = signal.signal(signal.SIGTERM, own)
""".replace("CHAINED", str(when == "chained"))
    rest = """
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.5)
assert signal.getsignal(signal.SIGTERM) is own
pilot.close()
assert signal.getsignal(signal.SIGTERM) is own
print("trained on", flush=True)
"""
    text = own + PLAIN + rest if when == "before" else PLAIN + own + rest
    assert trained.run(text) == (0, "own\ntrained on\n", "")
    assert trained.losses() == ALL


def test_a_handler_that_is_given_back_after_the_end_lets_the_process_die(trained: Trained) -> None:
    """As by a trainer that puts back, when it is done, what it found."""
    code, out, err = trained.run(
        """
pilot, scheduler = begin()
train(scheduler, 20)
found = signal.signal(signal.SIGTERM, signal.SIG_IGN)
pilot.close()
signal.signal(signal.SIGTERM, found)
child = os.fork()
if child == 0:
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(9)
assert os.waitpid(child, 0)[1] == signal.SIGTERM
# The next pilot takes it for what it is: nobody's.
pilot = lrpilot.connect(ADDRESS, run=pilot.run)
assert signal.getsignal(signal.SIGTERM) not in (found, signal.SIG_DFL)
pilot.close()
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
signal.signal(signal.SIGTERM, found)
print("given back", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
""".replace("ADDRESS", repr(trained._address))
    )
    assert (code, out, err) == (-signal.SIGTERM, "given back\n", "")


def test_sigterm_while_a_pilot_closes_delivers_too(trained: Trained) -> None:
    code, _, err = trained.run(
        PLAIN
        + """
from lrpilot.client import _timing
_timing.ABANDON_FLUSH_S = 0.3
pilot._session._reporter.flush = lambda _: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60)
pilot._session.link.undelivered = lambda: 7
pilot.close()
"""
    )
    assert code == -signal.SIGTERM
    assert "SIGTERM: 7 reports were NOT delivered" in err


def test_a_wakeup_descriptor_of_somebody_else_stays(trained: Trained) -> None:
    """As of an event loop that minds signals."""
    code, out, err = trained.run(
        """
theirs, ours = os.pipe()
os.set_blocking(ours, False)
signal.set_wakeup_fd(ours)
pilot, scheduler = begin()
train(scheduler)
pilot.close()
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
assert signal.set_wakeup_fd(-1) == ours
print("kept")
"""
    )
    assert (code, out) == (0, "kept\n"), err
    assert trained.losses() == ALL


def test_a_closed_pilot_leaves_the_signal_as_it_was(trained: Trained) -> None:
    code, _, err = trained.run(
        PLAIN
        + """
assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
assert "lrpilot-sigterm" in {thread.name for thread in threading.enumerate()}
pilot.close()
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
assert signal.set_wakeup_fd(-1) == -1
assert "lrpilot-sigterm" not in {thread.name for thread in threading.enumerate()}
"""
    )
    assert (code, err) == (0, "")


def test_off_the_main_thread_the_signal_is_left_alone(trained: Trained) -> None:
    code, _, err = trained.run(
        """
def work():
    pilot, scheduler = begin()
    train(scheduler)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    pilot.close()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    )
    assert (code, err) == (0, "")
    assert trained.losses() == ALL


# Other processes.


def test_a_forked_child_dies_of_its_own_signals_and_its_parent_trains_on(trained: Trained) -> None:
    """However early the signal comes: the child must not wake its parent's handler."""
    code, out, err = trained.run(
        """
pilot, scheduler = begin()
for at in range(LOSSES):
    train(scheduler, at + 1)
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
pilot.close()
print("trained")
""".replace("LOSSES", str(LOSSES))
    )
    assert (code, out, err) == (0, "trained\n", "")
    assert trained.losses() == ALL


@pytest.mark.parametrize("way", ["sys.exit(0)", "os._exit(0)", "raise ZeroDivisionError"])
def test_the_exit_of_a_forked_child_leaves_its_parent_alone(trained: Trained, way: str) -> None:
    code, out, err = trained.run(
        f"""
pilot, scheduler = begin()
train(scheduler, 20)
child = os.fork()
if child == 0:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        train(scheduler)
    except lrpilot.PilotClosed:
        {way}
    os._exit(9)
assert os.waitpid(child, 0)[1] == {256 if way.startswith("raise") else 0}
train(scheduler)
print("trained")
"""
    )
    assert (code, out, err) == (0, "trained\n", "")
    assert trained.losses() == ALL


def test_a_spawned_child_trains_nothing_and_leaves_its_parent_alone(trained: Trained) -> None:
    code, out, err = trained.run(
        """
import multiprocessing

def child(name):
    print(name, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, flush=True)

if __name__ == "__main__":
    pilot, scheduler = begin()
    spawn = multiprocessing.get_context("spawn")
    train(scheduler, 20)
    other = spawn.Process(target=child, args=(pilot.run,))
    other.start()
    other.join()
    assert other.exitcode == 0
    try:
        spawn.Process(target=child, args=(pilot,)).start()
    except TypeError as error:
        print(error)
    train(scheduler)
"""
    )
    assert code == 0, err
    assert out.startswith(f"{trained._run} True\na Pilot cannot be pickled")
    assert trained.losses() == ALL


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_workers_of_a_data_loader(trained: Trained, context: str) -> None:
    """Started anew each epoch, while reports are under way."""
    code, out, err = trained.run(
        """
import torch
from torch.utils.data import DataLoader, Dataset

class Numbers(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, at):
        return torch.tensor(float(at))

if __name__ == "__main__":
    pilot, scheduler = begin()
    for epoch in range(2):
        for batch in DataLoader(
            Numbers(), batch_size=2, num_workers=2, multiprocessing_context=CONTEXT
        ):
            scheduler.step(loss=torch.tensor(float(scheduler.progress)))
    print("trained", scheduler.progress)
""".replace("CONTEXT", repr(context)),
    )
    assert (code, out, err) == (0, "trained 40\n", "")
    assert trained.losses() == ALL


def test_programs_started_by_a_fork_run(trained: Trained) -> None:
    """Also where `subprocess` closes what grpc has open before the child runs its program."""
    code, out, err = trained.run(
        """
import subprocess

pilot, scheduler = begin()
codes = set()
for at in range(LOSSES):
    scheduler.step(loss=float(at))
    # Some find its calls under way, some none.
    for _ in range(8):
        codes.add(subprocess.run(["true"], preexec_fn=lambda: None).returncode)
print(codes)
""".replace("LOSSES", str(LOSSES)),
    )
    assert (code, out, err) == (0, "{0}\n", "")
    assert trained.losses() == ALL


def test_a_compiled_step_is_compiled_once_however_the_lr_changes(trained: Trained) -> None:
    code, out, err = trained.run(
        """
import torch

compiled = []

def backend(graph, inputs):
    compiled.append(graph)
    return graph.forward

model = torch.nn.Linear(4, 1)
held = torch.tensor(1.0)
optimizer = torch.optim.AdamW(model.parameters(), lr=held, weight_decay=0.1, foreach=False)
batch = torch.ones(8, 4)
forward = torch.compile(lambda batch: model(batch).square().mean(), backend=backend)
update = torch.compile(lambda: optimizer.step(), backend=backend)
pilot = lrpilot.connect(ADDRESS, run=RUN, spec=SPEC)
scheduler = pilot.scheduler(optimizer)
counts, rates = [], []
for at in range(LOSSES):
    loss = forward(batch)
    optimizer.zero_grad(set_to_none=False)
    loss.backward()
    rates.append(held.item())
    update()
    scheduler.step(loss=torch.tensor(float(at)))
    assert optimizer.param_groups[0]["lr"] is held
    counts.append(len(compiled))
assert len(set(rates)) == LOSSES
# The weight decay is a number: it becomes a variable of the graph at its second value.
assert counts[0] == 2 and len(set(counts[2:])) == 1, counts
print("compiled", counts[-1])
""".replace("LOSSES", str(LOSSES))
        .replace("ADDRESS", repr(trained._address))
        .replace("RUN", repr(trained._run))
        .replace("SPEC", repr(make_spec(trained._run, delay=64))),
        "-W",
        "ignore::DeprecationWarning",  # torch's own, as it compiles
    )
    assert (code, out) == (0, "compiled 3\n"), err
    assert "Warning" not in err
    assert trained.losses() == ALL
