"""What a training loop says of one step: its loss, and what else is known of it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from lrpilot.client import _timing
from lrpilot.client._arguments import integer, positive
from lrpilot.client._device import PendingLoss
from lrpilot.client._errors import InvalidArgument, invalid_argument
from lrpilot.client._loss import Loss, Number, refuse_parts, take

_NAME = re.compile(r"[A-Za-z0-9._/-]{1,64}")

NAMES = "1 to 64 of a-z A-Z 0-9 . _ / -, and not 'loss'"

MAX_VALIDATION_LOSSES = 64
"""Most names in one report, as the server has it."""

_NONE: Mapping[str, Any] = MappingProxyType({})


class Metrics(NamedTuple):
    """What is known of one step, ready to be sent; read on the reporter alone."""

    loss: Number | None = None
    """The reduced loss; None: the step has none."""
    weight: float = 1.0
    """Weight of the loss in the mean over several reporters, above 0."""
    validation: Mapping[str, Number] = _NONE
    """Validation losses by name."""
    gradient_norm: Number | None = None
    """Norm of the gradient; None: not known."""
    batch: int = 0
    """Global batch size in samples; 0: not known."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known, so that the step is passed without a report."""
        is_known = self.loss is not None or self.gradient_norm is not None
        return not (is_known or self.validation or self.batch)

    def named(self) -> Iterator[tuple[str, Number]]:
        """Yield each number that could be on a device, after what it is called in messages."""
        if self.loss is not None:
            yield "loss", self.loss
        if self.gradient_norm is not None:
            yield "norm", self.gradient_norm
        for name, loss in self.validation.items():
            yield f"loss {name!r}", loss


@dataclass(frozen=True, slots=True)
class Said:
    """What a training loop said of one step, as it said it: the same call on every rank."""

    loss: Loss = None
    weight: float = 1.0
    val_losses: Mapping[str, Loss] | None = None
    grad_norm: Loss = None
    batch: int | None = None
    skipped: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without reading a tensor. Raises InvalidArgument."""
        positive("weight", self.weight)
        refuse_parts(self.loss, "loss")
        refuse_parts(self.grad_norm, _NORM)
        if self.val_losses is not None:
            if not isinstance(self.val_losses, Mapping):
                raise invalid_argument("val_losses", self.val_losses, "a mapping of names")
            if len(self.val_losses) > MAX_VALIDATION_LOSSES:
                got = f"{len(self.val_losses)} names"
                raise invalid_argument("val_losses", got, f"at most {MAX_VALIDATION_LOSSES} names")
            for name, loss in self.val_losses.items():
                metric_name("val_losses", name)
                refuse_parts(loss, f"val_losses[{name!r}]")
        if self.batch is not None:
            integer("batch", self.batch, 1, _timing.MAX_PROGRESS)
        if not isinstance(self.skipped, bool):
            raise invalid_argument("skipped", self.skipped, "True or False")

    def read(self) -> Metrics:
        """Return it ready to be sent; tensors on a device are copied there, and read later.

        Raises InvalidArgument.
        """
        return Metrics(
            loss=None if self.loss is None else take(self.loss),
            weight=float(self.weight),
            validation=self._read_validation() if self.val_losses else _NONE,
            gradient_norm=None if self.grad_norm is None else norm(take(self.grad_norm, _NORM)),
            batch=0 if self.batch is None else int(self.batch),
        )

    def _read_validation(self) -> dict[str, Number]:
        return {
            name: take(loss, f"val_losses[{name!r}]")
            for name, loss in (self.val_losses or _NONE).items()
        }


def metric_name(argument: str, name: Any) -> str:
    """Return the name of a validation loss. Raises InvalidArgument."""
    if not isinstance(name, str) or name == "loss" or not _NAME.fullmatch(name):
        raise invalid_argument(argument, name, f"as a name: {NAMES}")
    return name


_NORM = "grad_norm"


def norm(number: Number) -> Number:
    """Return a norm; one that is not read yet is checked by whoever reads it."""
    if not isinstance(number, PendingLoss) and number < 0:
        raise _negative(number)
    return number


def _negative(number: float) -> InvalidArgument:
    return invalid_argument(_NORM, number, "a number from 0 on; it may be NaN or infinite")
