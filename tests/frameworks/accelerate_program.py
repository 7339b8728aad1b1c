"""A loop of Accelerate, on one process or on several; run by test_accelerate.py. See `recorder`.

Two micro-batches make one update. Each fifth update meets a gradient that overflowed, is skipped,
and made again; Accelerate gives no gradient scaler on a CPU, so that it is put in by hand. With
`prepares` the scheduler goes through `prepare`, without it through `register_for_checkpointing`.
"""

from pathlib import Path

import torch
from accelerate import Accelerator

import lrpilot.client as lrpilot
from lrpilot.client.accelerate import LRScheduler
from tests.frameworks.recorder import PLAN, Recorder


def main() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == PLAN["processes"]
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10_000)
    recorder = Recorder() if accelerator.is_main_process else None
    torch.manual_seed(7)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    spec, path = PLAN["spec"], Path(PLAN["folder"]) / "checkpoint"
    with lrpilot.connect(PLAN["address"], run=spec["name"], spec=spec) as pilot:
        scheduler = LRScheduler(pilot, optimizer, accelerator)
        if PLAN["prepares"]:
            prepared = accelerator.prepare(model, optimizer, scheduler)
            assert prepared[2] is scheduler
        else:
            prepared = accelerator.prepare(model, optimizer)
            accelerator.register_for_checkpointing(scheduler)
        model, optimizer = prepared[:2]
        if recorder is not None:
            optimizer.optimizer.register_step_pre_hook(
                lambda *_: recorder.used(scheduler.progress, optimizer)
            )
        if PLAN["resumes"]:
            accelerator.load_state(path)
        is_skipped = False
        while scheduler.last_epoch < PLAN["steps"]:
            here = scheduler.last_epoch
            torch.manual_seed(100 * here + accelerator.process_index)
            factor = float("inf") if here % 5 == 0 and not is_skipped else 1.0
            losses = []
            for _ in range(2):
                with accelerator.accumulate(model):
                    inputs = torch.randn(8, 4)
                    loss = ((model(inputs) - inputs.sum(1, keepdim=True)) ** 2).mean()
                    accelerator.backward(loss * factor)
                    optimizer.step()
                    assert scheduler.last_epoch == here
                    scheduler.step(loss=loss)
                    optimizer.zero_grad()
                losses.append(loss.detach())
            is_skipped = accelerator.optimizer_step_was_skipped
            assert is_skipped == (factor != 1.0)
            assert scheduler.last_epoch == here + (not is_skipped)
            mean = accelerator.gather((losses[0] + losses[1]) / 2).mean()
            if scheduler.last_epoch == PLAN["save_at"] and not is_skipped:
                accelerator.save_state(path)
            if recorder is not None and not is_skipped:
                recorder.lost(here, mean)
    accelerator.end_training()


main()
