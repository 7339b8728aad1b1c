"""Train the byte-level GPT of train_ddp.py with DeepSpeed's ZeRO, LR and WD from a server.

    lrpilot serve --data ./pilot-data
    torchrun --standalone --nproc-per-node 2 examples/train_deepspeed.py --server 127.0.0.1:50051

The two places where the script meets lrpilot are marked "lrpilot:". Model and text are those of
examples/train_ddp.py; nothing is downloaded. It runs on GPUs and on CPUs, and resumes from the
checkpoint in `--out`, where there is one: start the same command again after a crash.
"""

import argparse
from pathlib import Path

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from train_ddp import ByteGPT, build_optimizer, load_text, sample_batch

import lrpilot.client as lrpilot
from lrpilot.client.deepspeed import DeepSpeedScheduler

CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": True},
}

# On CPUs, gloo's collectives in place of those that DeepSpeed would have to compile.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", default="127.0.0.1:50051", help="HOST:PORT of lrpilot serve")
    parser.add_argument("--spec", type=Path, default=Path(__file__).with_name("byte_gpt.yaml"))
    parser.add_argument("--steps", type=int, default=600, help="stop after so many updates")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--out", type=Path, default=Path("deepspeed-out"), help="checkpoints")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    deepspeed.init_distributed()
    torch.manual_seed(0)
    text, model = load_text(), ByteGPT()
    engine, *_ = deepspeed.initialize(model=model, optimizer=build_optimizer(model), config=CONFIG)
    # lrpilot: every rank connects, once the process group is there.
    pilot = lrpilot.connect(arguments.server, run="byte-gpt", spec=arguments.spec)
    # lrpilot: the engine's scheduler; it takes the losses from engine.backward.
    DeepSpeedScheduler(pilot, engine)
    if arguments.out.exists():
        engine.load_checkpoint(arguments.out)

    parts = engine.gradient_accumulation_steps()
    while engine.global_steps < arguments.steps:
        for part in range(parts):
            batch = sample_batch(text, engine.global_steps * parts + part, engine.global_rank)
            loss = engine(*(tokens.to(engine.device) for tokens in batch))
            engine.backward(loss)
            engine.step()
        if engine.global_steps % arguments.save_every == 0:
            engine.save_checkpoint(arguments.out)
            if engine.global_rank == 0:
                print(f"step {engine.global_steps}  loss {loss.item():.4f}", flush=True)
    pilot.close()
    if engine.global_rank == 0:
        rate = engine.lr_scheduler.get_last_lr()[0]
        print(f"{engine.global_steps} updates made; the last one used LR {rate:.6g}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
