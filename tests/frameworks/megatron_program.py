"""A GPT of megatron-core, trained as Megatron-LM trains; run by test_megatron.py. See `recorder`.

The functions below have the shape of those in Megatron-LM's `megatron/training/training.py` and
`checkpointing.py`; model, DDP, pipeline schedule and optimizer are megatron-core's own. It was
written for CUDA alone: `on_cpu` sends what it asks for there to the CPU.
"""

import os
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from lrpilot.client.megatron import connected, reporting
from tests.frameworks.recorder import PLAN, Recorder

warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")

LENGTH, WORDS, MICROBATCHES, MICROBATCH = 16, 64, 2, 4


class OnCpu(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
    """Makes tensors on the CPU where CUDA is asked for."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def on_cpu() -> None:
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    OnCpu().__enter__()
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value, unused-ignore]
    # The tracker that keeps no CUDA random states: there is no dropout.
    initialize_rng_tracker(inference_rng_tracker=True)


def build_model() -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=WORDS,
        max_sequence_length=LENGTH,
    )
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model)


def build_optimizer(args: Namespace, model: Any) -> Any:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(
        optimizer="adam",
        lr=args.lr,
        min_lr=args.min_lr,
        weight_decay=args.weight_decay,
        decoupled_lr=args.decoupled_lr,
        clip_grad=0.0,  # Clipping takes CUDA tensors alone.
    )
    return get_megatron_optimizer(config, [model])


def get_optimizer_param_scheduler(args: Namespace, optimizer: Any) -> Any:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=args.lr_warmup_samples,
        lr_decay_steps=args.train_samples,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.start_weight_decay,
        end_wd=args.end_weight_decay,
        wd_incr_steps=args.train_samples,
        wd_incr_style=args.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=args.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=args.override_opt_param_scheduler,
        wsd_decay_steps=None,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
    )


def forward_step(data: Any, model: Any) -> Any:
    tokens = next(data)
    places = torch.arange(LENGTH).expand(MICROBATCH, LENGTH)
    mask = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)[None, None]
    losses = model(tokens[:, :-1], places, mask, labels=tokens[:, 1:])

    def loss_func(output: Any) -> Any:
        total, count = output.sum(), torch.tensor(output.numel())
        return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}

    return losses, loss_func


def train_step(
    recorder: Recorder, data: Any, model: Any, optimizer: Any, opt_param_scheduler: Any
) -> Any:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model.zero_grad_buffer()
    optimizer.zero_grad()
    losses_reduced = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=data,
        model=[model],
        num_microbatches=MICROBATCHES,
        seq_length=LENGTH,
        micro_batch_size=MICROBATCH,
        decoder_seq_length=LENGTH,
        forward_only=False,
    )
    model.finish_grad_sync()
    recorder.used(opt_param_scheduler.num_steps, optimizer)
    update_successful, grad_norm, num_zeros_in_grad = optimizer.step()
    if update_successful:
        increment = MICROBATCHES * MICROBATCH * dist.get_world_size()
        opt_param_scheduler.step(increment=increment)
    value = torch.vstack([item["lm loss"] for item in losses_reduced]).sum(0)
    dist.all_reduce(value)
    loss_reduced = {"lm loss": value[0] / value[1]}
    skipped = 0 if update_successful else 1
    return loss_reduced, skipped, False, False, 0, grad_norm, num_zeros_in_grad


def load_checkpoint(path: Path, model: Any, optimizer: Any, opt_param_scheduler: Any) -> None:
    state = torch.load(path, weights_only=False)
    model.load_state_dict(state["model"])
    # That of the wrapper, in 0.16.1, takes the group of a decoupled LR for the main one.
    optimizer.chained_optimizers[0].optimizer.load_state_dict(state["optimizer"])
    opt_param_scheduler.load_state_dict(state["opt_param_scheduler"])


def save_checkpoint(path: Path, model: Any, optimizer: Any, opt_param_scheduler: Any) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "opt_param_scheduler": opt_param_scheduler.state_dict(),
    }
    torch.save(state, path)


# The two lines of lrpilot.
OptimizerParamScheduler = connected(
    PLAN["address"],
    run=PLAN["spec"]["name"],
    policies=PLAN["spec"]["policies"],
    feedback=PLAN["spec"]["feedback"],
)
train_step = reporting(train_step)


def main() -> None:
    from megatron.core import parallel_state

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    on_cpu()
    torch.manual_seed(7)
    args = Namespace(**PLAN["args"])
    recorder = Recorder()
    model = build_model()
    optimizer = build_optimizer(args, model)
    opt_param_scheduler = get_optimizer_param_scheduler(args, optimizer)
    path = Path(PLAN["folder"]) / "checkpoint.pt"
    if PLAN["resumes"]:
        load_checkpoint(path, model, optimizer, opt_param_scheduler)
    batch = MICROBATCHES * MICROBATCH
    while opt_param_scheduler.num_steps < PLAN["steps"] * batch:
        here = opt_param_scheduler.num_steps
        torch.manual_seed(here)
        data = iter(
            [torch.randint(0, WORDS, (MICROBATCH, LENGTH + 1)) for _ in range(MICROBATCHES)]
        )
        loss_dict, *_ = train_step(recorder, data, model, optimizer, opt_param_scheduler)
        if opt_param_scheduler.num_steps == PLAN["save_at"] * batch:
            save_checkpoint(path, model, optimizer, opt_param_scheduler)
        recorder.lost(here, loss_dict["lm loss"])
    dist.destroy_process_group()


main()
