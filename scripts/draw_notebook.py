"""Draw docs/images/notebook.png: what `pilot.plot()` shows in the middle of a run.

A server in a temporary folder and a pilot make a run that has something of everything: stages,
groups, a plateau that lets a policy act, an operator, a NaN, a restart from a checkpoint that
forgets what came after it, and an advice. Its losses are written beforehand and do not answer to
the LR.

    python scripts/draw_notebook.py [--out FILE]
"""

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import lrpilot.client as lrpilot

PICTURE = Path(__file__).resolve().parents[1] / "docs/images/notebook.png"
READY_S = 60.0

SPEC = """
name: small-gpt
total: 2400
groups:
  - {name: body}
  - {name: embedding, peak: 1.5e-4, weight_decay_multiplier: 0.0}
weight_decay: 0.1
stages:
  - {name: stable, until: 1800, learning_rate: {peak: 3e-4, warmup: 150}}
  - name: anneal
    learning_rate: {peak: 1.4e-4, init: current, warmup: 50, decay: {style: linear}}
    groups:
      - {name: embedding, peak: 7e-5, weight_decay_multiplier: 0.0}
policies:
  - {kind: plateau, factor: 0.6, window: 50, patience: 3, threshold: 0.01, cooldown: 6}
  - {kind: spike, mode: advise}
feedback: {delay: 64}
"""


@contextmanager
def served() -> Iterator[str]:
    """Yield the address of a server of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lrpilot.server.cli", "serve", "--data", folder]
        command += ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            for line in server.stdout or ():
                if line.startswith("lrpilot ready "):
                    yield dict(word.split("=", 1) for word in line.split()[2:])["grpc"]
                    break
        finally:
            server.terminate()
            server.wait(READY_S)


def loss_at(step: int, noise: Random) -> float:
    """Return a loss that falls, stands still from 620 on, and falls again from 900 on."""
    fallen = min(step, 620) + max(0, step - 900) * 0.7
    return 1.9 + 3.2 * math.exp(-fallen / 320) + noise.gauss(0, 0.05)


GROUPS = ("body", "embedding")
NAN_AT = 430


class Optimizer:
    """What a scheduler needs of one."""

    def __init__(self) -> None:
        self.param_groups = [{"name": name, "lr": 0.0, "weight_decay": 0.1} for name in GROUPS]


def train(
    scheduler: lrpilot.Scheduler, begin: int, end: int, noise: Random, spikes: frozenset[int]
) -> None:
    """Train from `begin` to `end`."""
    for step in range(begin, end):
        loss = loss_at(step, noise) + 2.2 * (step in spikes)
        on_validation = {"val_loss": loss_at(step, Random(step)) + 0.12} if step % 100 == 0 else {}
        scheduler.step(loss=math.nan if step == NAN_AT else loss, val_losses=on_validation)


def operate(address: str, *command: str) -> None:
    """Do as an operator does."""
    signed = ("--server", address, "--author", "operator@login1")
    run = [sys.executable, "-m", "lrpilot.server.cli", "run", *command, *signed]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Make the run and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PICTURE)
    out = parser.parse_args().out
    noise = Random(7)
    with served() as address:
        with lrpilot.connect(address, run="small-gpt", spec=SPEC) as pilot:
            scheduler = pilot.scheduler(Optimizer())
            train(scheduler, 0, 1100, noise, frozenset())
            checkpoint = scheduler.state_dict()
            # The job goes on for a while, with a loss that does not come down any more, and dies.
            train(scheduler, 1100, 1230, noise, frozenset(range(1130, 1230)))
        with lrpilot.connect(address, run="small-gpt", spec=SPEC) as pilot:
            scheduler = pilot.scheduler(Optimizer(), state=checkpoint)
            train(scheduler, 1100, 1300, noise, frozenset())
            operate(
                address, "adjust", "small-gpt", "--scale-lr", "0.8", "--reason", "after the spike"
            )
            train(scheduler, 1300, 1530, noise, frozenset(range(1380, 1400)))
            scheduler.state_dict()
            pilot.plot().savefig(out, dpi=100)
    sys.stdout.write(f"{out}\n")


if __name__ == "__main__":
    main()
