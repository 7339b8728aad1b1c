"""Train a small GPT of megatron-core, with LR and WD from an lrpilot server.

    lrpilot serve --data ./pilot-data
    python examples/train_megatron.py --server 127.0.0.1:50051 --steps 200 --out ./megatron-out

The loop has the shape of Megatron-LM's; lrpilot meets it in the two places marked "lrpilot:". The
script saves at its end, and resumes from there when it is started again. megatron-core is written
for CUDA: without a GPU, what it asks for there is made on the CPU.
"""

import argparse
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.overrides import TorchFunctionMode

from lrpilot.client.megatron import connected, reporting

LENGTH, MICROBATCH, MICROBATCHES, BATCH = 64, 4, 2, 8  # BATCH samples: progress counts them
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class OnCpu(TorchFunctionMode):
    """Makes tensors on the CPU where CUDA is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def forward_step(data: Any, model: Any) -> tuple[torch.Tensor, Any]:
    tokens = next(data).to(DEVICE)
    places = torch.arange(LENGTH, device=DEVICE).expand(MICROBATCH, LENGTH)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=DEVICE).triu(1)
    losses = model(tokens[:, :-1], places, mask, labels=tokens[:, 1:])
    said = {"lm loss": torch.stack([losses.detach().sum(), torch.tensor(float(losses.numel()))])}
    return losses, lambda output: (output.sum(), torch.tensor(output.numel()), said)


@reporting  # lrpilot: what train_step returns is reported, and a skipped update as skipped.
def train_step(data: Any, model: Any, optimizer: Any, opt_param_scheduler: Any) -> Any:
    model.zero_grad_buffer()
    optimizer.zero_grad()
    losses_reduced = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=data, model=[model],
        num_microbatches=MICROBATCHES, seq_length=LENGTH, micro_batch_size=MICROBATCH,
        decoder_seq_length=LENGTH, forward_only=False,
    )  # fmt: skip
    model.finish_grad_sync()
    update_successful, grad_norm, num_zeros_in_grad = optimizer.step()
    if update_successful:
        opt_param_scheduler.step(increment=BATCH)
    total, count = torch.vstack([item["lm loss"] for item in losses_reduced]).sum(0)
    skipped = int(not update_successful)
    return {"lm loss": total / count}, skipped, False, False, 0, grad_norm, num_zeros_in_grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", default="127.0.0.1:50051", help="HOST:PORT of lrpilot serve")
    parser.add_argument("--steps", type=int, default=200, help="iterations in all")
    parser.add_argument("--out", type=Path, default=Path("megatron-out"), help="of the checkpoint")
    arguments = parser.parse_args()
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    if DEVICE == "cpu":
        OnCpu().__enter__()
        torch.cuda.current_device = lambda: "cpu"
    initialize_rng_tracker(inference_rng_tracker=True)  # keeps no CUDA random states: no dropout
    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, hidden_dropout=0.0,
        attention_dropout=0.0, use_cpu_initialization=True, pipeline_dtype=torch.float32,
    )  # fmt: skip
    gpt = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=256, max_sequence_length=LENGTH)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), gpt.to(DEVICE))
    adam = OptimizerConfig(optimizer="adam", lr=3e-3, min_lr=3e-4, clip_grad=0.0)
    optimizer = get_megatron_optimizer(adam, [model])
    # lrpilot: in place of Megatron-LM's class, with its arguments.
    build = connected(arguments.server, run="megatron-gpt", feedback={"delay": 32 * BATCH})
    scheduler = build(
        optimizer,
        init_lr=0.0, max_lr=3e-3, min_lr=3e-4, lr_warmup_steps=20 * BATCH,
        lr_decay_steps=400 * BATCH, lr_decay_style="cosine", start_wd=0.1, end_wd=0.1,
        wd_incr_steps=400 * BATCH, wd_incr_style="constant",
    )  # fmt: skip
    path = arguments.out / "checkpoint.pt"
    parts = {"model": gpt, "optimizer": optimizer, "scheduler": scheduler}
    if path.exists():
        saved = torch.load(path, weights_only=False)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    text = torch.frombuffer(bytearray("".join(topics.topics.values()).encode()), dtype=torch.uint8)
    while scheduler.num_steps < arguments.steps * BATCH:
        torch.manual_seed(scheduler.num_steps)
        starts = torch.randint(len(text) - LENGTH - 1, (MICROBATCHES, MICROBATCH, 1))
        data = iter(text[starts + torch.arange(LENGTH + 1)].long())
        losses, *_ = train_step(data, model, optimizer, scheduler)
        rate = optimizer.param_groups[0]["lr"]
        print(f"{scheduler.num_steps} samples  loss {losses['lm loss']:.4f}  next LR {rate:.3e}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.save({name: part.state_dict() for name, part in parts.items()}, path)
    scheduler.close()


if __name__ == "__main__":
    main()
