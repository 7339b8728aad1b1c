"""What this rank got from the server in one attempt, to hand back with each request.

A server whose database was put back from an older copy has forgotten some of what it gave. It finds
that out by this, and refuses to go on, before one step gets two values.
"""

import hashlib
import struct
import threading

from lrpilot.client import _timing
from lrpilot.v1 import trainer_pb2 as pb

DIGEST_BYTES = 16


class Held:
    """The furthest block of values, and the newest offer; for several threads."""

    def __init__(self, rank: int) -> None:
        self.log = b""
        """What opening the attempt returned as `log`."""
        self.offer = 0
        """The greatest `offer` of an answer."""
        self.reported = 0
        """The greatest `moves_to` of an acknowledged report of this rank."""
        self.declared = 0
        """Leader mode: first progress behind what was declared, once that was answered."""
        self._rank = rank
        self._lock = threading.Lock()
        self._block: pb.Block | None = None
        self._groups = 1
        self._said: pb.Held | None = None
        """What there is to say of the block; None: to be worked out."""

    @property
    def last(self) -> int:
        """Last progress of the block; -1: there is none."""
        with self._lock:
            return -1 if self._block is None else _last(self._block, self._groups)

    def add(self, block: pb.Block, groups: int) -> None:
        """Take note of a block that the server recorded."""
        with self._lock:
            known = self._block
            # Whoever goes on by another stride got what came before already.
            if (
                known is None
                or known.stride != block.stride
                or _last(known, groups) <= _last(block, groups)
            ):
                self._block, self._groups, self._said = block, groups, None

    def drop(self, progress: int) -> None:
        """Forget what lies from `progress` on: other values are used there."""
        with self._lock:
            block, groups = self._block, self._groups
            if block is None or _last(block, groups) < progress:
                return
            left = max(-(-(progress - block.begin) // block.stride), 0)
            self._block = _part(block, groups, 0, left) if left else None
            self._said = None

    def message(self, frontier: int) -> pb.Held:
        """Return what to hand back; `frontier` is the greatest that the server told."""
        with self._lock:
            if self._said is None:
                self._said = _said(self._block, self._groups)
            message = pb.Held(
                rank=self._rank,
                frontier=frontier,
                reported=self.reported,
                declared=self.declared,
                offer=self.offer,
                log=self.log,
            )
            message.MergeFrom(self._said)
            return message


def _said(block: pb.Block | None, groups: int) -> pb.Held:
    if block is None:
        return pb.Held()
    steps = len(block.learning_rates) // groups
    block = _part(block, groups, max(steps - _timing.MAX_STEPS, 0), steps)
    numbers = (*block.learning_rates, *block.weight_decays)
    packed = struct.pack(f"<{len(numbers)}d", *numbers)
    return pb.Held(
        begin=block.begin,
        stride=block.stride,
        steps=min(steps, _timing.MAX_STEPS),
        digest=hashlib.sha256(packed).digest()[:DIGEST_BYTES],
    )


def _part(block: pb.Block, groups: int, first: int, end: int) -> pb.Block:
    """Return the steps of a block from the one numbered `first` up to that numbered `end`."""
    kept = slice(first * groups, end * groups)
    return pb.Block(
        begin=block.begin + first * block.stride,
        stride=block.stride,
        learning_rates=block.learning_rates[kept],
        weight_decays=block.weight_decays[kept],
    )


def _last(block: pb.Block, groups: int) -> int:
    return int(block.begin + (len(block.learning_rates) // groups - 1) * block.stride)
