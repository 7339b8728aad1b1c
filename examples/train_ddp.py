"""Train a small byte-level GPT on 2 ranks, with LR and WD from an lrpilot server.

Start a server, then the trainers:

    lrpilot serve --data ./pilot-data
    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py --server 127.0.0.1:50051

The four places where the script meets lrpilot are marked "lrpilot:". All the rest is an
ordinary PyTorch training loop. The text is the language reference that ships inside CPython, so
nothing is downloaded. With ``--checkpoint FILE`` the script saves now and then, and resumes from
FILE when it exists: start the same command again after a crash.
"""

import argparse
import json
from pathlib import Path
from pydoc_data import topics
from typing import Any, TextIO

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (the name by which everyone knows it)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lrpilot.client as lrpilot

CONTEXT = 128  # bytes that the model looks back on
BATCH = 8  # sequences a step on each rank


class Block(nn.Module):
    """A pre-norm transformer block with causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.merge(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm_mlp(x))


class ByteGPT(nn.Module):
    """A GPT over bytes: about a million parameters, no tokenizer."""

    def __init__(self, width: int = 144, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.position = nn.Parameter(torch.empty(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        self.head.weight = self.embed.weight  # input and output share their table
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=width**-0.5)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        hidden = self.blocks(self.embed(x) + self.position)
        logits = self.head(self.norm(hidden))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def load_text() -> Tensor:
    """Return the language reference as a tensor of bytes."""
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def sample_batch(text: Tensor, progress: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return the batch of one step of one rank; a resumed run sees the same batches."""
    generator = torch.Generator().manual_seed(1_000_003 * progress + rank)
    starts = torch.randint(len(text) - CONTEXT - 1, (BATCH, 1), generator=generator)
    window = text[starts + torch.arange(CONTEXT + 1)]
    return window[:, :-1], window[:, 1:]


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW over two named groups, as the spec has them: matrices, and all the rest."""
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"name": "matrices", "params": [p for p in parameters if p.dim() >= 2]},
            {"name": "no_decay", "params": [p for p in parameters if p.dim() < 2]},
        ],
        betas=(0.9, 0.95),
    )


def write_trace(trace: TextIO, progress: int, loss: float, optimizer: Any) -> None:
    """Write what this rank really used at `progress`: exact, hence in hexadecimal."""
    row = {
        "progress": progress,
        "loss": loss,
        "lr": [float(group["lr"]).hex() for group in optimizer.param_groups],
        "weight_decay": [float(group["weight_decay"]).hex() for group in optimizer.param_groups],
    }
    trace.write(json.dumps(row) + "\n")
    trace.flush()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", default="127.0.0.1:50051", help="HOST:PORT of lrpilot serve")
    parser.add_argument("--run-name", default="byte-gpt", help="name of the run")
    parser.add_argument("--spec", type=Path, default=Path(__file__).with_name("byte_gpt.yaml"))
    parser.add_argument("--steps", type=int, default=600, help="stop at this progress")
    parser.add_argument("--checkpoint", type=Path, help="save to and resume from this file")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--trace", type=Path, help="folder for one file a rank of what it used")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    text = load_text()
    model = ByteGPT()
    optimizer = build_optimizer(model)
    ddp = DistributedDataParallel(model)

    checkpoint: dict[str, Any] = {}
    if arguments.checkpoint is not None and arguments.checkpoint.exists():
        checkpoint = torch.load(arguments.checkpoint, weights_only=False)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    progress = checkpoint.get("progress", 0)

    # lrpilot: attach to the run, which the first start creates from the spec.
    with lrpilot.connect(arguments.server, run=arguments.run_name, spec=arguments.spec) as pilot:
        # lrpilot: open the attempt, or resume it; this writes the first LR and WD.
        scheduler = pilot.scheduler(optimizer, state=checkpoint.get("scheduler"))
        trace = None
        if arguments.trace is not None:
            trace = (arguments.trace / f"rank{rank}.jsonl").open("a")

        while progress < arguments.steps:
            loss = ddp(*sample_batch(text, progress, rank))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
            optimizer.step()

            mean_loss = loss.detach()
            dist.all_reduce(mean_loss)
            mean_loss /= world
            if trace is not None:
                write_trace(trace, progress, mean_loss.item(), optimizer)
            if rank == 0 and progress % 10 == 0:
                lr = optimizer.param_groups[0]["lr"]
                print(f"step {progress}  loss {mean_loss.item():.4f}  lr {lr:.3e}", flush=True)

            # lrpilot: report the loss, move on, write the LR and WD of the next step.
            scheduler.step(loss=mean_loss)
            progress += 1

            if arguments.checkpoint is not None and progress % arguments.save_every == 0:
                # lrpilot: the scheduler's state goes into the checkpoint like any other.
                state = scheduler.state_dict()
                if rank == 0:
                    save(arguments.checkpoint, model, optimizer, state, progress)

        if trace is not None:
            trace.close()
    dist.destroy_process_group()


def save(path: Path, model: nn.Module, optimizer: Any, state: Any, progress: int) -> None:
    """Write the checkpoint beside its place, then move it there: a crash leaves the old one."""
    partial = path.with_suffix(path.suffix + ".part")
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": state,
        "progress": progress,
    }
    torch.save(checkpoint, partial)
    partial.replace(path)


if __name__ == "__main__":
    main()
