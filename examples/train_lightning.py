"""Train a small byte-level GPT with Lightning, with LR and WD from an lrpilot server.

Start a server, then the trainer, on one device or on several:

    lrpilot serve --data ./pilot-data
    python examples/train_lightning.py --server 127.0.0.1:50051
    python examples/train_lightning.py --server 127.0.0.1:50051 --devices 2

The one place where the script meets lrpilot is marked "lrpilot:". Model and text are those of
examples/train_ddp.py; nothing is downloaded. The script resumes from `last.ckpt` in `--out`, where
there is one: start the same command again after a crash.
"""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from train_ddp import CONTEXT, ByteGPT, build_optimizer, load_text

from lrpilot.client.lightning import LrpilotCallback


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a text, one after the other, and the same one byte further on."""

    def __init__(self, text: Tensor) -> None:
        self.text = text

    def __len__(self) -> int:
        return (len(self.text) - 1) // CONTEXT

    def __getitem__(self, at: int) -> tuple[Tensor, Tensor]:
        window = self.text[at * CONTEXT : (at + 1) * CONTEXT + 1]
        return window[:-1], window[1:]


class LitGPT(LightningModule):
    """The GPT, and how it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ByteGPT()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        loss: Tensor = self.model(*batch)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.log("val_loss", self.model(*batch), sync_dist=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", default="127.0.0.1:50051", help="HOST:PORT of lrpilot serve")
    parser.add_argument("--run-name", default="byte-gpt", help="name of the run")
    parser.add_argument("--spec", type=Path, default=Path(__file__).with_name("byte_gpt.yaml"))
    parser.add_argument("--steps", type=int, default=600, help="stop after so many updates")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("lightning-out"), help="for checkpoints")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    text = load_text()
    held_out = len(text) // 50
    trainer = Trainer(
        max_steps=arguments.steps,
        devices=arguments.devices,
        accumulate_grad_batches=2,
        val_check_interval=2 * arguments.save_every,
        check_val_every_n_epoch=None,
        logger=False,
        callbacks=[
            ModelCheckpoint(arguments.out, save_last=True),  # after each validation
            # lrpilot: LR and WD are the server's, and it hears every loss.
            LrpilotCallback(arguments.server, run=arguments.run_name, spec=arguments.spec),
        ],
    )
    newest = arguments.out / "last.ckpt"
    trainer.fit(
        LitGPT(),
        DataLoader(Windows(text[:-held_out]), batch_size=8, shuffle=True),
        DataLoader(Windows(text[-held_out:]), batch_size=8),
        ckpt_path=newest if newest.exists() else None,
    )
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    print(f"{trainer.global_step} updates made; the last one used LR {rate:.6g}")


if __name__ == "__main__":
    main()
