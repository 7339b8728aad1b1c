"""A scheduler that is one of torch's own classes: imports torch, 2.4 or later."""

import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lrpilot.client._capture import InGraph, before_each_step
from lrpilot.client._errors import invalid_argument
from lrpilot.client._loss import Loss
from lrpilot.client._pilot import Pilot, pilot_argument
from lrpilot.client._scheduler import Scheduler

__all__ = ["LRScheduler"]

logger = logging.getLogger("lrpilot.client")


class LRScheduler(Scheduler, torch.optim.lr_scheduler.LRScheduler):
    """What `Pilot.scheduler` returns, and a `torch.optim.lr_scheduler.LRScheduler` as well.

        scheduler = LRScheduler(pilot, optimizer)
        ...
        optimizer.step()
        scheduler.step(loss=loss)

    For code that asks whether its scheduler is torch's, or calls what torch's schedulers have.
    Everything of `Scheduler` holds; beside it:

    - `step` takes nothing by position: there torch's `step(epoch)`, `step(metric)` of
      `ReduceLROnPlateau` and Megatron's `step(increment)` would be one and the same call.
    - Before each step of the optimizer it sees to it that the optimizer holds what was served. A
      param group that has just been added gets its values then. What something else wrote, such as
      a second scheduler or a state that the optimizer loaded, is written over, and a warning says
      so once.
    - `last_epoch` is the progress; nothing may set it, so that `SequentialLR` refuses it when it is
      built: the spec holds the whole schedule. In a `ChainedScheduler` its values are those used,
      whatever the others write; a chain passes no loss on.

    Args:
        pilot: what `connect` returned.
        optimizer: an optimizer of torch.
        state: as `Pilot.scheduler` takes it.
        defer: likewise.
        wd_in_graph: likewise.

    Raises InvalidArgument, TypeError where `optimizer` is not torch's, and as `Pilot.scheduler`.
    """

    def __init__(
        self,
        pilot: Pilot,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any] | None = None,
        defer: bool = False,
        wd_in_graph: InGraph = "refuse",
    ) -> None:
        pilot_argument(pilot)
        self._held = Marks([])
        """LR and weight decay of each param group as they were left here."""
        self._has_warned = False
        # First, so that torch keeps the optimizer's own LR as `initial_lr` and in `base_lrs`.
        torch.optim.lr_scheduler.LRScheduler.__init__(self, optimizer)
        Scheduler.__init__(
            self, pilot._session, optimizer, state=state, defer=defer, wd_in_graph=wd_in_graph
        )
        # After that of a deferred scheduler, which opens the attempt.
        before_step = weakref.WeakMethod(self._before_step)
        # Not compiled with a compiled step of the optimizer: it would be anew at every step.
        hook = torch.compiler.disable(lambda *_: _call(before_step))
        handle = before_each_step(optimizer, hook)
        # The optimizer must not keep a scheduler alive that nobody steps any more.
        weakref.finalize(self, handle.remove).atexit = False

    @property
    def last_epoch(self) -> int:
        """The progress; 0 before a deferred attempt has opened."""
        return getattr(self, "_progress", None) or 0

    @last_epoch.setter
    def last_epoch(self, epoch: int) -> None:
        if hasattr(self, "_session"):
            raise invalid_argument("last_epoch", epoch, _ALONE)

    def step(  # type: ignore[override]  # An increment by position could be an epoch.
        self,
        epoch: None = None,
        *,
        loss: Loss = None,
        increment: int = 1,
        weight: float = 1.0,
        val_losses: Mapping[str, Loss] | None = None,
        grad_norm: Loss = None,
        batch: int | None = None,
        skipped: bool = False,
    ) -> None:
        """Report the loss at the current progress, move on, write LR and WD of the new one.

        The arguments are those of `Scheduler.step`, all by name. `epoch` has torch's place, and
        nothing but None is taken there. Raises InvalidArgument, and as `Scheduler.step`.
        """
        if epoch is not None:
            raise invalid_argument(
                "epoch",
                epoch,
                "nothing by position; write step(loss=loss), or step(increment=count) for what "
                "the step consumed",
            )
        # The progress has moved where writing the new values fails.
        if not skipped:
            self._step_count += 1
        super().step(
            increment,
            loss,
            weight=weight,
            val_losses=val_losses,
            grad_norm=grad_norm,
            batch=batch,
            skipped=skipped,
        )

    def get_last_lr(self) -> list[Any]:
        """Return the LR that each param group holds, tensors as copies of them."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return [rate.clone() if isinstance(rate, torch.Tensor) else rate for rate in rates]

    def get_lr(self) -> list[Any]:
        """Return what `get_last_lr` does: there is nothing to compute here."""
        return self.get_last_lr()

    @property
    def _is_accelerate_prepared(self) -> bool:
        """What Accelerator.prepare() asks of a scheduler before it wraps it."""
        raise invalid_argument(
            "scheduler",
            type(self).__name__,
            "lrpilot.client.accelerate.LRScheduler: what Accelerate wraps around any other steps "
            "it as often as there are processes",
        )

    def _initial_step(self) -> None:
        """Count the first step as torch does; the values are written when the attempt opens."""
        self._step_count = 1

    def _update_lr(self, epoch: int | None = None) -> None:
        raise invalid_argument("epoch", epoch, _ALONE)

    def _write(self) -> None:
        super()._write()
        self._held = Marks(self.optimizer.param_groups)

    def _before_step(self) -> None:
        if self._progress is None:
            return
        groups = self.optimizer.param_groups
        changed = self._held.changed(groups)
        if changed and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "run %s: something else has written LR or weight decay of param groups %s, such "
                "as another scheduler, or a state that the optimizer loaded. The values served "
                "for progress %d were written back. This is said once",
                self._session.link.run,
                changed,
                self._progress,
            )
        if not self._held.fit(groups):
            self._write()


class _Mark:
    """A value in a param group, such that another one can be told from it without reading it."""

    __slots__ = ("_value", "_version")

    def __init__(self, value: Any) -> None:
        self._value = value
        self._version = value._version if isinstance(value, torch.Tensor) else None
        """How often a tensor was written in place; reading that waits for no device."""

    def fits(self, value: Any) -> bool:
        """Return whether it is this value still."""
        if value is self._value:
            return self._version is None or bool(value._version == self._version)
        return (
            self._version is None
            and not isinstance(value, torch.Tensor)
            and bool(value == self._value)
        )


class Marks:
    """LR and weight decay of param groups as they were left."""

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._marks = [(_Mark(group["lr"]), _Mark(group.get("weight_decay"))) for group in groups]

    def changed(self, groups: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the numbers of those that something has written to; added ones are none."""
        return [
            at
            for at, (group, (rate, decay)) in enumerate(zip(groups, self._marks, strict=False))
            if not (rate.fits(group["lr"]) and decay.fits(group.get("weight_decay")))
        ]

    def fit(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether these are they, and as they were left."""
        return len(groups) == len(self._marks) and not self.changed(groups)


def _call(method: "weakref.WeakMethod[Any]") -> None:
    """Call the method of an object that is still there."""
    called = method()
    if called is not None:
        called()


_ALONE = (
    "nothing from outside: the run's spec holds the whole schedule, warmup and stages included, "
    "so that this scheduler is no part of a SequentialLR"
)
