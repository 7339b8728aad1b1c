"""Train a small model of bytes with torchtitan, LR and WD from a server.

    lrpilot serve --data ./pilot-data
    torchrun --standalone --nproc-per-node 2 examples/train_torchtitan.py --server 127.0.0.1:50051

The two places that meet lrpilot are marked "lrpilot:"; with torchtitan's own models they stand in
a function of its `config_registry.py`. The text is that of examples/train_ddp.py; nothing is
downloaded. It runs on GPUs, and on CPUs to try it out, and resumes from the checkpoints in `--out`.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchtitan_on_cpu  # noqa: F401 (before torchtitan)
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
from train_ddp import BATCH, CONTEXT, load_text, sample_batch

from lrpilot.client.torchtitan import PilotSchedulers, PilotTrainer


class Bigram(BaseModel):
    """Predicts a byte from the one before it."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        def update_from_config(self, **_: Any) -> None: ...

        def get_nparams_and_flops(self, model: Any, seq_len: int) -> tuple[int, int]:
            count = sum(parameter.numel() for parameter in model.parameters())
            return count, 6 * count * seq_len

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.embed = Embedding.Config(num_embeddings=256, embedding_dim=64).build()
        self.head = Linear.Config(in_features=64, out_features=256, bias=True).build()

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.head(self.embed(tokens))


class Bytes(BaseDataLoader):
    """The text of train_ddp.py; a resumed run goes on where the checkpoint was."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config): ...

    def __init__(self, *, dp_rank: int, **_: Any) -> None:
        self._text, self._rank, self._number = load_text(), dp_rank, 0

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            inputs, targets = sample_batch(self._text, self._number, self._rank)
            self._number += 1
            yield {"input": inputs}, targets

    def state_dict(self) -> dict[str, Any]:
        return {"number": self._number}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._number = state_dict["number"]


class NoTokenizer(BaseTokenizer):
    """Bytes need none."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config): ...

    def __init__(self, **_: Any) -> None:
        super().__init__()

    encode = decode = get_vocab_size = None


def parallelize(model: Any, *, parallel_dims: Any, **_: Any) -> Any:
    """Shard the model over the ranks."""
    if parallel_dims.dp_shard_enabled:
        fully_shard(model, mesh=parallel_dims.get_mesh("dp_shard"))
    return model


def config(arguments: argparse.Namespace) -> PilotTrainer.Config:
    """Return the config, as a function of a `config_registry.py` does."""

    def group(name: str, pattern: str) -> ParamGroupConfig:
        # The spec's name of the param group; LR and WD are the server's.
        own = {"name": name, "lr": 0.0, "weight_decay": 0.1, "betas": (0.9, 0.95)}
        return ParamGroupConfig(pattern=pattern, optimizer_name="AdamW", optimizer_kwargs=own)

    # lrpilot: in place of Trainer.Config.
    return PilotTrainer.Config(
        # lrpilot: in place of LRSchedulersContainer.Config.
        lr_scheduler=PilotSchedulers.Config(
            address=arguments.server, run="byte-gpt", spec=os.fspath(arguments.spec)
        ),
        optimizer=OptimizersContainer.Config(
            implementation="foreach",
            param_groups=[group("matrices", "weight$"), group("no_decay", "bias$")],
        ),
        model_spec=ModelSpec("bigram", "small", Bigram.Config(), parallelize, None, None, None),
        dump_folder=os.fspath(arguments.out),
        dataloader=Bytes.Config(),
        tokenizer=NoTokenizer.Config(),
        loss=CrossEntropyLoss.Config(),
        training=TrainingConfig(steps=arguments.steps, local_batch_size=BATCH, seq_len=CONTEXT),
        parallelism=ParallelismConfig(data_parallel_shard_degree=int(os.environ["WORLD_SIZE"])),
        metrics=MetricsProcessor.Config(log_freq=10),
        checkpoint=CheckpointManager.Config(
            enable=True,
            interval=arguments.save_every,
            # The last one too is there to be resumed from.
            last_save_model_only=False,
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", default="127.0.0.1:50051", help="HOST:PORT of lrpilot serve")
    parser.add_argument("--spec", type=Path, default=Path(__file__).with_name("byte_gpt.yaml"))
    parser.add_argument("--steps", type=int, default=600, help="stop after so many steps")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--out", type=Path, default=Path("torchtitan-out"), help="checkpoints")
    init_logger()
    trainer = config(parser.parse_args()).build()
    try:
        trainer.train()
    finally:
        trainer.close()
    if dist.get_rank() == 0:
        schedulers = trainer.lr_schedulers
        rate = schedulers.get_metrics()["lr/AdamW/0"]
        print(f"{schedulers.progress} updates made; the next one has LR {rate:.6g}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
