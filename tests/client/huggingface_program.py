"""A Trainer that goes back; run by test_huggingface.py.

Prints one JSON object: what became of the training.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import lrpilot.client as lrpilot
from lrpilot.client.huggingface import RollbackCallback

ADDRESS, PLACE, KIND = sys.argv[1:]
STEPS, BATCH, ACCUMULATED = 20, 2, 2

said: dict[str, Any] = {"steps": [], "bits": [], "rates": [], "data": []}


class Stream(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        at = 0
        while True:
            at += 1
            yield {"x": torch.full((3,), at / 100.0)}


class Sized(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return STEPS * BATCH * ACCUMULATED

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((3,), at / 100.0)}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        said["data"].append(round(x[0, 0].item() * 100))
        return {"loss": (self.inner(x) ** 2).mean()}


class Watch(TrainerCallback):
    """Sees each step as it begins, after the callback under test."""

    def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        said["steps"].append(state.global_step)
        said["bits"].append(
            [x.hex() for item in model.parameters() for x in item.flatten().tolist()]
        )

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        said["rates"].append({group["lr"].hex() for group in optimizer.param_groups}.pop())


torch.manual_seed(1)
model = Model()
arguments = TrainingArguments(
    output_dir=PLACE,
    max_steps=STEPS if KIND == "stream" else -1,
    num_train_epochs=1,
    per_device_train_batch_size=BATCH,
    gradient_accumulation_steps=ACCUMULATED,
    learning_rate=77.0,
    lr_scheduler_type="constant",
    logging_steps=1,
    logging_nan_inf_filter=False,
    save_strategy="no",
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
    remove_unused_columns=False,
)
trainer = Trainer(
    model=model, args=arguments, train_dataset=Stream() if KIND == "stream" else Sized()
)
with lrpilot.connect(ADDRESS, run="small") as pilot:
    trainer.add_callback(RollbackCallback(pilot, trainer, every=4))
    trainer.add_callback(Watch())
    result = trainer.train()
    said["attempt"] = pilot.attempt
said["global_step"] = result.global_step
said["logged"] = [
    (entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry
]
said["train_loss"] = result.training_loss
(Path(PLACE) / "said.json").write_text(json.dumps(said))
