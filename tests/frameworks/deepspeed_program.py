"""A DeepSpeed engine on the CPU, as docs/frameworks/deepspeed.md has it; see `recorder`.

The plan may have besides:

    config          what joins the engine's configuration
    accumulate      number of micro-batches of an update
    overflow_at     progress whose first try has gradients that are not finite
    pipeline        whether the model is a pipeline, of as many stages as there are ranks
    torch_backward  whether the loop calls loss.backward(), and has a validation loss of 1.5
    half_offloaded  whether the engine looks as if it had a second optimizer
    spoils          whether the checkpoint's optimizer holds other values than those served
    other           whether a scheduler that was there before is still stepped by hand
    reconnects      whether it closes the pilot after the checkpoint, and goes on by another one
    lr_kwargs       what engine.step gets as lr_kwargs
    refused         whether InvalidArgument is awaited, and printed
"""

import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import deepspeed
import deepspeed.ops
import pytest
import torch
import torch.distributed
from deepspeed.pipe import LayerSpec, PipelineModule

import lrpilot.client as lrpilot
from lrpilot.client.deepspeed import DeepSpeedScheduler
from tests.frameworks.recorder import PLAN, Recorder

# It would be compiled first; gloo does what it does.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

_ALONE = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"))

PARTS = PLAN.get("accumulate", 1)
RANK, RANKS = (int(os.environ.get(name, default)) for name, default in _ALONE[:2])


class Training:
    """An engine, its scheduler, and what the optimizer under the engine uses."""

    def __init__(
        self, engine: Any, scheduler: DeepSpeedScheduler, recorder: Recorder | None
    ) -> None:
        self._engine, self._scheduler, self._recorder = engine, scheduler, recorder
        if PLAN.get("other"):
            optimizer = engine.basic_optimizer
            self._other = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
        self._overflows = PLAN.get("overflow_at")
        self._here = 0
        self._uses: list[list[dict[str, Any]]] = []
        engine.basic_optimizer.register_step_pre_hook(
            lambda optimizer, *_: self._uses.append([dict(it) for it in optimizer.param_groups])
        )

    def run(self) -> None:
        if PLAN["resumes"]:
            self._engine.load_checkpoint(PLAN["folder"], "saved")
            self._here = self._scheduler.progress
        while self._here < PLAN["steps"]:
            loss = self._pipeline_update() if PLAN.get("pipeline") else self._update()
            self._record(loss)
            if self._here == PLAN["save_at"] and not PLAN["resumes"]:
                self._save()
        self._scheduler._pilot.close()

    def _update(self) -> torch.Tensor:
        losses = []
        for part in range(PARTS):
            loss = self._loss(part)
            losses.append(loss.detach())
            if PLAN.get("torch_backward"):
                self._scheduler.report(loss)
                loss.backward()
            else:
                self._engine.backward(loss)
            self._engine.step(PLAN.get("lr_kwargs"))
        if PLAN.get("other"):
            self._other.step()
        if PLAN.get("torch_backward"):
            self._scheduler.report_validation("dev", 1.5)
        return _mean(torch.stack(losses).sum() / PARTS)

    def _loss(self, part: int) -> torch.Tensor:
        inputs = _inputs(self._here, part)
        outputs = self._engine(inputs.to(next(self._engine.module.parameters()).dtype))
        loss = ((outputs.float() - inputs.sum(1, keepdim=True)) ** 2).mean()
        if self._here == self._overflows and part == PARTS - 1:
            self._overflows = None
            loss = loss * float("inf")
        return loss

    def _pipeline_update(self) -> torch.Tensor:
        def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for part in range(PARTS):
                inputs = _inputs(self._here, part)
                yield inputs, inputs.sum(1, keepdim=True)

        loss: torch.Tensor = self._engine.train_batch(batches())
        return loss

    def _record(self, loss: torch.Tensor) -> None:
        """Note what the optimizer used, where it made the update."""
        before, self._here = self._here, self._scheduler.progress
        uses, self._uses = self._uses, []
        if not uses:
            assert self._here == before, "no optimizer stepped, and the progress moved"
            return
        # ZeRO lets it step once for each param group, which it sees alone, or for each part.
        groups = uses[0] if len(uses[0]) == 2 else [group for use in uses for group in use]
        assert len(groups) == 2
        if self._recorder is not None:
            self._recorder.used(before, SimpleNamespace(param_groups=groups))
            self._recorder.lost(before, loss)

    def _save(self) -> None:
        kept = [(group["lr"], group["weight_decay"]) for group in self._groups]
        if PLAN.get("spoils"):
            for group in self._groups:
                group.update(lr=123.0, weight_decay=456.0)
        self._engine.save_checkpoint(PLAN["folder"], "saved")
        for group, (rate, decay) in zip(self._groups, kept, strict=True):
            group.update(lr=rate, weight_decay=decay)
        if PLAN.get("reconnects"):
            self._scheduler._pilot.close()
            self._scheduler = attach(self._engine)
            self._engine.load_checkpoint(PLAN["folder"], "saved")

    @property
    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups


def attach(engine: Any) -> DeepSpeedScheduler:
    """Connect, and give the engine the scheduler; a second one of the same pilot is refused."""
    pilot = lrpilot.connect(PLAN["address"], run=PLAN["spec"]["name"], spec=PLAN["spec"])
    scheduler = DeepSpeedScheduler(pilot, engine)
    with pytest.raises(lrpilot.InvalidArgument, match="has no scheduler of this pilot"):
        DeepSpeedScheduler(pilot, engine)
    return scheduler


def main() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    for name, value in _ALONE:
        os.environ.setdefault(name, value)
    if RANKS == 1:
        # No port is needed where this process is alone.
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=False)
    torch.manual_seed(7)
    model: Any
    if PLAN.get("pipeline"):
        layers = [LayerSpec(torch.nn.Linear, 4, 4), LayerSpec(torch.nn.Linear, 4, 1)]
        model = PipelineModule(layers=layers, num_stages=RANKS, loss_fn=torch.nn.MSELoss())
    else:
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [it for name, it in named if name.endswith("weight")]},
            {"params": [it for name, it in named if name.endswith("bias")], "weight_decay": 0.0},
        ]
    )
    config = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": PARTS}
    config |= {"steps_per_print": 1, "log_level": "info"} | PLAN.get("config", {})
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if PLAN.get("half_offloaded"):
        engine.optimizer.backup_optimizer = None
    try:
        recorder = Recorder() if RANK == 0 else None
        training = Training(engine, attach(engine), recorder)
        training.run()
    except lrpilot.InvalidArgument as error:
        if not PLAN.get("refused"):
            raise
        sys.stdout.write(f"{error}\n")


def _inputs(progress: int, part: int) -> torch.Tensor:
    rank = 0 if PLAN.get("pipeline") else RANK
    torch.manual_seed((progress * PARTS + part) * RANKS + rank)
    return torch.randn(8, 4)


def _mean(loss: torch.Tensor) -> torch.Tensor:
    if RANKS > 1:
        torch.distributed.all_reduce(loss)
        loss = loss / RANKS
    return loss


main()
