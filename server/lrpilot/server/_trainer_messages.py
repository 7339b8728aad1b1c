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


def read_held(message: pb.Held, offer: int = 0) -> core.Held:
    """Return what a client says that it has. Raises InvalidRequest.

    `offer`: what a declaration goes by, where its client hands nothing back.
    """
    held = core.Held(
        rank=message.rank,
        begin=message.begin,
        stride=message.stride,
        steps=message.steps,
        digest=message.digest,
        frontier=message.frontier,
        reported=message.reported,
        declared=message.declared,
        offer=message.offer or offer,
        log=message.log.hex(),
    )
    most = core.MAX_BLOCK_STEPS
    violations = []
    if not 0 <= held.steps <= most:
        violations.append(core.Violation("held.steps", str(held.steps), f"0 to {most}"))
    elif held.steps and not (0 <= held.begin <= held.last <= core.MAX_PROGRESS and held.stride > 0):
        got = f"{held.steps} steps of {held.stride} from {held.begin} on"
        wanted = f"an ascending block from 0 to {core.MAX_PROGRESS}"
        violations.append(core.Violation("held.begin", got, wanted))
    if violations:
        raise core.InvalidRequest("what the client has is invalid", violations)
    return held


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
