"""Train a small byte-level GPT in a loop of torch, with LR and WD from an lrpilot server.

Start a server, then the trainer:

    lrpilot serve --data ./pilot-data
    python examples/train_torch.py --server 127.0.0.1:50051 --tensorboard ./runs

The scheduler is a `torch.optim.lr_scheduler.LRScheduler`: it is saved, loaded and asked for its LR
as any other. The three places where the script meets lrpilot are marked "lrpilot:"; with
`--tensorboard` it also writes LR, WD and the reasons of their changes there. Model and text are
those of examples/train_ddp.py; nothing is downloaded. The script resumes from `--out`, where that
exists: start the same command again after a crash.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from train_ddp import ByteGPT, build_optimizer, load_text, sample_batch

import lrpilot.client as lrpilot
from lrpilot.client.loggers import TensorBoardLogger
from lrpilot.client.torch import LRScheduler


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", default="127.0.0.1:50051", help="HOST:PORT of lrpilot serve")
    parser.add_argument("--run-name", default="byte-gpt", help="name of the run")
    parser.add_argument("--spec", type=Path, default=Path(__file__).with_name("byte_gpt.yaml"))
    parser.add_argument("--steps", type=int, default=600, help="stop after so many updates")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--out", type=Path, default=Path("byte-gpt.pt"), help="the checkpoint")
    parser.add_argument("--tensorboard", type=Path, help="folder to write LR, WD and changes to")
    return parser.parse_args()


def train(pilot: lrpilot.Pilot, arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    text, model = load_text(), ByteGPT()
    optimizer = build_optimizer(model)
    # lrpilot: in place of a scheduler of torch; it opens the attempt when its state is loaded, or
    # at the optimizer's first step.
    scheduler = LRScheduler(pilot, optimizer, defer=True)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    if arguments.out.exists():
        checkpoint = torch.load(arguments.out, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    rates = scheduler.get_last_lr()
    while scheduler.last_epoch < arguments.steps:
        loss = model(*sample_batch(text, scheduler.last_epoch, rank=0))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates = scheduler.get_last_lr()
        # lrpilot: the loss goes by name.
        scheduler.step(loss=loss)
        if scheduler.last_epoch % arguments.save_every == 0:
            torch.save({name: part.state_dict() for name, part in parts.items()}, arguments.out)
            print(f"step {scheduler.last_epoch}  loss {loss.item():.4f}", flush=True)
    print(f"{scheduler.last_epoch} updates made; the last one used LR {rates[0]:.6g}")


def main() -> None:
    arguments = parse_arguments()
    # lrpilot: attach to the run, which the first start creates from the spec.
    with lrpilot.connect(arguments.server, run=arguments.run_name, spec=arguments.spec) as pilot:
        if arguments.tensorboard is None:
            train(pilot, arguments)
            return
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (an optional package)

        with SummaryWriter(str(arguments.tensorboard)) as writer:
            # Before the scheduler, so that it hears of every change.
            TensorBoardLogger(pilot, writer)
            train(pilot, arguments)


if __name__ == "__main__":
    main()
