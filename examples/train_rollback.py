"""Train a small byte-level GPT in one process that can go back, with LR and WD from lrpilot.

Start a server, then the trainer:

    lrpilot serve --data ./pilot-data
    python examples/train_rollback.py --server 127.0.0.1:50051

Model and text are those of examples/train_ddp.py; the last tenth of the text is held out for
validation. When a policy of the spec asks for a rollback, the handler takes the training back to a
snapshot from before the damage, and the server's LR is lower from there on. The places where the
script meets lrpilot are marked "lrpilot:".
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from train_ddp import CONTEXT, ByteGPT, build_optimizer, load_text

import lrpilot.client as lrpilot

HELD_OUT = 0.1  # share of the text that is kept for validation
VALIDATE_EVERY = 50  # steps


class Batches:
    """Random windows of a text; the data position is the number of batches drawn."""

    def __init__(self, text: Tensor, size: int, seed: int) -> None:
        self.text, self.size, self.seed = text, size, seed
        self.drawn = 0

    def draw(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * self.drawn + self.seed)
        self.drawn += 1
        starts = torch.randint(len(self.text) - CONTEXT, (self.size, 1), generator=generator)
        window = self.text[starts + torch.arange(CONTEXT + 1)]
        return window[:, :-1], window[:, 1:]

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]


def validate(model: nn.Module, text: Tensor) -> float:
    """Return the mean loss over a whole text."""
    starts = torch.arange(0, len(text) - CONTEXT, CONTEXT)
    windows = text[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)]
    total = 0.0
    with torch.no_grad():
        for part in windows.split(16):
            total += model(part[:, :-1], part[:, 1:]).item() * len(part)
    return total / len(windows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", default="127.0.0.1:50051", help="HOST:PORT of lrpilot serve")
    parser.add_argument("--run-name", default="rescue", help="name of the run")
    parser.add_argument("--spec", type=Path, default=Path(__file__).with_name("rescue.yaml"))
    parser.add_argument("--steps", type=int, default=400, help="stop at this progress")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--width", type=int, default=144, help="of the model")
    parser.add_argument("--depth", type=int, default=4, help="of the model, in blocks")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--trace", type=Path, help="file for one line a step")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # the same sums in the same order, however many cores there are
    torch.manual_seed(arguments.seed)
    text = load_text()
    cut = int(len(text) * (1 - HELD_OUT))
    batches, held_out = Batches(text[:cut], arguments.batch, arguments.seed), text[cut:]
    model = ByteGPT(arguments.width, arguments.depth)
    optimizer = build_optimizer(model)
    trace = None if arguments.trace is None else arguments.trace.open("w")

    # lrpilot: attach to the run, open the attempt; this writes the first LR and WD.
    with lrpilot.connect(arguments.server, run=arguments.run_name, spec=arguments.spec) as pilot:
        scheduler = pilot.scheduler(optimizer)
        # lrpilot: the consent to going back. Snapshots reach 200 steps back, and the start is one.
        lrpilot.RollbackHandler(
            pilot,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            data=batches,
            skip=False,  # the LR was at fault, not the data: the same batches come again
            every=20,
            keep=10,
        )
        while scheduler.progress < arguments.steps:
            # After a rollback the progress is the one gone back to.
            progress = scheduler.progress
            loss = model(*batches.draw())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            row = {
                "attempt": pilot.attempt,
                "progress": progress,
                "loss": loss.item(),
                "lr": optimizer.param_groups[0]["lr"],
            }
            optimizer.step()
            if (progress + 1) % VALIDATE_EVERY == 0 or progress + 1 == arguments.steps:
                row["validation"] = validate(model, held_out)
            if trace is not None:
                trace.write(json.dumps(row) + "\n")
                trace.flush()
            if "validation" in row:
                print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)

            # lrpilot: report the loss, move on, write the LR and WD of the next step; go back if
            # that is due there.
            scheduler.step(loss=row["loss"])
    if trace is not None:
        trace.close()


if __name__ == "__main__":
    main()
