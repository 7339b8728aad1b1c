"""Numbers on a device, left there by the training thread for another to read: it never waits.

On CUDA the training thread puts a number into a slot: one float64 on the device, which is written
in the order of the training's own stream, and one in pinned memory, which a side stream copies it
to. Pinned memory holds a mark until then, so that another thread sees the number arrive by looking
at memory. It asks no event and makes no other call of CUDA: while a thread captures a CUDA graph in
the mode that torch has by default, the query of an event by any other thread ends that capture.

On other devices the number is copied there, and the other thread reads the copy.
"""

import ctypes
import struct
import sys
import threading
from collections import deque
from typing import Any

from lrpilot.client._capture import refuse_in_capture

SLOTS = 256
"""Slots made at once, when the first loss comes: pinned memory takes the driver a while. A device
that is so many losses behind has work for long enough; what it hides costs nothing."""

POLL_S = 0.001
"""Pause between two looks at memory, on the thread that delivers reports."""

MARK = 0x7FF4_6C72_7069_6C6F
"""Bits of no number that arrives: a signalling NaN, which no arithmetic gives, with a payload."""


class PendingLoss:
    """A number that a device has not worked out yet."""

    __slots__ = ()

    def look(self) -> float | None:
        """Return the number, or None: it has not arrived. Waits for nothing; for any thread."""
        raise NotImplementedError


def leave(tensor: Any) -> PendingLoss:
    """Leave a tensor of one element to another thread; it may be written to at once.

    Raises CaptureRefused.
    """
    device = tensor.device
    if device.type != "cuda":
        return _Copied(tensor)
    refuse_in_capture("reporting a loss")
    outbox = _outboxes.get(device.index)
    if outbox is None:
        outbox = _outboxes.setdefault(device.index, _Outbox(device))
    return outbox.send(tensor)


class _Copied(PendingLoss):
    """A number on a device that is not CUDA."""

    __slots__ = ("_event", "_tensor")

    def __init__(self, tensor: Any) -> None:
        # The training may write the loss tensor again before it is read.
        self._tensor = tensor.detach().clone()
        self._event = _stream_event(tensor.device)

    def look(self) -> float | None:
        # Reading uses this thread's stream, which knows nothing of the training's.
        if self._event is not None and not self._event.query():
            return None
        return float(self._tensor.item())


def _stream_event(device: Any) -> Any:
    """Return an event on the current stream of the tensor's device, or None where it has none."""
    module: Any = getattr(sys.modules.get("torch"), device.type, None)
    if not hasattr(module, "current_stream") or not module.is_available():
        return None
    return module.current_stream(device).record_event()


class _Sent(PendingLoss):
    """A number on its way from a CUDA device."""

    __slots__ = ("_number", "_outbox", "_slot")

    def __init__(self, outbox: "_Outbox", slot: "_Slot") -> None:
        self._outbox = outbox
        self._slot: _Slot | None = slot
        self._number: float | None = None

    def look(self) -> float | None:
        with self._outbox.lock:
            if self._slot is not None and (bits := self._slot.bits()) != MARK:
                (self._number,) = struct.unpack("=d", struct.pack("=Q", bits))
                self._outbox.free.append(self._slot)
                self._slot = None
            return self._number


class _Slot:
    """A place for one number, here and on the device."""

    __slots__ = ("_at", "_words", "event", "here", "there")

    def __init__(self, words: Any, at: int, here: Any, there: Any, event: Any) -> None:
        self._words, self._at = words, at
        self.here, self.there = here, there
        self.event = event
        """Says that `there` was written."""

    def bits(self) -> int:
        """Return what pinned memory holds."""
        return int(self._words[self._at])

    def mark(self) -> None:
        """Let pinned memory hold what no number is."""
        self._words[self._at] = MARK


class _Outbox:
    """The slots of one device."""

    def __init__(self, device: Any) -> None:
        self.free: deque[_Slot] = deque()
        self.lock = threading.RLock()
        self._device = device
        self._torch: Any = sys.modules["torch"]
        self._side = self._torch.cuda.Stream(device)
        self._on_their_way: deque[_Sent] = deque()

    def send(self, tensor: Any) -> _Sent:
        """Start a tensor of one element on its way; it may be written to at once."""
        cuda = self._torch.cuda
        with self.lock:
            # Whoever delivers reports may be waiting for the server, and look at none of them.
            while self._on_their_way and self._on_their_way[0].look() is not None:
                self._on_their_way.popleft()
            if not self.free:
                self._add()
            slot = self.free.popleft()
        slot.mark()
        slot.there.copy_(tensor.detach().reshape(()), non_blocking=True)
        slot.event.record(cuda.current_stream(self._device))
        self._side.wait_event(slot.event)
        with cuda.stream(self._side):
            slot.here.copy_(slot.there, non_blocking=True)
        sent = _Sent(self, slot)
        self._on_their_way.append(sent)
        return sent

    def _add(self) -> None:
        torch = self._torch
        # Tensors of the inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            here = torch.empty(SLOTS, dtype=torch.float64, device="cpu", pin_memory=True)
            there = torch.empty(SLOTS, dtype=torch.float64, device=self._device)
        words = (ctypes.c_uint64 * SLOTS).from_address(here.data_ptr())
        for at in range(SLOTS):
            # The views keep the memory.
            self.free.append(_Slot(words, at, here[at], there[at], torch.cuda.Event()))


_outboxes: dict[int | None, _Outbox] = {}
"""By the number of the device."""
