"""A small training that goes well, for tests/golden/healthy_training.jsonl: what it reported.

A network of two layers learns to tell the next byte of this project's sources from the 16 before.
The schedule is that of `test_healthy.py`. Run it as `python -m tests.e2e.healthy_training` to
record anew; other sources, and another torch, give other losses.
"""

import json
import random

import torch
from torch.nn import functional

from lrpilot import core
from tests.e2e.harness import ROOT
from tests.e2e.test_healthy import LEARNING_RATE, RECORD, STEPS

BATCH = 256
CONTEXT = 16
EVALUATE_EVERY = 50


def read_text() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bytes to train on, and a twentieth of them to validate with."""
    files = sorted((ROOT / "sched_core").rglob("*.py")) + sorted((ROOT / "docs").glob("*.md"))
    data = torch.tensor(list(b"".join(file.read_bytes() for file in files)))
    held_out = len(data) // 20
    return data[held_out:], data[:held_out]


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    chance = random.Random(0)
    text, held_out = read_text()
    model = torch.nn.Sequential(
        torch.nn.Embedding(256, 32),
        torch.nn.Flatten(),
        torch.nn.Linear(32 * CONTEXT, 192),
        torch.nn.GELU(),
        torch.nn.Linear(192, 256),
    )
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    spec = core.parse_spec({"name": "healthy", "total": STEPS, "learning_rate": LEARNING_RATE})
    rates = core.base_schedule(spec)

    def loss_of(data: torch.Tensor, begins: list[int]) -> torch.Tensor:
        places = torch.tensor(begins)[:, None] + torch.arange(CONTEXT + 1)
        window = data[places]
        return functional.cross_entropy(model(window[:, :-1]), window[:, -1])

    with RECORD.open("w") as record:
        for n in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = rates(n)[0][0]
            loss = loss_of(text, [chance.randrange(len(text) - CONTEXT) for _ in range(BATCH)])
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            row = {"progress": n, "loss": loss.item(), "grad_norm": norm.item()}
            if n % EVALUATE_EVERY == 0:
                with torch.no_grad():
                    places = list(range(0, len(held_out) - CONTEXT, 3))
                    row["val_loss"] = loss_of(held_out, places).item()
            record.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
