"""A loop with torch's own classes; run by test_torch.py. See `recorder`.

The scheduler is a `torch.optim.lr_scheduler.LRScheduler`, opened where its state is loaded, beside
two param groups with names. Each fifth update meets a gradient that overflowed, is skipped by a
gradient scaler, and made again.
"""

import warnings
from pathlib import Path
from typing import Any

import torch

import lrpilot.client as lrpilot
from lrpilot.client.torch import LRScheduler
from tests.frameworks.recorder import PLAN, Recorder

warnings.simplefilter("error")


def main() -> None:
    recorder = Recorder()
    path = Path(PLAN["folder"]) / "checkpoint.pt"
    torch.manual_seed(7)
    model = torch.nn.Linear(4, 1)
    groups = [
        {"name": "no_decay", "params": [model.bias]},
        {"name": "matrices", "params": [model.weight]},
    ]
    optimizer = torch.optim.AdamW(groups)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10_000)
    spec = PLAN["spec"]
    with lrpilot.connect(PLAN["address"], run=spec["name"], spec=spec) as pilot:
        scheduler = LRScheduler(pilot, optimizer, defer=True)
        # What was served is what the step uses: this is called after the scheduler's own hook.
        optimizer.register_step_pre_hook(lambda *_: recorder.used(scheduler.progress, optimizer))
        parts: dict[str, Any] = {"model": model, "scheduler": scheduler, "optimizer": optimizer}
        if PLAN["resumes"]:
            checkpoint = torch.load(path, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
        is_skipped = False
        while scheduler.last_epoch < PLAN["steps"]:
            here = scheduler.last_epoch
            torch.manual_seed(here)
            inputs = torch.randn(8, 4)
            loss = ((model(inputs) - inputs.sum(1, keepdim=True)) ** 2).mean()
            factor = float("inf") if here % 5 == 0 and not is_skipped else 1.0
            optimizer.zero_grad()
            scaler.scale(loss * factor).backward()
            scaler.step(optimizer)
            scale = scaler.get_scale()
            scaler.update()
            is_skipped = scaler.get_scale() < scale
            scheduler.step(loss=loss, skipped=is_skipped)
            if is_skipped:
                continue
            rates = [group["lr"] for group in optimizer.param_groups]
            assert scheduler.get_last_lr() == rates
            if scheduler.last_epoch == PLAN["save_at"]:
                torch.save({name: part.state_dict() for name, part in parts.items()}, path)
            recorder.lost(here, loss.detach())


main()
