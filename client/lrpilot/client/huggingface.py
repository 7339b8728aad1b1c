"""Rollbacks in the Trainer of Hugging Face: imports transformers, 5.20 or later."""

import logging
import os
from typing import Any

from transformers import TrainerCallback

from lrpilot.client._pilot import Pilot
from lrpilot.client._rollback import MEMORY, RollbackHandler
from lrpilot.client._scheduler import Scheduler

__all__ = ["HuggingFaceRollback"]

logger = logging.getLogger("lrpilot.client")


class HuggingFaceRollback(TrainerCallback):
    """A callback that drives a Trainer with a pilot, rollbacks included.

        trainer = Trainer(model, args, train_dataset=dataset)
        trainer.add_callback(HuggingFaceRollback(pilot, trainer))
        trainer.train()

    What it does, plainly:

    - When training begins it makes a scheduler of the pilot for the Trainer's optimizer, and a
      `RollbackHandler` with the `every`, `keep` and `where` given here. One callback, one `train`.
    - Before each step it reports the one made before, and writes LR and WD of the one to come.
      Trainer's own scheduler writes its LR earlier and so never counts; what Trainer logs as
      `learning_rate` is still that one's.
    - The loss is the one that Trainer logs: the mean over the ranks and over the steps since the
      last log. `logging_steps=1` reports each step; `logging_nan_inf_filter=False` lets NaN be
      seen. An update that accelerate skipped is reported as skipped.
    - A rollback restores model, optimizer, `global_step` and what Trainer keeps of its losses,
      so that `max_steps` updates remain in the model at the end. The data goes on. A dataset with
      a length ends training after its epochs all the same, as many steps short as were gone back
      and a warning says so; one without a length, with `max_steps`, is read anew where it ends.

    Raises InvalidArgument for `every`, `keep` and `where` when training begins.
    """

    def __init__(
        self,
        pilot: Pilot,
        trainer: Any,
        *,
        every: int = 100,
        keep: int = 8,
        where: "str | os.PathLike[str]" = MEMORY,
    ) -> None:
        self._pilot = pilot
        self._trainer = trainer
        self._options: dict[str, Any] = {"every": every, "keep": keep, "where": where}
        self._scheduler: Scheduler | None = None
        self._is_made = False
        """Whether a step was made that is not reported yet."""
        self._is_skipped = False
        self._loss: float | None = None
        self._grad_norm: float | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Open the attempt, write the first LR and WD, take the first snapshot."""
        trainer = self._trainer
        self._scheduler = self._pilot.scheduler(trainer.optimizer)
        RollbackHandler(
            self._pilot,
            model=trainer.model,
            optimizer=trainer.optimizer,
            scheduler=self._scheduler,
            also=[_Steps(trainer)],
            **self._options,
        )

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Report the step before, write LR and WD of this one, follow directives."""
        if self._is_made and self._scheduler is not None:
            loss, norm = self._taken()
            self._scheduler.step(loss=loss, grad_norm=norm, skipped=self._is_skipped)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note that a step was made; its loss is logged after this."""
        self._is_made = True
        self._is_skipped = bool(self._trainer.accelerator.optimizer_step_was_skipped)

    def on_log(self, *_: Any, logs: "dict[str, Any] | None" = None, **__: Any) -> None:
        """Take the loss of the step that was made."""
        if logs and "loss" in logs:
            self._loss, self._grad_norm = logs["loss"], logs.get("grad_norm")

    def on_train_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Report the last step; there is none to write values for, or to go back from."""
        if self._is_made and self._scheduler is not None:
            loss, norm = self._taken()
            if loss is not None and not self._is_skipped:
                self._pilot.report(self._scheduler.progress, loss, grad_norm=norm)
        if state.global_step < state.max_steps:
            logger.warning(
                "run %s: Trainer ended at step %d of %d",
                self._pilot.run,
                state.global_step,
                state.max_steps,
            )

    def _taken(self) -> tuple[float | None, float | None]:
        """Return the loss and the norm of the step that was made; it is reported now."""
        known = self._loss, self._grad_norm
        self._is_made, self._loss, self._grad_norm = False, None, None
        return known


class _Steps:
    """How far a Trainer is, and what it keeps of its losses between two logs."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        return {
            "global_step": trainer.state.global_step,
            "last_logged": trainer._globalstep_last_logged,
            "since_last_log": trainer._tr_loss,
            "logged": trainer._total_loss_scalar,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        trainer = self._trainer
        trainer.state.global_step = state["global_step"]
        trainer._globalstep_last_logged = state["last_logged"]
        trainer._tr_loss.copy_(state["since_last_log"])
        trainer._total_loss_scalar = state["logged"]
