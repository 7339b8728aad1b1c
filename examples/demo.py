"""Show lrpilot at work: a server, two training ranks, and a loss that moves the learning rate.

Starts `lrpilot serve` on a temporary folder, trains examples/train_ddp.py on two ranks under
torchrun, and ends with what happened. Everything it started is gone when it ends, however it
ends; only the picture stays.
"""

import argparse
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import types
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import matplotlib as mpl
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lrpilot.core import base_values, parse_spec
from lrpilot.v1 import runs_pb2, runs_pb2_grpc

mpl.use("Agg")  # before pyplot, which would look for a screen
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
RANKS = 2
RUN = "byte-gpt"
START_TIMEOUT_S = 60.0
RPC_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 40.0  # torchrun gives its workers 30 s
METRIC_LINES = 14

console = Console(highlight=False)


class DemoFailed(Exception):
    """The demo cannot go on; the text says why."""


class Stop:
    """Ctrl-C and the like raise KeyboardInterrupt, but not where that would lose a process."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._held = False
        self._asked = False

    def watch(self) -> None:
        for sign in self.SIGNALS:
            signal.signal(sign, self._stop)

    @contextmanager
    def held(self) -> Iterator[None]:
        self._held = True
        yield
        self._held = False
        if self._asked:
            raise KeyboardInterrupt

    def _stop(self, _signum: int, _frame: types.FrameType | None) -> None:
        # A second signal must not break off the cleaning up, which is bounded.
        for sign in self.SIGNALS:
            signal.signal(sign, signal.SIG_IGN)
        self._asked = True
        if not self._held:
            raise KeyboardInterrupt


stop = Stop()


@dataclass(frozen=True)
class Step:
    """What one rank used at one step."""

    progress: int
    loss: float
    learning_rates: tuple[str, ...]  # float.hex()
    weight_decays: tuple[str, ...]  # float.hex()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, help="stop early, at this progress")
    parser.add_argument("--out", type=Path, default=HERE.parent / "demo-output")
    parser.add_argument("--spec", type=Path, default=HERE / "byte_gpt.yaml")
    return parser.parse_args()


@contextmanager
def process(
    command: list[str], log: Path, *, pipe: bool = False, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run a program in a process group of its own; end the whole group on leaving."""
    child: subprocess.Popen[str] | None = None
    try:
        # Stopped between the start and the name for it, nobody would end it.
        with stop.held(), log.open("w") as written:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipe else written,
                stderr=written,
                text=True,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        yield child
    finally:
        if child is not None:
            end(child)


def end(child: subprocess.Popen[str]) -> None:
    """End a process and its group: children of one that ended by itself may live on."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, sign)
            child.wait(timeout=STOP_TIMEOUT_S)
        except (ProcessLookupError, PermissionError):
            break
        except subprocess.TimeoutExpired:
            continue
    if child.stdout is not None:
        child.stdout.close()


def last_lines(log: Path, count: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])


def wait_until_ready(server: subprocess.Popen[str], log: Path) -> tuple[str, str]:
    """Return the gRPC and the HTTP address that the server names once it serves."""
    assert server.stdout is not None
    deadline = time.monotonic() + START_TIMEOUT_S
    with selectors.DefaultSelector() as selector:
        selector.register(server.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(timeout=left):
                break
            line = server.stdout.readline()
            if not line:
                break
            if line.startswith("lrpilot ready "):
                named = dict(word.split("=", 1) for word in line.split()[2:])
                return named["grpc"], named["http"]
    raise DemoFailed(f"the server did not start:\n{last_lines(log)}")


def read_trace(path: Path) -> list[Step]:
    """Return what a rank has written so far, without a line that is not whole yet."""
    if not path.exists():
        return []
    steps = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            row = json.loads(line)
            steps.append(
                Step(
                    progress=row["progress"],
                    loss=row["loss"],
                    learning_rates=tuple(row["lr"]),
                    weight_decays=tuple(row["weight_decay"]),
                )
            )
    return steps


def get_run(service: runs_pb2_grpc.RunServiceStub) -> runs_pb2.Run | None:
    """Return the run, or None before the trainers created it."""
    try:
        answer: runs_pb2.GetRunResponse = service.GetRun(
            runs_pb2.GetRunRequest(run=RUN), timeout=RPC_TIMEOUT_S
        )
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.NOT_FOUND:
            return None
        raise
    return answer.run


def follow(
    trainers: subprocess.Popen[str],
    service: runs_pb2_grpc.RunServiceStub,
    trace: Path,
    total: int,
) -> None:
    """Show where the training is until it ends; name each adjustment when it is decided."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  LR {task.fields[lr]}"),
        TimeElapsedColumn(),
    )
    told = 0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total, loss="", lr="")
        while True:
            ended = trainers.poll() is not None
            steps = read_trace(trace)
            if steps:
                progress.update(
                    task,
                    completed=steps[-1].progress + 1,
                    loss=f"{steps[-1].loss:.3f}",
                    lr=f"{float.fromhex(steps[-1].learning_rates[0]):.2e}",
                )
            run = get_run(service)
            for adjustment in list(run.adjustments)[told:] if run is not None else []:
                told += 1
                progress.console.print(
                    f"[bold]the loss at step {adjustment.decided_at} moves the LR "
                    f"from step {adjustment.effective} on[/bold]: {adjustment.reason}"
                )
            if ended:
                return
            time.sleep(1)


def differing_steps(traces: list[list[Step]]) -> list[int]:
    """Return the steps at which the ranks did not use the same values, compared by bits."""
    values = [
        {step.progress: (step.learning_rates, step.weight_decays) for step in trace}
        for trace in traces
    ]
    every = sorted(set().union(*values))
    return [n for n in every if any(rank.get(n) != values[0].get(n) for rank in values)]


def smooth(losses: list[float], weight: float = 0.1) -> list[float]:
    """Return the bias-corrected exponential average."""
    smoothed, average, mass = [], 0.0, 0.0
    for loss in losses:
        average = (1 - weight) * average + weight * loss
        mass = (1 - weight) * mass + weight
        smoothed.append(average / mass)
    return smoothed


def draw(run: runs_pb2.Run, steps: list[Step], spec_text: str, path: Path) -> None:
    """Draw the loss, the LR and the WD over the steps, with every adjustment marked."""
    spec = parse_spec(yaml.safe_load(spec_text))
    at = [step.progress for step in steps]
    base = [base_values(spec, n)[0][0] for n in at]
    ink, blue, orange, grey = "#1f2933", "#2563a6", "#d1495b", "#9aa5b1"
    plt.rcParams.update({"font.size": 10, "axes.edgecolor": grey, "text.color": ink})
    figure, (loss_axes, lr_axes, wd_axes) = plt.subplots(
        3, sharex=True, figsize=(9, 7), height_ratios=[3, 3, 1.4], layout="constrained"
    )

    losses = [step.loss for step in steps]
    loss_axes.plot(at, losses, color=grey, linewidth=0.7, label="reduced loss of each step")
    loss_axes.plot(at, smooth(losses), color=ink, linewidth=1.8, label="smoothed")
    loss_axes.set_ylabel("loss")
    loss_axes.set_ylim(min(losses) * 0.95, sorted(losses)[int(0.98 * (len(losses) - 1))] * 1.05)

    used = [float.fromhex(step.learning_rates[0]) for step in steps]
    lr_axes.plot(at, base, color=grey, linewidth=1.5, linestyle="--", label="base schedule")
    lr_axes.plot(at, used, color=blue, linewidth=1.8, label="used by both ranks")
    lr_axes.set_ylabel("learning rate")
    lr_axes.set_ylim(0, max(base) * 1.28)
    lr_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))

    decays = [float.fromhex(step.weight_decays[0]) for step in steps]
    wd_axes.plot(at, decays, color=blue, linewidth=1.8)
    wd_axes.set_ylabel("weight decay")
    wd_axes.set_ylim(0, max(decays) * 1.15)
    wd_axes.set_xlabel("step")
    wd_axes.set_xlim(0, at[-1])

    for number, adjustment in enumerate(run.adjustments):
        for axes in (loss_axes, lr_axes, wd_axes):
            axes.axvspan(
                adjustment.decided_at, adjustment.effective, color=orange, alpha=0.12, lw=0
            )
            axes.axvline(adjustment.effective, color=orange, linewidth=1)
        lr_axes.annotate(
            f"plateau, seen at {adjustment.decided_at}: "
            f"LR times {adjustment.factor:g} from {adjustment.effective} on",
            xy=(adjustment.effective, max(adjustment.before[0], adjustment.after[0])),
            xytext=(adjustment.effective + 0.012 * at[-1], max(base) * (1.17 - 0.1 * (number % 2))),
            color=orange,
            fontsize=9,
        )
    for axes in (loss_axes, lr_axes):
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.97), frameon=False, fontsize=9, ncols=2)
    for axes in (loss_axes, lr_axes, wd_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    loss_axes.set_title(
        "A byte-level GPT on two ranks: the loss moves the learning rate", loc="left", fontsize=11
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def show_metrics(address: str) -> None:
    """Print the metrics of the run as Prometheus would scrape them, while the server lives."""
    url = f"http://{address}/metrics"
    with urllib.request.urlopen(url, timeout=RPC_TIMEOUT_S) as answer:
        lines = answer.read().decode().splitlines()
    shown = [line for line in lines if f'run="{RUN}"' in line][:METRIC_LINES]
    console.print(f"\n[bold]Metrics[/bold], {url} while the server ran; among them:")
    for line in shown:
        console.print(f"  {line}", markup=False, soft_wrap=True)


def show_result(run: runs_pb2.Run, steps: list[Step], seconds: float) -> None:
    """Print the short tables at the end."""
    first = sum(step.loss for step in steps[:10]) / len(steps[:10])
    last = sum(step.loss for step in steps[-10:]) / len(steps[-10:])
    summary = Table(title="The run", title_justify="left", show_header=False)
    summary.add_row("steps", f"{len(steps)} in {seconds:.0f} s, {RANKS} ranks")
    summary.add_row("loss, mean of 10 steps", f"{first:.3f} first, {last:.3f} last")
    summary.add_row("losses in the log", f"{run.losses} ({run.nonfinite_losses} not finite)")
    summary.add_row("waivers, late losses", f"{run.waivers}, {run.late_losses}")
    summary.add_row("delay D", f"{run.delay}: a loss at n acts at exactly n + {run.delay}")
    console.print(summary)

    table = Table(title="Adjustments", title_justify="left")
    for heading in ("loss at", "acts at", "LR before", "LR after", "reason"):
        table.add_column(heading, justify="left" if heading == "reason" else "right")
    for adjustment in run.adjustments:
        table.add_row(
            str(adjustment.decided_at),
            str(adjustment.effective),
            f"{adjustment.before[0]:.3e}",
            f"{adjustment.after[0]:.3e}",
            adjustment.reason,
        )
    console.print(table)


def check(run: runs_pb2.Run, traces: list[list[Step]], total: int) -> None:
    """Say whether the ranks used the same bits, and fail where the demo shows less than it says."""
    steps = traces[0]
    if [step.progress for step in steps] != list(range(total)):
        raise DemoFailed(f"rank 0 wrote {len(steps)} steps, not {total}")
    if differing := differing_steps(traces):
        raise DemoFailed(f"the ranks used different values at steps {differing[:10]}")
    count = sum(len(step.learning_rates) + len(step.weight_decays) for step in steps)
    console.print(
        f"[green]✓[/green] both ranks used bit-identical LR and WD at every one of "
        f"{len(steps)} steps ({count} values compared)"
    )
    if not run.adjustments:
        raise DemoFailed("no policy fired: the loss kept falling")


def demonstrate(arguments: argparse.Namespace, folder: Path) -> None:
    spec_text = arguments.spec.read_text()
    total = arguments.steps or yaml.safe_load(spec_text)["total"]
    server_log, trainer_log = folder / "server.log", folder / "trainers.log"
    serve = [os.fspath(Path(sys.executable).with_name("lrpilot")), "serve"]
    serve += ["--data", os.fspath(folder / "data")]
    serve += ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    console.print(f"[dim]$ {' '.join(serve)}[/dim]", soft_wrap=True)
    with process(serve, server_log, pipe=True) as server:
        grpc_address, http_address = wait_until_ready(server, server_log)
        console.print(f"the server is at {grpc_address}; watch the run while it trains:")
        console.print(f"  http://{http_address}/runs/{RUN}", soft_wrap=True)
        train = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        train += ["--local-addr", "127.0.0.1", "--nproc-per-node", str(RANKS)]
        train += [os.fspath(HERE / "train_ddp.py"), "--server", grpc_address, "--run-name", RUN]
        train += ["--spec", os.fspath(arguments.spec), "--steps", str(total)]
        train += ["--trace", os.fspath(folder)]
        console.print(f"[dim]$ {' '.join(train)}[/dim]", soft_wrap=True)
        begin = time.monotonic()
        # torch keeps files of its own among the temporary ones; they go with the folder.
        environment = {"OMP_NUM_THREADS": "1", "TMPDIR": os.fspath(folder)}
        if sys.platform == "linux":
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        with (
            process(train, trainer_log, environment=environment) as trainers,
            grpc.insecure_channel(grpc_address) as channel,
        ):
            service = runs_pb2_grpc.RunServiceStub(channel)
            follow(trainers, service, folder / "rank0.jsonl", total)
            if trainers.returncode != 0:
                raise DemoFailed(f"the training failed:\n{last_lines(trainer_log)}")
            seconds = time.monotonic() - begin
            run = get_run(service)
        if run is None:
            raise DemoFailed("the server does not know the run")
        show_metrics(http_address)
    traces = [read_trace(folder / f"rank{rank}.jsonl") for rank in range(RANKS)]
    console.print()
    show_result(run, traces[0], seconds)
    check(run, traces, total)
    picture = arguments.out / "demo.png"
    draw(run, traces[0], spec_text, picture)
    console.print(f"[green]✓[/green] picture: {picture}", soft_wrap=True)


def main() -> int:
    arguments = parse_arguments()
    stop.watch()
    try:
        with tempfile.TemporaryDirectory(prefix="lrpilot-demo-") as folder:
            demonstrate(arguments, Path(folder))
    except DemoFailed as error:
        console.print(f"[red]✗[/red] {error}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("stopped; everything is cleaned up")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
