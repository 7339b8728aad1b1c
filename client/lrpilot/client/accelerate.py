"""A scheduler for training loops of Hugging Face Accelerate: imports accelerate, 1.1 or later."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from lrpilot.client._capture import InGraph
from lrpilot.client._errors import invalid_argument
from lrpilot.client._loss import Loss, take
from lrpilot.client._pilot import Pilot
from lrpilot.client._steps import FusedStep
from lrpilot.client.torch import LRScheduler as TorchLRScheduler

__all__ = ["LRScheduler"]


class LRScheduler(TorchLRScheduler):
    """A scheduler of torch that makes one move for each update that Accelerate completes.

        scheduler = LRScheduler(pilot, optimizer, accelerator)
        model, optimizer, loader, scheduler = accelerator.prepare(
            model, optimizer, loader, scheduler
        )
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(batch)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step(loss=loss)
                optimizer.zero_grad()

    Everything of the scheduler for torch holds; beside it:

    - `prepare` leaves it as it is: what Accelerate wraps around schedulers steps them as often as
      there are processes, and drops what is said while gradients accumulate. Prepared, it is part
      of `save_state` and `load_state`; unprepared it does the same, and
      `register_for_checkpointing` makes it part of them.
    - `step` is called for each micro-batch, on every process, with the loss there. It makes a move
      where `accelerator.sync_gradients` says that an update is complete, and none where
      `accelerator.optimizer_step_was_skipped`, or where a fused optimizer skipped it by itself:
      that is known to the device alone, which is waited for with fused optimizers in fp16.
    - The loss that is reported is the mean over the micro-batches of the update and over the
      processes: one number is reduced at each update, and nothing waits for a device.
    - The attempt opens at `load_state`, or at the first update.

    Args:
        pilot: what `connect` returned; call that after the Accelerator was made, which starts the
            process group.
        optimizer: an optimizer of torch, prepared or not.
        accelerator: the Accelerator of the loop.
        wd_in_graph: as `Pilot.scheduler` takes it.

    Raises InvalidArgument, TypeError where `optimizer` is not torch's.
    """

    # Accelerator.prepare() takes what says so for an object that it has prepared before.
    _is_accelerate_prepared = True

    def __init__(
        self,
        pilot: Pilot,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        wd_in_graph: InGraph = "refuse",
    ) -> None:
        if not isinstance(accelerator, Accelerator):
            raise invalid_argument("accelerator", accelerator, "an accelerate.Accelerator")
        if isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        super().__init__(pilot, optimizer, defer=True, wd_in_graph=wd_in_graph)
        self._accelerator = accelerator
        self._fused = FusedStep(self.optimizer)
        self._total: Loss = None
        """Sum of the losses since the last update, on their device; None: there was none."""
        self._count = 0

    def step(  # type: ignore[override]  # What was skipped, Accelerate says.
        self,
        epoch: None = None,
        *,
        loss: Loss = None,
        increment: int = 1,
        val_losses: Mapping[str, Loss] | None = None,
        grad_norm: Loss = None,
        batch: int | None = None,
    ) -> None:
        """Take the loss of a micro-batch; where the update is complete, report, and move on.

        Args:
            epoch: None; see the scheduler for torch.
            loss: of this micro-batch on this process.
            increment: what the whole update consumed on all processes, in the run's unit. It and
                the rest are read where the update is complete.
            val_losses: as `Scheduler.step` takes them, reduced already.
            grad_norm: likewise.
            batch: likewise.

        Raises InvalidArgument, and as `Scheduler.step`.
        """
        if loss is not None:
            self._add(loss)
        if epoch is None and not self._accelerator.sync_gradients:
            return
        refused = self._fused.refused()
        super().step(
            epoch,
            loss=self._mean(),
            increment=increment,
            val_losses=val_losses,
            grad_norm=grad_norm,
            batch=batch,
            skipped=refused or bool(self._accelerator.optimizer_step_was_skipped),
        )

    def _add(self, loss: Loss) -> None:
        if isinstance(loss, torch.Tensor):
            # A copy, since the training may write the tensor again; half precision adds up badly.
            wide = torch.promote_types(loss.dtype, torch.float32)
            loss = loss.detach().to(wide, copy=True)
        else:
            loss = take(loss)
        self._total = loss if self._total is None else self._total + loss
        self._count += 1

    def _mean(self) -> Loss:
        """Return the mean since the last update, over all processes, and begin anew."""
        total, count = self._total, self._count
        self._total, self._count = None, 0
        if total is None:
            return None
        mean = total / count
        if self._accelerator.num_processes == 1:
            return mean
        if not isinstance(mean, torch.Tensor):
            mean = torch.tensor(mean, dtype=torch.float64, device=self._accelerator.device)
        return self._accelerator.reduce(mean, reduction="mean")
