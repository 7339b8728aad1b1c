"""What Megatron-LM's `train_step` returns, reported as the step that it made."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrpilot.client._loss import Loss
from lrpilot.client.megatron._scheduler import OptimizerParamScheduler


def reporting(train_step: Callable[..., Any]) -> Callable[..., Any]:
    """Return Megatron-LM's `train_step` that also reports what it returns; a decorator as well.

    The loss is known when `train_step` has returned, after it stepped the scheduler. So a step of
    an `OptimizerParamScheduler` made inside is carried out when it returns, with the loss, and LR
    and WD are there before anything else reads them. Reported are the first loss that it returns,
    reduced by Megatron-LM, and the norm of the gradient; an iteration whose update was skipped is
    reported as skipped. Before the first call of `train_step` the attempt is opened.
    """

    @functools.wraps(train_step)
    def reported(*args: Any, **kwargs: Any) -> Any:
        scheduler = _among(args, kwargs)
        if scheduler is None:
            return train_step(*args, **kwargs)
        scheduler.begin()
        scheduler._hold()
        try:
            returned = train_step(*args, **kwargs)
        except BaseException:
            scheduler._drop()
            raise
        outcome = Outcome.of(returned)
        scheduler._release(outcome.loss, outcome.grad_norm, ends=outcome.ends)
        return returned

    return reported


@dataclass(frozen=True)
class Outcome:
    """What of that which a `train_step` returned is reported."""

    loss: Loss
    grad_norm: Loss
    ends: bool
    """The training ends without a step, by the state machine for reruns."""

    @classmethod
    def of(cls, returned: Any) -> "Outcome":
        """Read it, by whichever release it was returned."""
        losses = returned[0]
        loss = next(iter(losses.values()), None) if isinstance(losses, Mapping) else losses
        if len(returned) < _RETURNED:
            # Until megatron-core 0.9: losses, whether it was skipped, norm, zeros.
            return cls(loss, returned[2], False)
        return cls(loss, returned[5], bool(returned[3]))


_RETURNED = 7
"""Least length of what `train_step` returns since it may ask to end the training."""


def _among(args: Sequence[Any], kwargs: Mapping[str, Any]) -> OptimizerParamScheduler | None:
    for item in (*args, *kwargs.values()):
        if isinstance(item, OptimizerParamScheduler):
            return item
    return None
