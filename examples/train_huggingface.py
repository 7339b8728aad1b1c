"""Train a small GPT-2 on bytes with the Trainer of Hugging Face, with LR and WD from lrpilot.

Start a server, then the trainer, in one process or in several:

    lrpilot serve --data ./pilot-data
    python examples/train_huggingface.py --server 127.0.0.1:50051
    torchrun --standalone --nproc-per-node 2 examples/train_huggingface.py --server 127.0.0.1:50051

The two places where the script meets lrpilot are marked "lrpilot:". The text is that of
examples/train_ddp.py; nothing is downloaded. The script resumes from the newest checkpoint in
`--out`, where there is one: start the same command again after a crash.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from train_ddp import CONTEXT, load_text
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import lrpilot.client as lrpilot
from lrpilot.client.huggingface import LrpilotCallback


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows of a text, one after the other."""

    def __init__(self, text: Tensor) -> None:
        self.text = text

    def __len__(self) -> int:
        return len(self.text) // CONTEXT

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        window = self.text[at * CONTEXT : (at + 1) * CONTEXT]
        return {"input_ids": window, "labels": window}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", default="127.0.0.1:50051", help="HOST:PORT of lrpilot serve")
    parser.add_argument("--run-name", default="byte-gpt", help="name of the run")
    parser.add_argument("--spec", type=Path, default=Path(__file__).with_name("byte_gpt.yaml"))
    parser.add_argument("--steps", type=int, default=600, help="stop after so many updates")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--out", type=Path, default=Path("gpt2-out"), help="folder of checkpoints")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    text = load_text()
    held_out = len(text) // 50
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_positions=CONTEXT,
            n_embd=96,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.out),
            max_steps=arguments.steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=arguments.save_every,
            save_steps=arguments.save_every,
            report_to=[],
        ),
        train_dataset=Windows(text[:-held_out]),
        eval_dataset=Windows(text[-held_out:]),
    )
    out = str(arguments.out)
    resume_from = get_last_checkpoint(out) if arguments.out.is_dir() else None
    # lrpilot: attach to the run, which the first start creates from the spec.
    with lrpilot.connect(arguments.server, run=arguments.run_name, spec=arguments.spec) as pilot:
        # lrpilot: from here on LR and WD are the server's, and it hears every loss.
        trainer.add_callback(LrpilotCallback(pilot, trainer))
        trainer.train(resume_from_checkpoint=resume_from)
    for entry in trainer.state.log_history:
        if "eval_loss" in entry:
            print(f"step {entry['step']}: validation loss {entry['eval_loss']:.4f}")
    rate = trainer.lr_scheduler.get_last_lr()[0]
    print(f"{trainer.state.global_step} updates made; the last one used LR {rate:.6g}")


if __name__ == "__main__":
    main()
