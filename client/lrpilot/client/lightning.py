"""LR and WD in the Trainer of Lightning: needs lightning 2.5 or later, or pytorch_lightning."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:
    # The same code under its other name. Trainer of either takes callbacks of either.
    from pytorch_lightning import Callback

from lrpilot.client._arguments import Spec, increment_argument
from lrpilot.client._errors import AttemptNotOpen, InvalidState, LrpilotError, invalid_argument
from lrpilot.client._metrics import metric_name
from lrpilot.client._pilot import Pilot, connect
from lrpilot.client._steps import FusedStep, Steps

__all__ = ["LrpilotCallback"]


class LrpilotCallback(Callback):
    """A callback that drives a Trainer, under automatic and under manual optimization.

        pilot = LrpilotCallback("127.0.0.1:50051", run="mnist", spec="spec.yaml")
        trainer = Trainer(callbacks=[pilot])
        trainer.fit(model)

    What it does, plainly:

    - It connects when `fit` has set up the processes, and closes at the end of `fit`. It is put
      before the other callbacks, so that those that read LR as a batch begins read the right one.
    - A step is one update of each optimizer. Under manual optimization, where some make more
      updates than others, a step is one of whichever comes first to make its next. Before each
      step it reports the one made before, and writes LR and WD of the one to come.
    - The loss is the one that `training_step` returned: the mean over the batches since the last
      update, and over the ranks. Where one batch has several steps, the last of them has it.
    - An update that was skipped in fp16 is reported as skipped: the schedule stays, while
      `global_step` goes on.
    - Logged metrics named in `val_losses` are reported as validation losses, with the step just
      made. Log them with `sync_dist=True`.
    - The state is in Lightning's checkpoints, and comes from that of `fit(ckpt_path=…)`.

    `configure_optimizers` returns no LR schedulers.

    Args:
        address: HOST:PORT of the server.
        run: name of the run.
        spec: the run spec, as `connect` takes it.
        increment: what a step consumes, in the run's unit.
        val_losses: names of metrics.
        options: more arguments of `connect`, by name.

    Raises InvalidArgument; in `fit`, as `connect` and `Pilot.scheduler` do.
    """

    def __init__(
        self,
        address: str,
        *,
        run: str,
        spec: Spec = None,
        increment: int = 1,
        val_losses: Sequence[str] = ("val_loss",),
        **options: Any,
    ) -> None:
        if isinstance(val_losses, str) or not isinstance(val_losses, Sequence):
            raise invalid_argument("val_losses", val_losses, "a sequence of names")
        self._address = address
        self._options = {"run": run, "spec": spec, **options}
        self._increment = increment_argument(increment)
        self._val_losses = tuple(metric_name("val_losses", name) for name in val_losses)
        self._pilot: Pilot | None = None
        self._steps: Steps | None = None
        self._saved: dict[str, Any] = {}
        """State to begin from; once closed, that at which training ended."""
        self._optimizers: list[_Watched] = []
        self._is_tried = False
        """Whether an optimizer was about to make an update since the last step."""
        self._losses: list[Any] = []
        """Those of the batches since the last step."""

    @property
    def pilot(self) -> Pilot:
        """The pilot, from `setup` of `fit` on. Raises AttemptNotOpen."""
        if self._pilot is None:
            raise AttemptNotOpen(
                f"run {self._options['run']!r}: the callback connects in fit: register handlers in "
                "on_fit_start of the module, or later"
            )
        return self._pilot

    # The start and the end.

    def setup(self, trainer: Any, _: Any, stage: str) -> None:
        """Connect; the process group is there."""
        if stage != "fit":
            return
        trainer.callbacks = [self, *(item for item in trainer.callbacks if item is not self)]
        self._pilot = connect(self._address, **self._options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint until the optimizers are there."""
        self._saved = state_dict

    def on_fit_start(self, trainer: Any, _: Any) -> None:
        """Refuse LR schedulers: two would write the LR."""
        if trainer.lr_scheduler_configs:
            names = [type(item.scheduler).__name__ for item in trainer.lr_scheduler_configs]
            raise invalid_argument(
                "configure_optimizers", names, "no LR schedulers: the server has the schedule"
            )

    def on_train_start(self, trainer: Any, _: Any) -> None:
        """Open the attempt, write the first LR and WD."""
        if not self._saved and trainer.global_step and self._options.get("resume_at") is None:
            step = trainer.global_step
            raise InvalidState(
                f"state: the checkpoint was saved without lrpilot, after {step} steps. To go on "
                f"from it, say where the run begins: LrpilotCallback(…, resume_at={step})",
                facts={"run": self._options["run"], "global_step": step},
            )
        self._steps = Steps(self.pilot, trainer.optimizers, self._saved or None, self._increment)
        self._optimizers = [_Watched(item, self._before_update) for item in trainer.optimizers]

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        """Report the last step; there is none to write values for."""
        if self._steps is not None:
            self._end_late_step(trainer)
            self._steps.report()

    def teardown(self, _: Any, __: Any, stage: str) -> None:
        """Close; `save_checkpoint` may come after it."""
        if stage != "fit" or self._pilot is None:
            return
        self._saved = self.state_dict()
        self._leave().close()

    def on_exception(self, _: Any, __: Any, exception: BaseException) -> None:
        """Close: Lightning calls no `teardown` then. Another `fit` goes on where this one was.

        The state is without the server's part, which this rank alone might wait for in vain.
        """
        if self._pilot is None:
            return
        if self._steps is not None:
            if self._has_updated():
                # The update was made, and what would have told its loss did not come.
                self._end_step(None)
            self._saved = self._steps.bare_state_dict()
            # What is at fault is under way already.
            with suppress(LrpilotError):
                self._steps.report()
        self._leave().__exit__(type(exception), exception, exception.__traceback__)

    def _leave(self) -> Pilot:
        """Forget what this `fit` had, and return its pilot."""
        for item in self._optimizers:
            item.forget()
        pilot = self.pilot
        self._pilot, self._steps, self._optimizers = None, None, []
        self._is_tried = False
        self._losses.clear()
        return pilot

    def state_dict(self) -> dict[str, Any]:
        """Return the state for Lightning's checkpoint."""
        return self._saved if self._steps is None else self._steps.state_dict()

    # The steps.

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Where a step was made: report it, write LR and WD of the next, follow directives."""
        if self._steps is not None:
            self._end_late_step(trainer)
            self._steps.move()

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Note that an update is under way; a gradient scaler may skip it."""
        self._is_tried = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Take the loss, and the step where this batch made one."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None:
            # Lightning has divided it by the number of batches that it accumulates.
            parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._losses.append(loss.detach().float() * parts)
        if self._is_tried or self._has_updated():
            self._end_step(self._mean(trainer))

    def on_validation_end(self, trainer: Any, _: Any) -> None:
        """Take the validation losses."""
        if self._steps is None:  # The sanity check comes before.
            return
        for name in self._val_losses:
            if name in trainer.callback_metrics:
                self._steps.validated(name, trainer.callback_metrics[name])

    def _before_update(self, optimizer: "_Watched") -> None:
        if optimizer.has_updated and self._steps is not None:
            # Another step in the same batch; the loss comes at the end of it.
            self._end_step(None)
            self._steps.move()

    def _end_late_step(self, trainer: Any) -> None:
        """End a step that was made after its batch, such as in `on_train_epoch_end`."""
        if self._has_updated():
            self._end_step(self._mean(trainer))

    def _mean(self, trainer: Any) -> Any:
        """Return the mean of the losses since the last step, over all ranks, and begin anew."""
        losses, self._losses = self._losses, []
        if not losses:
            return None
        mean = sum(losses[1:], losses[0]) / len(losses)
        # Unlike its `reduce`, this has no barrier, for which the training would wait.
        return trainer.strategy.all_gather(mean).mean()

    def _has_updated(self) -> bool:
        return any(item.has_updated for item in self._optimizers)

    def _end_step(self, loss: Any) -> None:
        skipped = not self._has_updated()
        if self._steps is not None:
            self._steps.made(loss, skipped=skipped)
        self._is_tried = False
        for item in self._optimizers:
            item.has_updated = False


class _Watched:
    """An optimizer, and whether it made its update of the step under way."""

    def __init__(self, optimizer: Any, before: Any) -> None:
        self.has_updated = False
        self._before = before
        self._fused = FusedStep(optimizer)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def forget(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before_step(self, *_: Any) -> None:
        self._before(self)

    def _after_step(self, *_: Any) -> None:
        if not self._fused.refused():
            self.has_updated = True
