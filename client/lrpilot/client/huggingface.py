"""LR and WD in the Trainer of Hugging Face, with rollbacks or without: needs transformers 5.20."""

import logging
import os
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from lrpilot.client._arguments import increment_argument
from lrpilot.client._errors import AttemptNotOpen, InvalidState, invalid_argument
from lrpilot.client._pilot import Pilot, pilot_argument
from lrpilot.client._rollback import MEMORY, RollbackHandler
from lrpilot.client._steps import FusedStep, Steps

__all__ = ["LrpilotCallback", "RollbackCallback"]

logger = logging.getLogger("lrpilot.client")


class LrpilotCallback(TrainerCallback):
    """A callback that drives a Trainer with a pilot.

        trainer = Trainer(model, args, train_dataset=dataset)
        with lrpilot.connect("127.0.0.1:50051", run="bert", spec="spec.yaml") as pilot:
            trainer.add_callback(LrpilotCallback(pilot, trainer))
            trainer.train()

    What it does, plainly:

    - It takes the place of two methods of this one Trainer. `create_scheduler` gives Trainer a
      scheduler that tells the LR in use, for its logs, and whose state goes into Trainer's
      checkpoints and comes from them. `training_step` lets the loss be seen.
    - Before each step it reports the one made before, and writes LR and WD of the one to come;
      the first of them when training begins.
    - The loss of a step is the sum that Trainer has over its micro-batches, the mean over the
      ranks, and never filtered: NaN is seen whatever `logging_nan_inf_filter` says, and each
      step has its loss whatever `logging_steps`.
    - An update that was skipped in fp16 is reported as skipped: the schedule stays, while
      `global_step` goes on. accelerate does not notice those of fused optimizers; this does.
    - What an evaluation returns under a name that ends with "_loss" is reported as a validation
      loss of that name, such as eval_loss, with the step just made.

    Args:
        pilot: what `connect` returned. Connect when the Trainer is made: it initialises the
            process group.
        trainer: the Trainer.
        increment: what an update consumes, in the run's unit.

    Raises InvalidArgument; when training begins, as `Pilot.scheduler` does.
    """

    def __init__(self, pilot: Pilot, trainer: Any, *, increment: int = 1) -> None:
        pilot_argument(pilot)
        if not hasattr(trainer, "create_scheduler") or not hasattr(trainer, "training_step"):
            raise invalid_argument("trainer", trainer, "a Trainer of transformers")
        if isinstance(getattr(trainer.create_scheduler, "__self__", None), LrpilotCallback):
            raise invalid_argument(
                "trainer", trainer, "one that no LrpilotCallback was made for before"
            )
        self._pilot = pilot
        self._trainer = trainer
        self._increment = increment_argument(increment)
        self._steps: Steps | None = None
        self._optimizer: Any = None
        """What the steps drive."""
        self._fused: FusedStep | None = None
        self._is_training = False
        self._is_completed = False
        """Whether Trainer takes the update that is under way for made."""
        self._loss: Any = None
        """Sum of the losses since the last update."""
        self._training_step = trainer.training_step
        trainer.training_step = self._seen_step
        trainer.create_scheduler = self._create_scheduler

    def on_train_begin(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        """Open the attempt where no checkpoint did, and write the first LR and WD."""
        if optimizer is not self._trainer.optimizer:
            raise invalid_argument("trainer", self._trainer, "the Trainer that trains")
        self._is_training, self._is_completed, self._loss = True, False, None
        made = self._trainer.state.global_step
        if self._steps is None and made:
            # The checkpoint has no scheduler: it is of the model alone.
            self._needs_resume_at(made)
        if self._optimizer is not optimizer:
            self._open(None)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Report the step before, write LR and WD of this one, follow directives."""
        if self._steps is not None:
            self._steps.move()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Take the loss of the step that was made."""
        loss, self._loss = self._loss, None
        if self._steps is not None:
            if loss is not None:
                loss = self._trainer.accelerator.reduce(loss, reduction="mean")
            refused = self._fused is not None and self._fused.refused()
            self._steps.made(loss, skipped=refused or not self._is_completed)
        self._is_completed = False

    def on_log(self, *_: Any, logs: "dict[str, Any] | None" = None, **__: Any) -> None:
        """Take the norm of the gradient, which Trainer tells where it logs alone."""
        if self._steps is not None and logs and "grad_norm" in logs:
            self._steps.noted(logs["grad_norm"])

    def on_evaluate(self, *_: Any, metrics: "Mapping[str, Any] | None" = None, **__: Any) -> None:
        """Take the validation losses."""
        if self._steps is not None and self._is_training:
            for name, loss in (metrics or {}).items():
                if name.endswith("_loss"):
                    self._steps.validated(name, loss)

    def on_save(self, *_: Any, **__: Any) -> None:
        """Report on every rank what the rank that saved has reported."""
        if self._steps is not None:
            self._steps.report()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Report the last step; there is none to write values for."""
        self._is_training = False
        if self._steps is not None:
            self._steps.report()

    def _open(self, state: "Mapping[str, Any] | None") -> None:
        optimizer = self._trainer.optimizer
        if self._steps is not None:
            # Another `train` with another optimizer, of `model_init` or the user's.
            self._steps.move()
        own = [group.get("weight_decay") for group in optimizer.param_groups]
        self._steps = Steps(self._pilot, [optimizer], state, self._increment)
        self._optimizer, self._fused = optimizer, FusedStep(optimizer)
        opened = self._pilot._session.opened
        takes_none = opened is not None and list(opened.groups) == [""] and not any(own)
        if takes_none and opened is not None and opened.has_weight_decay:
            logger.warning(
                "run %s: the spec sets a weight decay and has no groups, and every param group of "
                "the Trainer has weight decay 0 of its own and keeps it, as it has where "
                "TrainingArguments say no weight_decay. Say one there, or give the spec groups",
                self._pilot.run,
            )

    def _needs_resume_at(self, made: int) -> None:
        """Refuse a checkpoint without a state where nobody said which progress it stands at."""
        if self._pilot._session._resume_at is None:
            raise InvalidState(
                f"state: the checkpoint was saved without the state of lrpilot, after {made} "
                "updates. To go on from it, say where the run begins: "
                f"connect(resume_at={made})",
                facts={"run": self._pilot.run, "last_epoch": made},
            )

    # In place of Trainer's own.

    def _create_scheduler(self, *_: Any, **__: Any) -> "_Scheduler":
        theirs = self._trainer.lr_scheduler
        if theirs is not None and not isinstance(theirs, _Scheduler):
            raise invalid_argument(
                "optimizers",
                type(theirs).__name__,
                "(optimizer, None): the server has the schedule",
            )
        self._trainer.lr_scheduler = scheduler = _Scheduler(self)
        return scheduler

    def _seen_step(self, *arguments: Any, **named: Any) -> Any:
        if self._steps is None:
            raise AttemptNotOpen(
                f"run {self._pilot.run!r}: Trainer trains, and has no LrpilotCallback: "
                "trainer.add_callback(LrpilotCallback(pilot, trainer)) adds it",
                facts={"run": self._pilot.run},
            )
        loss = self._training_step(*arguments, **named)
        # In single precision, as Trainer sums it up for its logs; nothing is read from the device.
        told = loss.detach().float()
        self._loss = told if self._loss is None else self._loss + told
        return loss


class _Scheduler:
    """What a Trainer takes for its scheduler of LR."""

    def __init__(self, callback: LrpilotCallback) -> None:
        self._callback = callback

    def step(self) -> None:
        """Trainer calls it after each update that was not skipped."""
        self._callback._is_completed = True

    def get_last_lr(self) -> list[float]:
        """Return the LR of each param group that the last update used."""
        steps = self._callback._steps
        if steps is None:
            groups = self._callback._trainer.optimizer.param_groups
            return [float(group["lr"]) for group in groups]
        return [rate for rate, _ in steps.schedulers[0].applied()]

    def state_dict(self) -> dict[str, Any]:
        steps = self._callback._steps
        return {} if steps is None else steps.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        callback = self._callback
        if callback._optimizer is callback._trainer.optimizer and callback._steps is not None:
            callback._steps.load_state_dict(state)
        elif callback._steps is None and "last_epoch" in state and "version" not in state:
            # The checkpoint is from before lrpilot.
            callback._needs_resume_at(state["last_epoch"])
            callback._open(None)
        else:
            callback._open(state)


class RollbackCallback(LrpilotCallback):
    """An `LrpilotCallback` that goes back on a rollback directive; making it is the consent.

        trainer.add_callback(RollbackCallback(pilot, trainer))

    When training begins it makes a `RollbackHandler` with the `every`, `keep` and `where` given
    here. A rollback restores model, optimizer, `global_step` and what Trainer keeps of its losses,
    so that `max_steps` updates remain in the model at the end. The data goes on. A dataset with a
    length ends training after its epochs all the same, as many steps short as were gone back, and
    a warning says so; one without a length, with `max_steps`, is read anew where it ends.

    Raises as `LrpilotCallback`, and InvalidArgument for `every`, `keep` and `where` when training
    begins.
    """

    def __init__(
        self,
        pilot: Pilot,
        trainer: Any,
        *,
        increment: int = 1,
        every: int = 100,
        keep: int = 8,
        where: "str | os.PathLike[str]" = MEMORY,
    ) -> None:
        super().__init__(pilot, trainer, increment=increment)
        self._options: dict[str, Any] = {"every": every, "keep": keep, "where": where}
        self._handler: RollbackHandler | None = None

    def on_train_begin(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        """Open the attempt, write the first LR and WD, take the first snapshot."""
        if self._handler is not None and self._optimizer is not self._trainer.optimizer:
            raise invalid_argument(
                "trainer",
                self._trainer,
                "one whose optimizer stays: the snapshots are of the first",
            )
        super().on_train_begin(optimizer=optimizer)
        if self._steps is not None and self._handler is None:
            trainer = self._trainer
            scaler = trainer.accelerator.scaler
            self._handler = RollbackHandler(
                self._pilot,
                model=trainer.model,
                optimizer=trainer.optimizer,
                scheduler=self._steps.schedulers[0],
                also=[_Counts(trainer), *([] if scaler is None else [scaler])],
                **self._options,
            )

    def on_train_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Report the last step; say where steps are missing."""
        super().on_train_end()
        if state.global_step < state.max_steps:
            logger.warning(
                "run %s: Trainer ended at step %d of %d",
                self._pilot.run,
                state.global_step,
                state.max_steps,
            )


class _Counts:
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
