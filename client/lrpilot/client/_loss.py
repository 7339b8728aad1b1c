"""A loss or norm as it comes from a training loop: a number, or a tensor on any device."""

import struct
from typing import Any, TypeAlias

from lrpilot.client._device import PendingLoss, leave
from lrpilot.client._errors import invalid_argument

Loss: TypeAlias = Any
"""A number, or a tensor with one element."""

ALLOWED = "a number, or a tensor with one element"


Number: TypeAlias = float | PendingLoss


def take(loss: Loss, name: str = "loss") -> Number:
    """Return a number as a float, or as a pending one where reading it could wait for a device.

    `name` is the argument's. Raises InvalidArgument, CaptureRefused.
    """
    if type(loss) is float:
        return loss
    if hasattr(loss, "detach") and hasattr(loss, "device"):
        if hasattr(loss, "placements"):
            refuse_parts(loss, name)
            loss = loss.to_local()
        if loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}"
            raise invalid_argument(name, _Verbatim(got), ALLOWED)
        if loss.device.type != "cpu":
            return leave(loss)
        loss = loss.detach().item()
    return _number(loss, name)


def refuse_parts(loss: Loss, name: str) -> None:
    """Raise InvalidArgument for a DTensor of which each rank holds a part, as FSDP2's norms are.

    Reading it is a collective, in which the reporter would wait for the other ranks for ever.
    """
    placements = getattr(loss, "placements", ())
    if not all(placement.is_replicate() for placement in placements):
        raise invalid_argument(
            name,
            _Verbatim(f"a DTensor with the placements {tuple(placements)}"),
            f"{ALLOWED} that each rank holds whole: call .full_tensor() on every rank",
        )


def _number(loss: Loss, name: str) -> float:
    number = loss
    if getattr(loss, "size", None) == 1 and hasattr(loss, "item"):
        number = loss.item()  # An array of NumPy with one element.
    is_number = hasattr(number, "__float__") or hasattr(number, "__index__")
    if isinstance(number, bool) or not is_number:
        raise invalid_argument(name, loss, ALLOWED)
    try:
        return float(number)
    except (TypeError, ValueError, OverflowError):
        raise invalid_argument(name, loss, ALLOWED) from None


def same_bits(a: float, b: float) -> bool:
    """Return whether two numbers are the same to the bit; every NaN is the same."""
    return struct.pack("<d", a) == struct.pack("<d", b) or (a != a and b != b)  # noqa: PLR0124


class _Verbatim:
    """Text that shows without quotes."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text
