"""A loss or norm as it comes from a training loop: a number, or a tensor on any device."""

import struct
import sys
from typing import Any, TypeAlias

from lrpilot.client._errors import invalid_argument

Loss: TypeAlias = Any
"""A number, or a tensor with one element."""

ALLOWED = "a number, or a tensor with one element"


class PendingLoss:
    """A number on a device: copied there on the training thread, read on another."""

    __slots__ = ("_event", "_tensor")

    def __init__(self, tensor: Any) -> None:
        # The training may write the loss tensor again before it is read.
        self._tensor = tensor.detach().clone()
        self._event = _stream_event(tensor.device)

    def ready(self) -> bool:
        """Return whether reading would not wait."""
        return self._event is None or bool(self._event.query())

    def read(self) -> float:
        """Return the number, waiting for the device."""
        if self._event is not None:
            # Reading uses this thread's stream, which knows nothing of the training's.
            self._event.synchronize()
        return float(self._tensor.item())


Number: TypeAlias = float | PendingLoss


def take(loss: Loss, name: str = "loss") -> Number:
    """Return a number as a float, or as a pending one where reading it could wait for a device.

    `name` is the argument's. Raises InvalidArgument.
    """
    if type(loss) is float:
        return loss
    if hasattr(loss, "detach") and hasattr(loss, "device"):
        if loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}"
            raise invalid_argument(name, _Verbatim(got), ALLOWED)
        if loss.device.type != "cpu":
            return PendingLoss(loss)
        loss = loss.detach().item()
    return _number(loss, name)


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


def _stream_event(device: Any) -> Any:
    """Return an event on the current stream of the tensor's device, or None where it has none."""
    module: Any = getattr(sys.modules.get("torch"), device.type, None)
    if not hasattr(module, "current_stream") or not module.is_available():
        return None
    return module.current_stream(device).record_event()


class _Verbatim:
    """Text that shows without quotes."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text
