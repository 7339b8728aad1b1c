"""Train a small transformer with FP8 matmuls and a step in a CUDA graph; LR and WD from lrpilot.

    python examples/train_fp8.py

Starts a server of its own, or takes --server. On a GPU that has FP8 (Ada, Hopper and later) the
matmuls are torch._scaled_mm, and the whole step is replayed from a graph, the optimizer's update
included: LR and WD are tensors on the device, which the scheduler fills in place. Elsewhere the
same script rounds to FP8 by casts and multiplies in float32, without a graph. The places where it
meets lrpilot are marked "lrpilot:".
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import torch
import torch.nn.functional as F  # noqa: N812 (the name by which everyone knows it)
from torch import Tensor, nn
from train_ddp import load_text

import lrpilot.client as lrpilot
from lrpilot.v1 import runs_pb2, runs_pb2_grpc

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2  # values and weights; gradients
CONTEXT, BATCH, WIDTH, HEADS = 64, 8, 128, 4  # FP8 matmuls want multiples of 16
WARM_UP = 3  # steps before the capture
LIBRARY = os.fspath(Path(sys.executable).with_name("lrpilot"))

HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
DEVICE = torch.device("cuda" if HAS_FP8 else "cpu")
DTYPE = torch.bfloat16 if HAS_FP8 else torch.float32  # of what is between the matmuls


def to_fp8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a tensor rounded to FP8, and the scale that gives its values back."""
    top = torch.finfo(dtype).max
    # Worked out on the device, in the graph: the host never sees it.
    scale = (x.abs().amax().float() / top).clamp(min=1e-12)
    return (x.float() / scale).clamp(-top, top).to(dtype), scale


def multiply(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """Return A times B transposed, both in FP8 with their scales."""
    (left, left_scale), (right, right_scale) = a, b
    if HAS_FP8:
        # The second operand lies in columns, which a transposed matrix does.
        return torch._scaled_mm(
            left.contiguous(),
            right.contiguous().t(),
            scale_a=left_scale,
            scale_b=right_scale,
            out_dtype=DTYPE,
        )
    return (left.float() * left_scale) @ (right.float() * right_scale).t()


class FP8Matmul(torch.autograd.Function):
    """x times the transposed weight; forward in e4m3, gradients of the output in e5m2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rounded_x, rounded_weight = to_fp8(x, E4M3), to_fp8(weight, E4M3)
        ctx.save_for_backward(*rounded_x, *rounded_weight)
        return multiply(rounded_x, rounded_weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, x_scale, weight, weight_scale = ctx.saved_tensors
        gradient, scale = to_fp8(gradients[0], E5M2)
        of_x = multiply((gradient, scale), (weight.t(), weight_scale))
        of_weight = multiply((gradient.t(), scale), (x.t(), x_scale))
        return of_x, of_weight.float()  # the weights are float32


class FP8Linear(nn.Module):
    """A linear layer without bias whose three matmuls are in FP8."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = FP8Matmul.apply(x.flatten(0, -2), self.weight)
        return out.unflatten(0, x.shape[:-1])


class Model(nn.Module):
    """Bytes in, bytes out, with one pre-norm transformer block between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.randn(256, WIDTH) * 0.02)
        self.position = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        self.qkv, self.merge = FP8Linear(WIDTH, 3 * WIDTH), FP8Linear(WIDTH, WIDTH)
        self.up, self.down = FP8Linear(WIDTH, 4 * WIDTH), FP8Linear(4 * WIDTH, WIDTH)

    def forward(self, window: Tensor) -> Tensor:
        x = (F.embedding(window[:, :-1], self.embed) + self.position).to(DTYPE)
        qkv = self.qkv(F.layer_norm(x, (WIDTH,))).unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.merge(attended.transpose(1, 2).flatten(-2))
        x = x + self.down(F.gelu(self.up(F.layer_norm(x, (WIDTH,)))))
        logits = F.layer_norm(x, (WIDTH,)) @ self.embed.to(DTYPE).t()
        return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


def make_dials(*names: str) -> list[dict[str, Any]]:
    """Return what lrpilot writes to: LR and WD of each group, as tensors on the device."""
    keys = ("lr", "weight_decay")
    return [
        {"name": name} | {key: torch.zeros((), device=DEVICE) for key in keys} for name in names
    ]


class Step:
    """One training step on a batch that lies at a fixed place; replayed where there is FP8."""

    def __init__(self, model: Model, dials: list[dict[str, Any]]) -> None:
        self.model = model
        self.window = torch.zeros(BATCH, CONTEXT + 1, dtype=torch.long, device=DEVICE)
        self.loss = torch.zeros((), device=DEVICE)
        tables = [model.embed, model.position]
        matrices = [layer.weight for layer in (model.qkv, model.merge, model.up, model.down)]
        self._groups = list(zip((matrices, tables), dials, strict=True))
        groups = [{"params": held, "lr": dial["lr"]} for held, dial in self._groups]
        # AdamW takes its own weight decay as a number, which a graph would keep: hence 0 here.
        self.optimizer = torch.optim.AdamW(
            groups, weight_decay=0.0, betas=(0.9, 0.95), fused=True, capturable=HAS_FP8
        )
        self._steps = 0
        self._graph: Any = None

    def __call__(self, window: Tensor) -> None:
        """Train on a batch; the loss is in `self.loss` once the device comes there."""
        self.window.copy_(window, non_blocking=True)
        if not HAS_FP8:
            self._train()
        elif self._steps < WARM_UP:
            # Ordinary steps, on another stream, as a capture wants them before it.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._train()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            if self._graph is None:
                self.optimizer.zero_grad()  # the graph has gradients of its own
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph):
                    self._train()
            self._graph.replay()
        self._steps += 1

    def _train(self) -> None:
        self.optimizer.zero_grad()
        loss = self.model(self.window)
        loss.backward()
        with torch.no_grad():
            self.loss.copy_(loss)
            for held, dial in self._groups:
                # Weight decay as AdamW has it, from tensors: a replay reads them anew.
                torch._foreach_mul_(held, 1 - dial["lr"] * dial["weight_decay"])
        self.optimizer.step()


def make_spec(run: str, steps: int) -> dict[str, Any]:
    """Return a spec whose LR and WD change at every step."""
    return {
        "name": run,
        "total": steps,
        "learning_rate": {"peak": 5e-3, "min": 5e-4, "warmup": min(20, steps // 3)},
        "weight_decay": {"start": 0.01, "end": 0.1, "style": "cosine", "over": steps},
        "groups": [{"name": "matrices"}, {"name": "tables", "weight_decay_multiplier": 0.0}],
        "feedback": {"delay": 8},
    }


@contextmanager
def serving(folder: str) -> Iterator[str]:
    """Run a server in a folder, and yield its address."""
    command = [LIBRARY, "serve", "--data", folder, "--listen", "127.0.0.1:0"]
    command += ["--http", "127.0.0.1:0"]
    with (
        Path(folder, "log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as server,
    ):
        assert server.stdout is not None
        try:
            ready = server.stdout.readline()
            yield dict(word.split("=", 1) for word in ready.split()[2:])["grpc"]
        finally:
            server.terminate()


def curve(spec: dict[str, Any], group: str) -> list[list[float]]:
    """Return LR and WD of each step as `lrpilot curve` has them, cast to float32."""
    command = [LIBRARY, "curve", "-", "--every", "1", "--format", "jsonl", "--group", group]
    done = subprocess.run(  # noqa: PLW1510 (an error leaves nothing to compare with)
        command, input=json.dumps(spec), stdout=subprocess.PIPE, text=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return [[single(row["lr"]), single(row["weight_decay"])] for row in rows]


def single(number: float) -> float:
    """Return a number as a float32 holds it."""
    return float(torch.tensor(number, dtype=torch.float32).item())


def losses_in_log(server: str, run: str) -> list[float]:
    """Return the losses that the server has, in order."""
    with grpc.insecure_channel(server) as channel:
        stub = runs_pb2_grpc.RunServiceStub(channel)
        request = runs_pb2.ListEventsRequest(run=run, page_size=1000)
        return [loss.loss for event in stub.ListEvents(request).events for loss in event.losses]


def train(server: str, run: str, steps: int) -> None:
    torch.manual_seed(0)
    text, spec = load_text(), make_spec(run, steps)
    dials = make_dials("matrices", "tables")
    step = Step(Model().to(DEVICE), dials)
    losses, used = [], []
    # lrpilot: attach to the run, open the attempt; this writes the first LR and WD.
    with lrpilot.connect(server, run=run, spec=spec) as pilot:
        scheduler = pilot.scheduler(SimpleNamespace(param_groups=dials))
        for at in range(steps):
            starts = torch.randint(len(text) - CONTEXT - 1, (BATCH, 1))
            step(text[starts + torch.arange(CONTEXT + 1)])
            # Copies on the device, to compare with at the end.
            losses.append(step.loss.clone())
            used.append(
                torch.stack([dial[key] for dial in dials for key in ("lr", "weight_decay")])
            )
            if at % 20 == 0:
                lr, wd = scheduler.applied()[0]  # told without reading the device
                loss = step.loss.item()  # this one waits for it
                print(f"step {at}  loss {loss:.4f}  lr {lr:.4e}  wd {wd:.4f}", flush=True)
            # lrpilot: report the loss where it lies, move on, fill LR and WD in place.
            scheduler.step(loss=step.loss)

    trained = torch.stack(losses).double().tolist()
    first, last = sum(trained[:5]) / 5, sum(trained[-5:]) / 5
    print(f"loss, mean of 5: {first:.4f} first, {last:.4f} last")
    assert last < first, "the loss did not fall"
    assert losses_in_log(server, run) == trained, "the server has other losses"
    print(f"the server has all {steps} losses, equal by ==")
    for number, dial in enumerate(dials):
        held = torch.stack(used)[:, 2 * number : 2 * number + 2].tolist()
        assert held == curve(spec, dial["name"])[:steps], "other values than lrpilot curve"
    print(f"LR and WD on the device were those of lrpilot curve at all {steps} steps, by ==")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", help="HOST:PORT of lrpilot serve. Default: starts one")
    parser.add_argument("--run-name", default="fp8", help="name of the run, a new one")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    if HAS_FP8:
        print(f"FP8 matmuls on {torch.cuda.get_device_name()}, the step in a CUDA graph")
    else:
        print("no GPU with FP8 here: FP8 is emulated by casts, in float32 matmuls on the CPU")
    if arguments.server:
        train(arguments.server, arguments.run_name, arguments.steps)
        return
    with tempfile.TemporaryDirectory() as folder, serving(folder) as server:
        train(server, arguments.run_name, arguments.steps)


if __name__ == "__main__":
    main()
