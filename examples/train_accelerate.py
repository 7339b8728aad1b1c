"""Train a small byte-level GPT with Accelerate, with LR and WD from an lrpilot server.

Start a server, then the trainer, on one process or on several:

    lrpilot serve --data ./pilot-data
    python examples/train_accelerate.py --server 127.0.0.1:50051
    torchrun --standalone --nproc-per-node 2 examples/train_accelerate.py --server 127.0.0.1:50051

The three places where the script meets lrpilot are marked "lrpilot:". Model and text are those of
examples/train_ddp.py; nothing is downloaded. The script resumes from the checkpoint of Accelerate
in `--out`, where there is one: start the same command again after a crash.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from train_ddp import ByteGPT, build_optimizer, load_text, sample_batch

import lrpilot.client as lrpilot
from lrpilot.client.accelerate import LRScheduler

MICRO_BATCHES = 2  # an update


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", default="127.0.0.1:50051", help="HOST:PORT of lrpilot serve")
    parser.add_argument("--run-name", default="byte-gpt", help="name of the run")
    parser.add_argument("--spec", type=Path, default=Path(__file__).with_name("byte_gpt.yaml"))
    parser.add_argument("--steps", type=int, default=600, help="stop after so many updates")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--out", type=Path, default=Path("accelerate-out"), help="the checkpoint")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    # On a GPU, leave `cpu` out.
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES)
    torch.manual_seed(0)
    text, model = load_text(), ByteGPT()
    optimizer = build_optimizer(model)
    # lrpilot: attach to the run, once the process group is there.
    with lrpilot.connect(arguments.server, run=arguments.run_name, spec=arguments.spec) as pilot:
        # lrpilot: in place of a scheduler of torch.
        scheduler = LRScheduler(pilot, optimizer, accelerator)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        if arguments.out.exists():
            accelerator.load_state(arguments.out)
        rates = scheduler.get_last_lr()
        while scheduler.last_epoch < arguments.steps:
            for micro_batch in range(MICRO_BATCHES):
                at = scheduler.last_epoch * MICRO_BATCHES + micro_batch
                with accelerator.accumulate(model):
                    loss = model(*sample_batch(text, at, accelerator.process_index))
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    rates = scheduler.get_last_lr()
                    # lrpilot: each micro-batch on each process; it reports their mean.
                    scheduler.step(loss=loss)
                    optimizer.zero_grad()
            if scheduler.last_epoch % arguments.save_every == 0:
                accelerator.save_state(arguments.out)
                accelerator.print(f"step {scheduler.last_epoch}  loss {loss.item():.4f}")
    accelerator.print(f"{scheduler.last_epoch} updates made; the last one used LR {rates[0]:.6g}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
