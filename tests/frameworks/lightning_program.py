"""A Trainer of Lightning; run by test_lightning.py. See `recorder`.

The plan may also say:

    kind        of optimization: automatic, manual (two optimizers, an update of each in a batch),
                or inner (two optimizers, three updates of the first and one of the second)
    package     lightning.pytorch, or pytorch_lightning
    trainer     arguments of Trainer
    infinite    the batches whose loss is infinite
    fused       whether the optimizer is a fused one
    schedules   whether the module has an LR scheduler of its own
    warm        whether a Trainer without lrpilot saves a checkpoint first, to resume from
    again       whether it saves a checkpoint once more, and fits again, after the end
"""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from lrpilot.client.lightning import LrpilotCallback
from tests.frameworks.recorder import PLAN, Recorder

pl: Any = importlib.import_module(PLAN.get("package", "lightning.pytorch"))
KIND = PLAN.get("kind", "automatic")
BATCH, INNER = 2, 3
FOLDER = Path(PLAN["folder"])
RANK = int(os.environ.get("LOCAL_RANK", "0"))
RANKS: int = PLAN.get("trainer", {}).get("devices", 1)
ACCUMULATED: int = PLAN.get("trainer", {}).get("accumulate_grad_batches", 1)


class Data(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return BATCH * RANKS * ACCUMULATED * int(PLAN["steps"])

    def __getitem__(self, at: int) -> torch.Tensor:
        return torch.randn(4, generator=torch.Generator().manual_seed(at))


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = KIND == "automatic"
        self.first, self.second = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        self.losses: list[torch.Tensor] = []

    def configure_optimizers(self) -> Any:
        fused = PLAN.get("fused", False)
        if KIND == "automatic":
            optimizer = torch.optim.AdamW(self.parameters(), fused=fused)
            if PLAN.get("schedules"):
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]
            return optimizer
        return [torch.optim.AdamW(item.parameters()) for item in (self.first, self.second)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((self.first(x) + self.second(x) - x.sum(1, keepdim=True)) ** 2).mean().float()

    def training_step(self, x: torch.Tensor, at: int) -> torch.Tensor:
        loss: torch.Tensor = self(x)
        if at in PLAN.get("infinite", ()):
            loss = loss * float("inf")
        self.losses.append(loss.detach())
        if KIND != "automatic":
            first, second = self.optimizers()
            for _ in range(INNER if KIND == "inner" else 1):
                first.zero_grad()
                second.zero_grad()
                self.manual_backward(self(x))
                first.step()
            second.step()
        return loss

    def validation_step(self, x: torch.Tensor, _: int) -> None:
        self.log("val_loss", self(x), sync_dist=True)


class Watch(pl.Callback):
    """Sees what the optimizers really do, beside the callback under test."""

    def __init__(self) -> None:
        self._recorder = Recorder() if RANK == 0 else None
        self._completed = PLAN["save_at"] if PLAN["resumes"] else 0
        self.second: list[tuple[int, str]] = []
        """Of the second optimizer: what the first has completed, and its own LR."""

    def on_train_start(self, trainer: Any, _: Any) -> None:
        trainer.optimizers[0].register_step_pre_hook(self._before_step)
        for optimizer in trainer.optimizers[1:]:
            optimizer.register_step_pre_hook(self._before_second)

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        if getattr(optimizer, "found_inf", 0.0) > 0:
            # A fused optimizer: it is about to refuse.
            return
        if self._recorder is not None:
            self._recorder.used(self._completed, optimizer)
        self._completed += 1

    def _before_second(self, optimizer: Any, *_: Any) -> None:
        self.second.append((self._completed - 1, float(optimizer.param_groups[0]["lr"]).hex()))

    def on_train_batch_end(self, trainer: Any, model: Any, *_: Any) -> None:
        if len(model.losses) < ACCUMULATED:
            return
        if self._completed == PLAN["save_at"] and not PLAN["resumes"]:
            trainer.save_checkpoint(FOLDER / "model.ckpt")
        loss = torch.stack(model.losses).mean()
        model.losses.clear()
        if RANKS > 1:
            torch.distributed.all_reduce(loss)
            loss /= RANKS
        if self._recorder is not None:
            self._recorder.lost(self._completed - 1, loss)


def scaled() -> Any:
    """Return the precision of "16-mixed", which Trainer does not make for a CPU."""
    plugins = importlib.import_module(f"{pl.__name__}.plugins.precision")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    return plugins.MixedPrecision("16-mixed", device="cpu", scaler=scaler)


def main() -> None:
    torch.manual_seed(7)
    spec = PLAN["spec"]
    watch = Watch()
    loggers = importlib.import_module(f"{pl.__name__}.loggers")
    logger = loggers.CSVLogger(FOLDER, name="logs", version=PLAN["record"])
    # The monitor reads LR as a batch begins, and comes first.
    monitor = importlib.import_module(f"{pl.__name__}.callbacks").LearningRateMonitor("step")
    pilot = LrpilotCallback(PLAN["address"], run=spec["name"], spec=spec)
    model = Model()
    data = [torch.utils.data.DataLoader(Data(), batch_size=BATCH) for _ in range(2)]
    path = FOLDER / "model.ckpt"
    if PLAN.get("warm"):
        before = pl.Trainer(accelerator="cpu", max_steps=PLAN["save_at"], default_root_dir=FOLDER)
        before.fit(model, *data)
        before.save_checkpoint(path)
    trainer = pl.Trainer(
        **{
            "default_root_dir": FOLDER,
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2 if PLAN.get("warm") else 1,
            "logger": logger,
            "log_every_n_steps": 1,
            "callbacks": [monitor, pilot, watch],
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "plugins": [scaled()] if "infinite" in PLAN else None,
            **PLAN.get("trainer", {}),
        }
    )
    resumes = PLAN["resumes"] or PLAN.get("warm")
    trainer.fit(model, *data, ckpt_path=path if resumes else None)
    if PLAN.get("again"):
        trainer.save_checkpoint(FOLDER / "end.ckpt")
        trainer.fit_loop.max_epochs += 1
        trainer.fit(model, *data)
    if RANK == 0:
        known = {"second": watch.second, "global_step": trainer.global_step}
        (FOLDER / f"{PLAN['record']}.known").write_text(json.dumps(known))


main()
