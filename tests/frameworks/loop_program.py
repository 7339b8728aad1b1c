"""A loop of plain torch, as docs/client.md has it; run by test_loop.py. See `recorder`."""

from pathlib import Path
from typing import Any

import torch

import lrpilot.client as lrpilot
from tests.frameworks.recorder import PLAN, Recorder


def main() -> None:
    recorder = Recorder()
    path = Path(PLAN["folder"]) / "checkpoint.pt"
    torch.manual_seed(7)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint: dict[str, Any] = {}
    if PLAN["resumes"]:
        checkpoint = torch.load(path, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    spec = PLAN["spec"]
    with lrpilot.connect(PLAN["address"], run=spec["name"], spec=spec) as pilot:
        scheduler = pilot.scheduler(optimizer, state=checkpoint.get("scheduler"))
        while scheduler.progress < PLAN["steps"]:
            here = scheduler.progress
            torch.manual_seed(here)
            inputs = torch.randn(8, 4)
            loss = ((model(inputs) - inputs.sum(1, keepdim=True)) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            recorder.used(here, optimizer)
            optimizer.step()
            scheduler.step(loss=loss)
            if scheduler.progress == PLAN["save_at"]:
                saved = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                }
                torch.save(saved, path)
            recorder.lost(here, loss)


main()
