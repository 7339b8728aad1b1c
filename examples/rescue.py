"""Start a training at ten times the right learning rate, and let lrpilot rescue it.

Trains the same model three times, each on a server's LR: well tuned; at ten times that LR without
policies; and at ten times that LR with the policies of examples/rescue.yaml. The three use the
same script, examples/train_rollback.py, and differ in the spec alone. Writes the curves as
rescue.json and draws them as rescue.png. Fails where the rescued training does not end within 5%
of the well-tuned one's validation loss, or where the other does.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from subprocess import Popen
from typing import Any

import grpc
import matplotlib as mpl
import yaml
from demo import RPC_TIMEOUT_S, DemoFailed, last_lines, process, smooth, stop, wait_until_ready

from lrpilot.v1 import runs_pb2, runs_pb2_grpc

mpl.use("Agg")  # before pyplot, which would look for a screen
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
TOO_HIGH = 10  # times the right learning rate
TOLERANCE = 0.05
SAY_EVERY = 25  # steps
NAMES = {"tuned": "well tuned", "too-high": "10x LR", "rescued": "10x LR with lrpilot"}


@dataclass(frozen=True)
class Step:
    """What one training did at one step."""

    attempt: int
    progress: int
    loss: float
    learning_rate: float
    validation: float | None
    """Validation loss after the step; None: there was no validation."""


@dataclass(frozen=True)
class Training:
    """One of the three trainings, from its start to its end."""

    steps: list[Step]
    rollbacks: list[str]
    """Why each was asked for."""

    @property
    def final(self) -> float:
        """Validation loss at the end."""
        loss = self.steps[-1].validation
        assert loss is not None
        return loss

    @cached_property
    def attempts(self) -> list[list[Step]]:
        """The steps of each attempt, in order."""
        numbers = sorted({step.attempt for step in self.steps})
        return [[step for step in self.steps if step.attempt == number] for number in numbers]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, help="length of each training; default: the spec's")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--out", type=Path, default=HERE.parent / "demo-output")
    parser.add_argument("--width", type=int, default=144, help="of the model")
    parser.add_argument("--depth", type=int, default=4, help="of the model, in blocks")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    return parser.parse_args()


def make_specs(steps: int | None) -> dict[str, dict[str, Any]]:
    """Return the spec of each training: they differ in the LR and in the policies alone."""
    rescued = yaml.safe_load((HERE / "rescue.yaml").read_text())
    if steps is not None:
        rescued["total"] = steps
    rate = rescued["learning_rate"]
    tuned = {**rate, "peak": rate["peak"] / TOO_HIGH}
    return {
        "tuned": {**rescued, "name": "tuned", "learning_rate": tuned, "policies": []},
        "too-high": {**rescued, "name": "too-high", "policies": []},
        "rescued": {**rescued, "name": "rescued"},
    }


def read_trace(path: Path) -> list[Step]:
    """Return what a training has written so far, without a line that is not whole yet."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [
        Step(row["attempt"], row["progress"], row["loss"], row["lr"], row.get("validation"))
        for row in rows
    ]


def follow(trainers: dict[str, Popen[str]], folder: Path) -> None:
    """Say now and then where the trainings are, until all have ended."""
    told = dict.fromkeys(trainers, (0, 0))
    while True:
        running = [name for name, trainer in trainers.items() if trainer.poll() is None]
        for name in trainers:
            steps = read_trace(folder / f"{name}.jsonl")
            if not steps:
                continue
            last = steps[-1]
            here = (last.attempt, (last.progress + 1) // SAY_EVERY)
            if here > told[name]:
                recent = [step.loss for step in steps[-10:]]
                print(
                    f"{NAMES[name]:20} attempt {last.attempt}, step {last.progress:4}"
                    f"  loss {sum(recent) / len(recent):.3f}  LR {last.learning_rate:.2e}",
                    flush=True,
                )
                told[name] = here
        for name, trainer in trainers.items():
            if trainer.returncode:
                log = last_lines(folder / f"{name}.log")
                raise DemoFailed(f"the training {NAMES[name]!r} failed:\n{log}")
        if not running:
            return
        time.sleep(1)


def get_rollbacks(service: runs_pb2_grpc.RunServiceStub, run: str) -> list[str]:
    """Return why each rollback that was made was asked for."""
    answer = service.GetRun(runs_pb2.GetRunRequest(run=run), timeout=RPC_TIMEOUT_S)
    return [
        item.reason
        for item in answer.run.adjustments
        if item.action == "directive" and item.mode == "act"
    ]


def train(arguments: argparse.Namespace, folder: Path) -> dict[str, Training]:
    """Run the three trainings beside each other, on the LR of one server."""
    serve = [os.fspath(Path(sys.executable).with_name("lrpilot")), "serve"]
    serve += ["--data", os.fspath(folder / "data")]
    serve += ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    specs = make_specs(arguments.steps)
    with process(serve, folder / "server.log", pipe=True) as server, ExitStack() as stack:
        address, _ = wait_until_ready(server, folder / "server.log")
        trainers = {}
        for name, spec in specs.items():
            path = folder / f"{name}.yaml"
            path.write_text(yaml.safe_dump(spec, sort_keys=False))
            command = [sys.executable, os.fspath(HERE / "train_rollback.py")]
            command += ["--server", address, "--run-name", name, "--spec", os.fspath(path)]
            command += ["--steps", str(spec["total"]), "--seed", str(arguments.seed)]
            command += ["--width", str(arguments.width), "--depth", str(arguments.depth)]
            command += ["--batch", str(arguments.batch)]
            command += ["--trace", os.fspath(folder / f"{name}.jsonl")]
            # torch keeps files of its own among the temporary ones; they go with the folder.
            trainer = process(
                command, folder / f"{name}.log", environment={"TMPDIR": os.fspath(folder)}
            )
            trainers[name] = stack.enter_context(trainer)
        follow(trainers, folder)
        channel = stack.enter_context(grpc.insecure_channel(address))
        service = runs_pb2_grpc.RunServiceStub(channel)
        return {
            name: Training(read_trace(folder / f"{name}.jsonl"), get_rollbacks(service, name))
            for name in specs
        }


def write(trainings: dict[str, Training], arguments: argparse.Namespace) -> None:
    """Write the curves and the final validation losses as JSON."""
    content = {
        "seed": arguments.seed,
        "trainings": {
            name: {
                "validation": training.final,
                "rollbacks": training.rollbacks,
                "attempt": [step.attempt for step in training.steps],
                "progress": [step.progress for step in training.steps],
                "loss": [step.loss for step in training.steps],
                "learning_rate": [step.learning_rate for step in training.steps],
                "validations": [
                    [step.attempt, step.progress, step.validation]
                    for step in training.steps
                    if step.validation is not None
                ],
            }
            for name, training in trainings.items()
        },
    }
    (arguments.out / "rescue.json").write_text(json.dumps(content) + "\n")


def draw(trainings: dict[str, Training], path: Path) -> None:
    """Draw the losses and the LR of the three trainings, with what was gone back over dashed."""
    ink, grey = "#1f2933", "#9aa5b1"
    colours = {"tuned": "#52606d", "too-high": "#d1495b", "rescued": "#2563a6"}
    plt.rcParams.update({"font.size": 10, "axes.edgecolor": grey, "text.color": ink})
    figure, (loss_axes, lr_axes) = plt.subplots(
        2, sharex=True, figsize=(9, 6.4), height_ratios=[3, 2], layout="constrained"
    )
    end = trainings["tuned"].steps[-1].progress + 1
    for name, training in trainings.items():
        colour = colours[name]
        # What other curves cover must show beneath them.
        wide, alpha = (3.0, 0.4) if name == "tuned" else (0.0, 1.0)
        for attempt in training.attempts:
            is_kept = attempt is training.attempts[-1]
            style: dict[str, Any] = {"color": colour, "linestyle": "-" if is_kept else "--"}
            at = [step.progress for step in attempt]
            rates = [step.learning_rate for step in attempt]
            losses = smooth([step.loss for step in attempt])
            validated = [step for step in attempt if step.validation is not None]
            loss_axes.plot(at, losses, **style, linewidth=1, alpha=0.35)
            loss_axes.plot(
                [step.progress + 1 for step in validated],
                [step.validation for step in validated],
                **style,
                linewidth=wide + (1.8 if is_kept else 1.2),
                alpha=alpha,
                label=f"{NAMES[name]}: {training.final:.3f}" if is_kept else None,
            )
            lr_axes.plot(at, rates, **style, linewidth=wide + 1.5, alpha=alpha)
        for left, entered in zip(training.attempts, training.attempts[1:], strict=False):
            arrow = {"arrowstyle": "->", "color": colour, "connectionstyle": "arc3,rad=0.12"}
            for axes in (loss_axes, lr_axes):
                axes.axvline(left[-1].progress + 1, color=colour, linewidth=1, linestyle=":")
            lr_axes.annotate(
                "",
                xy=(entered[0].progress + 20, max(s.learning_rate for s in entered)),
                xytext=(left[-1].progress + 1, left[-1].learning_rate),
                arrowprops=arrow,
            )
            lr_axes.annotate(
                f"rolled back from {left[-1].progress + 1} to {entered[0].progress}",
                xy=(left[-1].progress + 1, left[-1].learning_rate),
                xytext=(6, -12),
                textcoords="offset points",
                color=colour,
                fontsize=9,
            )
    final = {name: training.final for name, training in trainings.items()}
    top = max(step.validation or 0.0 for step in trainings["rescued"].steps)
    loss_axes.set_ylim(min(final.values()) * 0.93, top * 1.25)
    loss_axes.set_ylabel("loss")
    loss_axes.legend(title="validation loss (faint: training loss)", frameon=False, fontsize=9)
    lr_axes.set_yscale("log")
    peak = max(step.learning_rate for step in trainings["too-high"].steps)
    lr_axes.set_ylim(peak / 300, peak * 1.6)
    lr_axes.set_ylabel("learning rate")
    lr_axes.set_xlabel("step")
    lr_axes.set_xlim(0, end)
    for axes in (loss_axes, lr_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    loss_axes.set_title(
        f"Started at {TOO_HIGH}x the right LR: validation loss "
        f"{final['rescued']:.3f} with lrpilot, {final['too-high']:.3f} without; "
        f"well tuned {final['tuned']:.3f}",
        loc="left",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def check(trainings: dict[str, Training]) -> None:
    """Print the result. Raises DemoFailed where it is not what the example says."""
    tuned, too_high, rescued = (trainings[name].final for name in NAMES)
    print()
    for name, training in trainings.items():
        print(
            f"{NAMES[name]:20} validation loss {training.final:.4f}, {len(training.steps)} steps "
            f"trained, {len(training.attempts) - 1} rollbacks"
        )
    print(f"against the well-tuned training: without the policies {too_high / tuned - 1:+.1%}")
    print(f"against the well-tuned training: with the policies    {rescued / tuned - 1:+.1%}")
    if too_high <= tuned * (1 + TOLERANCE):
        raise DemoFailed(f"the training at {TOO_HIGH} times the LR needed no rescue")
    if rescued > tuned * (1 + TOLERANCE):
        raise DemoFailed(f"the rescued training is not within {TOLERANCE:.0%}")


def main() -> int:
    arguments = parse_arguments()
    stop.watch()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="lrpilot-rescue-") as folder:
            trainings = train(arguments, Path(folder))
        for reason in trainings["rescued"].rollbacks:
            print(f"rolled back: {reason}")
        write(trainings, arguments)
        picture = arguments.out / "rescue.png"
        draw(trainings, picture)
        check(trainings)
        print(f"picture: {picture}")
    except DemoFailed as error:
        print(error)
        return 1
    except KeyboardInterrupt:
        print("stopped; everything is cleaned up")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
