"""Blocks of values and changes of them, as trainers see them on the wire."""

from collections.abc import Iterable, Sequence

from lrpilot import core
from lrpilot.v1 import trainer_pb2 as pb

MAX_CHANGES_BYTES = 256 * 1024
"""An answer names its newest changes, as many as fit in this: messages are bounded at 1 MiB."""


def block_message(block: core.Block) -> pb.Block:
    """Return a block as it is sent."""
    return pb.Block(
        begin=block.begin,
        stride=block.stride,
        learning_rates=block.learning_rates,
        weight_decays=block.weight_decays or (),
    )


def read_blocks(blocks: Iterable[pb.Block], groups: int) -> list[core.Block]:
    """Return blocks as they came; whether they are sound is for the core to say."""
    return [
        core.Block(
            begin=block.begin,
            stride=block.stride,
            groups=groups,
            learning_rates=tuple(block.learning_rates),
            weight_decays=tuple(block.weight_decays) or None,
        )
        for block in blocks
    ]


def change_messages(adjustments: Sequence[core.Adjustment]) -> list[pb.Change]:
    """Return adjustments in the order in which they apply; where there are many, the newest."""
    kept: list[pb.Change] = []
    room = MAX_CHANGES_BYTES
    for item in reversed(adjustments):
        message = pb.Change(
            id=item.id,
            progress=item.effective,
            source=item.source,
            summary=item.summary,
            reason=item.reason,
            before=item.before,
            after=item.after,
            weight_decay_before=item.decays_before,
            weight_decay_after=item.decays_after,
        )
        room -= message.ByteSize()
        if room < 0:
            break
        kept.append(message)
    return kept[::-1]
