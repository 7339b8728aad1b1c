"""What scheduler.step() costs the training thread, beside the schedulers that it stands in for.

A server runs on the same machine. Between two steps the thread rests, as it would while the device
works, so that reports are delivered and values renewed meanwhile; what those threads take away from
the step is in its time. Each scheduler takes its turn, several times.

    python benchmarks/step.py --steps 2000 --groups 1 2 8

On a machine with a CUDA GPU it also shows, with PyTorch's own checks, that a loss on the GPU makes
nothing wait, and that a CUDA graph can be captured while losses are under way.
"""

import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import lrpilot.client as lrpilot

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # It says which of its optional parts are missing.
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

TOTAL = 1_000_000
WARM_UP = 50
"""Steps that are not counted."""

SYNCHRONIZING = (
    "Synchronize",
    "cudaMemcpy ",
    "Pageable",
    "cudaEventQuery",
    "aten::item",
    "_local_scalar_dense",
)
"""Parts of the names, with a space after each, that a profiler gives to what waits for a GPU, or
asks it."""

out = sys.stdout.write


@contextmanager
def serving() -> Iterator[str]:
    """Run a server on a temporary folder, and yield its address."""
    with tempfile.TemporaryDirectory() as folder:
        command = [os.fspath(Path(sys.executable).with_name("lrpilot")), "serve"]
        command += ["--data", folder, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
        with subprocess.Popen(  # noqa: S603 (a program of this environment)
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as server:
            ready = server.stdout.readline() if server.stdout is not None else ""
            try:
                yield dict(word.split("=", 1) for word in ready.split()[2:])["grpc"]
            finally:
                server.terminate()


def make_optimizer(groups: int, **options: Any) -> Any:
    """Return AdamW with that many param groups of one parameter."""
    names = [f"group-{number}" for number in range(groups)]
    made = [{"name": name, "params": [torch.nn.Parameter(torch.zeros(8))]} for name in names]
    optimizer = torch.optim.AdamW(made, **options)
    optimizer.step()  # The schedulers of torch warn where none was made.
    return optimizer


def make_spec(groups: int) -> dict[str, Any]:
    """Return a cosine schedule with a ramp of weight decay, like those beside it."""
    return {
        "name": f"step-{uuid.uuid4().hex[:8]}",
        "total": TOTAL,
        "learning_rate": {"peak": 1e-3, "min": 1e-5, "warmup": 1000},
        "weight_decay": {"start": 0.01, "end": 0.1, "style": "cosine", "over": TOTAL},
        "groups": [{"name": f"group-{number}"} for number in range(groups)],
        "feedback": {"delay": 1024},
    }


def lambda_lr(groups: int) -> Callable[[float], object]:
    """Return a step of torch's LambdaLR with a cosine."""
    optimizer = make_optimizer(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda at: 0.5 * (1.0 + math.cos(math.pi * at / TOTAL))
    )
    return lambda _: scheduler.step()


def cosine_lr(groups: int) -> Callable[[float], object]:
    """Return a step of torch's CosineAnnealingLR."""
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(make_optimizer(groups), TOTAL)
    return lambda _: scheduler.step()


def megatron(groups: int) -> Callable[[float], object]:
    """Return a step of Megatron's OptimizerParamScheduler."""
    scheduler = OptimizerParamScheduler(
        make_optimizer(groups),
        init_lr=0.0,
        max_lr=1e-3,
        min_lr=1e-5,
        lr_warmup_steps=1000,
        lr_decay_steps=TOTAL,
        lr_decay_style="cosine",
        start_wd=0.01,
        end_wd=0.1,
        wd_incr_steps=TOTAL,
        wd_incr_style="cosine",
    )
    return lambda _: scheduler.step(increment=1)


def time_steps(step: Callable[[float], object], steps: int, rest_s: float) -> list[float]:
    """Return the time of each step in microseconds."""
    times = []
    for at in range(WARM_UP + steps):
        time.sleep(rest_s)
        begin = time.perf_counter_ns()
        step(2.0 + at)
        times.append((time.perf_counter_ns() - begin) / 1000)
    return times[WARM_UP:]


def measure(address: str, groups: int, arguments: argparse.Namespace) -> None:
    """Measure with a number of groups, and print a table."""
    others = {
        "LambdaLR": lambda_lr(groups),
        "CosineAnnealingLR": cosine_lr(groups),
        "Megatron's OptimizerParamScheduler": megatron(groups),
    }
    spec = make_spec(groups)
    with lrpilot.connect(address, run=spec["name"], spec=spec) as pilot:
        scheduler = pilot.scheduler(make_optimizer(groups))
        ways = {"lrpilot": lambda loss: scheduler.step(loss=loss), **others}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(arguments.repeat):
            for name, step in ways.items():
                sys.stderr.write(f"{groups} groups, turn {turn + 1}: {name}\x1b[K\r")
                times[name] += time_steps(step, arguments.steps, arguments.rest_ms / 1000)
    sys.stderr.write("\x1b[K")
    ours = statistics.median(times["lrpilot"])
    out(f"\n{f'{groups} param groups, µs':<36}{'median':>10}{'99%':>10}{'lrpilot is':>14}\n")
    for name, taken in times.items():
        median, late = statistics.median(taken), statistics.quantiles(taken, n=100)[98]
        ratio = "" if name == "lrpilot" else f"{ours / median:.2f}x"
        out(f"{name:<36}{median:>10.1f}{late:>10.1f}{ratio:>14}\n")


def check_gpu(address: str) -> None:
    """Show that losses on a GPU make nothing wait; raises where they do."""
    if not torch.cuda.is_available():
        out("\nno GPU here: not run: the check that a loss on a GPU makes nothing wait\n")
        return
    spec = make_spec(1)
    optimizer = make_optimizer(1, lr=torch.tensor(1e-3, device="cuda"), foreach=False)
    work = torch.randn(4096, 4096, device="cuda")
    with lrpilot.connect(address, run=spec["name"], spec=spec) as pilot:
        scheduler = pilot.scheduler(optimizer)
        scheduler.step(loss=work.square().mean())  # This one sets up.
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        try:
            with torch.profiler.profile(activities=activities) as profile:
                begin = time.perf_counter()
                for _ in range(50):
                    loss = (work @ work).square().mean()
                    scheduler.step(loss=loss)
                issued_s = time.perf_counter() - begin
        finally:
            torch.cuda.set_sync_debug_mode("default")
        # As the loop saw it: the profiler itself waits for the GPU at its end.
        found = [event.key for event in profile.key_averages()]
        waits = [key for key in found if any(part in f"{key} " for part in SYNCHRONIZING)]
        torch.cuda.synchronize()
        graph, static = torch.cuda.CUDAGraph(), torch.zeros(8, device="cuda")
        for _ in range(20):
            scheduler.step(loss=(work @ work).square().mean())
        with torch.cuda.graph(graph):
            static += 1
            time.sleep(0.2)  # Losses arrive meanwhile, and another thread looks at them.
        for _ in range(5):
            graph.replay()
            scheduler.step(loss=static.mean())
    name = torch.cuda.get_device_name()
    out(f"\n{name}: 50 steps were issued in {issued_s * 1000:.1f} ms; waits: {waits or 'none'}\n")
    out(f"{name}: a graph was captured while losses were under way\n")
    if not set(waits) <= {"cudaDeviceSynchronize"}:
        raise SystemExit("a step waits for the GPU, or asks it")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000, help="of each turn (%(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="turns of each (%(default)s)")
    parser.add_argument("--rest-ms", type=float, default=2.0, help="between steps (%(default)s)")
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 8], help="(1 2 8)")
    arguments = parser.parse_args()
    out(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, ")
    out(f"Python {platform.python_version()}, torch {torch.__version__}\n")
    with serving() as address:
        for groups in arguments.groups:
            measure(address, groups, arguments)
        check_gpu(address)


if __name__ == "__main__":
    main()
