"""DeepSpeed: an engine's LR scheduler. Imports deepspeed."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
from deepspeed import comm

from lrpilot.client._arguments import increment_argument
from lrpilot.client._errors import invalid_argument
from lrpilot.client._loss import Loss
from lrpilot.client._pilot import Pilot, pilot_argument
from lrpilot.client._scheduler import Scheduler
from lrpilot.client.torch import Marks

__all__ = ["DeepSpeedScheduler"]

logger = logging.getLogger("lrpilot.client")


class DeepSpeedScheduler:
    """The LR scheduler of a DeepSpeed engine: made once, after `deepspeed.initialize`.

        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        DeepSpeedScheduler(pilot, engine)

    It takes the place of the engine's `lr_scheduler`, so that `save_checkpoint` and
    `load_checkpoint` carry its state, and puts itself around `engine.backward` and `engine.step`,
    of a pipeline engine `train_batch`:

    - The attempt opens, or LR and WD are written again, before the first update and before the one
      after a `load_checkpoint`: ZeRO restores its own LR after it has restored the scheduler.
      What something else has written, such as a scheduler that is still stepped by hand, is
      written over too, and a warning says so once.
    - `engine.backward(loss)` gives the loss. That of an update is the mean over its
      micro-batches and over the ranks that average their gradients; a pipeline's is its own.
    - When `engine.step` has made an update, the loss is reported, and LR and WD of the next one
      are written. What DeepSpeed logs inside `engine.step` is the LR that the update used.
    - DeepSpeed calls no scheduler after an overflow. The update is reported as skipped all the
      same: the progress stays, and the loss, NaN or not, is seen.

    Args:
        pilot: what `lrpilot.client.connect` returned, called after `deepspeed.initialize`.
        engine: what `deepspeed.initialize` returned first; it needs an optimizer.
        increment: what one update consumes, in the run's unit, at least 1.

    One that is made for the same engine with another pilot takes its place. Raises InvalidArgument.
    Every rank makes it alike.
    """

    def __init__(self, pilot: Pilot, engine: Any, *, increment: int = 1) -> None:
        self._pilot = pilot_argument(pilot)
        if not isinstance(engine, deepspeed.DeepSpeedEngine):
            raise invalid_argument("engine", engine, "what deepspeed.initialize returned first")
        if not hasattr(engine.optimizer, "param_groups"):
            raise invalid_argument("engine", engine, "an engine with an optimizer")
        if hasattr(engine.optimizer, "backup_optimizer"):
            raise invalid_argument(
                "engine",
                engine,
                "offload_optimizer with ratio 1: with a lower one DeepSpeed steps a part of the "
                "parameters by a second optimizer, whose LR no scheduler reaches",
            )
        former = engine.lr_scheduler
        if isinstance(former, DeepSpeedScheduler) and former._pilot is pilot:
            raise invalid_argument(
                "engine", engine, "an engine that has no scheduler of this pilot"
            )
        self._run = pilot.run
        self._engine = engine
        self._increment = increment_argument(increment)
        self._scheduler = _Scheduler(pilot._session, engine.optimizer, state=None, defer=True)
        self._is_written = False
        """Whether the optimizer holds what it should; not after a load of its state."""
        self._has_written_over = False
        self._sum: Any = None
        """Sum of the losses of the present update, on their device."""
        self._count = 0
        self._step_increment: int | None = None
        """What DeepSpeed said that the present update consumed, where it did."""
        self._used: list[Any] = []
        self._has_warned = False
        if isinstance(former, DeepSpeedScheduler):
            former._let_go()
        elif former is not None:
            logger.info(
                "run %s: takes the place of the engine's %s", self._run, type(former).__name__
            )
        engine.lr_scheduler = self
        around = {"backward": self._around_backward, "step": self._around_step}
        if engine.pipeline_parallelism:
            around = {"train_batch": self._around_train_batch}
        self._theirs = {name: getattr(engine, name) for name in around}
        """The engine's own methods."""
        for name, wrap in around.items():
            setattr(engine, name, wrap(self._theirs[name]))

    @property
    def progress(self) -> int:
        """Progress whose LR and WD the optimizer holds, in the run's unit.

        DeepSpeed's `global_steps` counts skipped updates too; this does not. Raises
        AttemptNotOpen before the first update.
        """
        return self._scheduler.progress

    def get_last_lr(self) -> list[float]:
        """Return the LR of each param group that the last update used.

        Before the first update: what the optimizer holds.
        """
        return self._used or self._learning_rates()

    def report(self, loss: Loss) -> None:
        """Count a micro-batch's loss in the mean of the present update.

        For a loop that calls `loss.backward()`: with `engine.backward(loss)` it was counted.
        """
        # Losses of 16 bits would lose digits in a sum.
        loss = loss.detach().float()
        self._sum = loss if self._sum is None else self._sum + loss
        self._count += 1

    def report_validation(self, name: str, loss: Loss) -> None:
        """Let a validation loss ride in the next report, as `Scheduler.report_validation` does."""
        self._scheduler.report_validation(name, loss)

    def step(self, *given: object, increment: int | None = None, **named: object) -> None:
        """Note what the update consumed; DeepSpeed calls it inside `engine.step`.

        `engine.step(lr_kwargs={"increment": 512})` says so for one update. The move itself is
        made when `engine.step` is done. Raises InvalidArgument for anything else: where a
        scheduler raises TypeError, DeepSpeed calls it again with the batch size as its only
        argument, which a counter of updates must not take for its increment.
        """
        if given or named:
            raise invalid_argument("lr_kwargs", named or given, "nothing, or increment")
        if increment is not None:
            increment = increment_argument(increment)
        self._step_increment = increment

    def state_dict(self) -> dict[str, Any]:
        """Return what `engine.save_checkpoint` keeps, as `Scheduler.state_dict` does."""
        return self._scheduler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Open the attempt at a state; `engine.load_checkpoint` calls it.

        Raises as `Scheduler.load_state_dict` does.
        """
        self._scheduler.load_state_dict(state)
        self._is_written = False
        self._sum, self._count = None, 0

    def _around_backward(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(loss: Any, *args: Any, **kwargs: Any) -> Any:
            self._write()
            result = backward(loss, *args, **kwargs)
            # Where DeepSpeed does not divide by the number of micro-batches, the loop has.
            is_part = not kwargs.get("scale_wrt_gas", True)
            scale = self._engine.gradient_accumulation_steps() if is_part else 1
            self.report(loss.detach() * scale)
            return result

        return wrapped

    def _around_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._write()
            made, skipped = self._engine.global_steps, self._engine.skipped_steps
            result = step(*args, **kwargs)
            if self._engine.global_steps > made:
                self._move(self._mean(), self._engine.skipped_steps > skipped)
            return result

        return wrapped

    def _around_train_batch(self, train_batch: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._write()
            skipped = self._engine.skipped_steps
            loss = train_batch(*args, **kwargs)
            self._move(loss, self._engine.skipped_steps > skipped)
            return loss

        return wrapped

    def _let_go(self) -> None:
        """Leave the engine to another one."""
        self._scheduler.end()
        for name, method in self._theirs.items():
            setattr(self._engine, name, method)

    def _write(self) -> None:
        """See to it that the optimizer holds what was served."""
        if not self._is_written:
            self._used = []
        elif self._scheduler.is_in_force():
            return
        elif not self._has_written_over:
            self._has_written_over = True
            logger.warning(
                "run %s: something else has written LR or weight decay of the optimizer, such as "
                "another scheduler or a checkpoint. The values served for progress %d were written "
                "back. This is said once",
                self._run,
                self.progress,
            )
        self._scheduler.apply()
        self._is_written = True

    def _mean(self) -> Loss:
        """Return the loss of the update, the same on every rank; None where there is none."""
        if self._sum is None:
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "run %s: no loss of an update is known: call engine.backward(loss), or "
                    "report(loss) of the DeepSpeedScheduler before engine.step()",
                    self._run,
                )
            return None
        mean = self._sum / self._count
        group = self._engine.seq_data_parallel_group
        size = comm.get_world_size(group)
        if size > 1:
            comm.all_reduce(mean, group=group)
            mean = mean / size
        return mean

    def _move(self, loss: Loss, is_skipped: bool) -> None:
        """Report the update that was made, and write LR and WD of the next one."""
        increment = self._step_increment or self._increment
        self._sum, self._count, self._step_increment = None, 0, None
        self._used = self._learning_rates()
        self._scheduler.step(
            increment,
            loss,
            grad_norm=_norm(self._engine.get_global_grad_norm()),
            batch=self._engine.train_batch_size(),
            skipped=is_skipped,
        )

    def _learning_rates(self) -> list[Any]:
        return [group["lr"] for group in self._engine.optimizer.param_groups]


class _Scheduler(Scheduler):
    """One that knows whether the optimizer holds what it has written."""

    def end(self) -> None:
        """Do not open an attempt that has not opened yet."""
        if self._hook is not None:
            self._hook.remove()

    def is_in_force(self) -> bool:
        """Return whether nothing else has written since."""
        return self._marks.fit(self._groups.param_groups)

    def _write(self) -> None:
        super()._write()
        self._marks = Marks(self._groups.param_groups)


def _norm(norm: Any) -> Any:
    """Return the norm of the gradient, infinite where DeepSpeed says -1 for one not finite."""
    if hasattr(norm, "masked_fill"):
        return norm.masked_fill(norm < 0, float("inf"))
    return float("inf") if norm is not None and norm < 0 else norm
