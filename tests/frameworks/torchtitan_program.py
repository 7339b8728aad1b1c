"""torchtitan's own trainer on the CPU, as docs/frameworks/torchtitan.md has it; see `recorder`.

The trainer, its loop, optimizers, FSDP and checkpoints are torchtitan's; examples/torchtitan_on_cpu
answers what it asks a device for. The plan may have besides:

    accumulate   number of micro-batches of a step
    async_mode   of the checkpoints
    log_freq     how often torchtitan logs, in steps
    starts_at    progress to begin at where the trainer resumes, without the schedulers' state
    spoils       whether the checkpoint's optimizers hold other values than those served
    nan_at       progress at which the loss is NaN, which ends torchtitan's training
    ends_by      name of the error that is to end the training, whose text is printed
    pipeline     whether the trainer is told, once it is built, that it has the first stage of two
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import torch
import torch.distributed
import torchtitan_on_cpu  # noqa: F401
from torch.distributed.fsdp import fully_shard
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.models.common.embedding import Embedding
from torchtitan.models.common.linear import Linear
from torchtitan.protocols import BaseModel
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.logging import init_logger

import lrpilot.client as lrpilot
from lrpilot.client.torchtitan import PilotSchedulers, PilotTrainer
from tests.frameworks.recorder import PLAN, Recorder

ALONE = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"))
RANK, RANKS = (int(os.environ.get(name, default)) for name, default in ALONE[:2])
STARTS_AT = PLAN.get("starts_at") if PLAN["resumes"] else None
TOKENS, LENGTH, BATCH = 11, 4, 2


class Model(BaseModel):
    """Predicts the next token from the last one."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        def update_from_config(self, *, config: Any, **_: Any) -> None:
            pass

        def get_nparams_and_flops(self, model: Any, seq_len: int) -> tuple[int, int]:
            return sum(it.numel() for it in model.parameters()), 1

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed = Embedding.Config(num_embeddings=TOKENS, embedding_dim=8).build()
        self.head = Linear.Config(in_features=8, out_features=TOKENS, bias=True).build()

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.head(self.embed(tokens))


class Sequences(BaseDataLoader):
    """Sequences that follow from their number."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Config, *, dp_rank: int, **_: Any) -> None:
        self._rank, self._number = dp_rank, 0

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            generator = torch.Generator().manual_seed(self._number * RANKS + self._rank)
            self._number += 1
            tokens = torch.randint(TOKENS, (BATCH, LENGTH + 1), generator=generator)
            yield {"input": tokens[:, :-1]}, tokens[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {"number": self._number}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._number = state_dict["number"]


class NoTokenizer(BaseTokenizer):
    """The sequences are tokens already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()

    def encode(self, *_: Any, **__: Any) -> list[int]:
        return []

    def decode(self, *_: Any, **__: Any) -> str:
        return ""

    def get_vocab_size(self) -> int:
        return TOKENS


def parallelize(model: Any, *, parallel_dims: Any, **_: Any) -> Any:
    """Shard the model over the ranks, as torchtitan's own models do."""
    return fully_shard(model, mesh=parallel_dims.get_mesh("dp_shard")) if RANKS > 1 else model


def make_config() -> PilotTrainer.Config:
    own = {"betas": (0.9, 0.95), "lr": 0.5, "weight_decay": 0.5}
    return PilotTrainer.Config(
        lr_scheduler=PilotSchedulers.Config(
            address=PLAN["address"],
            run=PLAN["spec"]["name"],
            spec=json.dumps(PLAN["spec"]),
            resume_at=STARTS_AT,
        ),
        model_spec=ModelSpec("tiny", "tiny", Model.Config(), parallelize, None, None, None),
        dump_folder=PLAN["folder"],
        tokenizer=NoTokenizer.Config(),
        dataloader=Sequences.Config(),
        loss=CrossEntropyLoss.Config(),
        # Two optimizers, whose param groups have names of the spec.
        optimizer=OptimizersContainer.Config(
            implementation="for-loop",
            param_groups=[
                ParamGroupConfig(
                    pattern="weight$",
                    optimizer_name="AdamW",
                    optimizer_kwargs=own | {"name": "weights"},
                ),
                ParamGroupConfig(
                    pattern="bias$",
                    optimizer_name="Adam",
                    optimizer_kwargs=own | {"name": "biases"},
                ),
            ],
        ),
        training=TrainingConfig(
            steps=PLAN["steps"],
            local_batch_size=BATCH,
            global_batch_size=BATCH * RANKS * PLAN.get("accumulate", 1),
            seq_len=LENGTH,
            disable_cuda_graphs=True,
        ),
        parallelism=ParallelismConfig(data_parallel_shard_degree=RANKS),
        metrics=MetricsProcessor.Config(log_freq=PLAN.get("log_freq", 1)),
        checkpoint=CheckpointManager.Config(
            enable=True,
            interval=PLAN["save_at"],
            async_mode=PLAN.get("async_mode", "disabled"),
            last_save_model_only=False,
            exclude_from_loading=[] if STARTS_AT is None else ["lr_scheduler"],
        ),
    )


def record(trainer: PilotTrainer) -> None:
    """Note what the optimizers use right before they step, and the loss that torchtitan logs."""
    recorder = Recorder() if RANK == 0 else None
    schedulers, processor = trainer.lr_schedulers, trainer.metrics_processor
    used: list[int] = []
    log = processor.log

    def before_step(*_: Any) -> None:
        used.append(schedulers.progress)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if recorder is not None:
            recorder.used(used[-1], SimpleNamespace(param_groups=groups))
        assert schedulers.get_metrics() == {
            "lr/AdamW": groups[0]["lr"],
            "lr/Adam": groups[1]["lr"],
        }

    def after_step(
        step: int, loss: float, most: float, norm: float, extra_metrics: dict[str, Any]
    ) -> None:
        log(step, loss, most, norm, extra_metrics=extra_metrics)
        if recorder is not None:
            recorder.lost(used[-1], loss)

    trainer.optimizers.register_step_pre_hook(before_step)
    processor.log = after_step
    if PLAN.get("nan_at") is not None:
        forward = trainer.fwd_bwd_fn
        trainer.fwd_bwd_fn = lambda *inputs: (
            forward(*inputs) * (float("nan") if schedulers.progress == PLAN["nan_at"] else 1.0)
        )


def spoil(trainer: PilotTrainer) -> None:
    """Let what the optimizers hold be anything while a checkpoint is saved."""
    save = trainer.checkpointer.save

    def spoiled(step: int, last_step: bool = False) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        kept = [(group["lr"], group["weight_decay"]) for group in groups]
        for group in groups:
            group.update(lr=123.0, weight_decay=456.0)
        save(step, last_step=last_step)
        for group, (rate, decay) in zip(groups, kept, strict=True):
            group.update(lr=rate, weight_decay=decay)

    trainer.checkpointer.save = spoiled


def main() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    for name, value in ALONE:
        os.environ.setdefault(name, value)
    if RANKS == 1:
        # No port is needed where this process is alone.
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    init_logger()
    trainer = make_config().build()
    record(trainer)
    if PLAN.get("spoils"):
        spoil(trainer)
    try:
        train(trainer)
    except (RuntimeError, lrpilot.InvalidArgument) as error:
        if type(error).__name__ != PLAN.get("ends_by"):
            raise
        sys.stdout.write(f"{error}\n")


def train(trainer: PilotTrainer) -> None:
    try:
        if PLAN.get("pipeline"):
            trainer.parallel_dims = SimpleNamespace(pp_enabled=True, pp=2, world_size=4)
            trainer.pp_has_last_stage = False
            trainer._check_reporter()
        trainer.train()
    finally:
        trainer.close()


main()
