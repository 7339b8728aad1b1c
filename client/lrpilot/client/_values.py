"""Learning rates and weight decays as they come: read from a block, held by progress."""

import struct
from collections.abc import Mapping
from itertools import islice, repeat
from typing import TypeAlias

from lrpilot.client import _timing
from lrpilot.client._call import Link
from lrpilot.client._errors import ServerError, ValuesDiffer
from lrpilot.v1 import trainer_pb2 as pb

Values: TypeAlias = tuple[tuple[float, float | None], ...]
"""Learning rate and weight decay of each group; None: the run sets no weight decay."""


def read_block(link: Link, opened: pb.OpenAttemptResponse, block: pb.Block) -> dict[int, Values]:
    """Return progress to values of a block. Raises ServerError where it fits no attempt."""
    groups = len(opened.groups)
    rates, decays = tuple(block.learning_rates), tuple(block.weight_decays)
    steps, rest = divmod(len(rates), groups)
    expected = len(rates) if opened.has_weight_decay else 0
    if rest or not steps or block.stride < 1 or len(decays) != expected:
        raise ServerError(
            f"run {link.run!r}: the server at {link.address} sent a block of "
            f"{len(rates)} learning rates and {len(decays)} weight decays for "
            f"{groups} groups",
            facts={"run": link.run, "address": link.address},
        )
    pairs: list[tuple[float, float | None]] = list(
        zip(rates, decays or repeat(None, len(rates)), strict=True)
    )
    return {
        block.begin + step * block.stride: tuple(pairs[step * groups : (step + 1) * groups])
        for step in range(steps)
    }


def hold(link: Link, attempt: pb.Attempt, known: dict[int, Values], got: dict[int, Values]) -> None:
    """Add values to those known. Raises ValuesDiffer where one is known with other bits."""
    for progress, values in got.items():
        first = known.setdefault(progress, values)
        if first is not values and _bits(first) != _bits(values):
            raise ValuesDiffer(
                f"run {link.run!r}: the server at {link.address} gave {first!r} for progress "
                f"{progress} of attempt {attempt.number} before, and now {values!r}",
                facts={"run": link.run, "progress": progress, "known": first, "got": values},
            )


def _bits(values: Values) -> bytes:
    """Return the bits of values, to compare them."""
    return b"".join(
        struct.pack("<d", number) for pair in values for number in pair if number is not None
    )


def steps_ahead(known: Mapping[int, Values], in_use: int, stride: int) -> int:
    """Return how many steps ahead of the one in use are known, one after the other."""
    steps = 0
    while steps < _timing.MAX_AHEAD and in_use + (steps + 1) * stride in known:
        steps += 1
    return steps


def forget_passed(known: dict[int, Values], in_use: int) -> None:
    """Drop the oldest values behind the one in use, beyond those that are kept."""
    surplus = len(known) - (_timing.KEPT_PAST + _timing.MAX_AHEAD + _timing.MAX_STEPS)
    if surplus > 0:
        passed = (at for at in known if at < in_use)
        for progress in list(islice(passed, surplus)):
            del known[progress]
