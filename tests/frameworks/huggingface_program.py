"""A Trainer of Hugging Face; run by test_huggingface.py. See `recorder`.

The plan may also say: `overflows` and `nans`, the micro-batches whose loss is infinite or NaN;
`arguments` of TrainingArguments; `warm`, how many updates a Trainer without lrpilot makes first.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import lrpilot.client as lrpilot
from lrpilot.client.huggingface import LrpilotCallback
from tests.frameworks.recorder import PLAN, Recorder

BATCH, ACCUMULATED = 2, 2
RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Data(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return BATCH * ACCUMULATED * RANKS * int(PLAN["steps"])

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(at)
        return {"x": torch.randn(4, generator=generator)}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 1)
        self.norm = torch.nn.LayerNorm(1)
        self.losses: list[torch.Tensor] = []
        """Those of the step under way, as Trainer scales them."""
        self.seen = 0

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = ((self.inner(x) + self.norm(x[:, :1]) - x.sum(1, keepdim=True)) ** 2).mean()
        if self.training:
            if self.seen in PLAN.get("nans", ()):
                loss = loss * 0 + float("nan")
            if self.seen in PLAN.get("overflows", ()):
                loss = loss * float("inf")
            self.seen += 1
            self.losses.append(loss.detach() / ACCUMULATED)
        return {"loss": loss}


class Watch(TrainerCallback):
    """Sees what the optimizer really does, beside the callback under test."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._recorder = Recorder() if RANK == 0 else None
        self._completed = PLAN["save_at"] if PLAN["resumes"] else 0

    def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
        optimizer.optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        if getattr(optimizer, "found_inf", 0.0) > 0:
            # A fused optimizer: it is about to refuse.
            return
        if self._recorder is not None:
            self._recorder.used(self._completed, optimizer)
        self._completed += 1

    def on_step_end(self, *_: Any, **__: Any) -> None:
        loss = torch.stack(self._model.losses).sum()
        self._model.losses.clear()
        if RANKS > 1:
            torch.distributed.all_reduce(loss)
            loss /= RANKS
        if self._recorder is not None:
            self._recorder.lost(self._completed - 1, loss)


def main() -> None:
    torch.manual_seed(7)
    model = Model()
    arguments = TrainingArguments(
        **{
            "output_dir": PLAN["folder"],
            "num_train_epochs": 1,
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": ACCUMULATED,
            "learning_rate": 77.0,
            "weight_decay": 0.3,
            "logging_steps": 1,
            "save_steps": PLAN["save_at"],
            "report_to": [],
            "use_cpu": True,
            "ddp_backend": "gloo" if RANKS > 1 else None,
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "label_names": ["x"],
            "prediction_loss_only": True,
            **PLAN.get("arguments", {}),
        }
    )
    spec = PLAN["spec"]
    if PLAN.get("warm"):
        arguments.max_steps = PLAN["warm"]
        Trainer(model=model, args=arguments, train_dataset=Data()).train()
        arguments.max_steps = -1
    trainer = Trainer(model=model, args=arguments, train_dataset=Data(), eval_dataset=Data())
    if PLAN.get("overflows"):
        # Mixed precision of accelerate wants a GPU; the scaler of torch does not.
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with lrpilot.connect(
        PLAN["address"], run=spec["name"], spec=spec, resume_at=PLAN.get("resume_at")
    ) as pilot:
        trainer.add_callback(LrpilotCallback(pilot, trainer))
        trainer.add_callback(Watch(model))
        resumes = PLAN["resumes"] or bool(PLAN.get("warm"))
        trainer.train(resume_from_checkpoint=True if resumes else None)
    if RANK == 0:
        history = Path(PLAN["folder"]) / f"{PLAN['record']}.history"
        history.write_text(json.dumps(trainer.state.log_history))


main()
