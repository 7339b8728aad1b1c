"""What clients hold, held against the log: one put back from an older copy has forgotten some.

A client hands back what it got from the log in its attempt. Where the log, read to its end, has it
not, one event says so, and nothing more comes of that attempt: to go on would give one progress
two values. A new attempt ends it. Where the log does not know the attempt itself, its own goes on:
it may have opened since.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lrpilot.core._errors import LogForgotten
from lrpilot.core._events import Forgot
from lrpilot.core._state import Forgotten, RunState

DIGEST_BYTES = 16
"""Bytes of the digest of a block that travel: 128 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a client has from the answers that it got in its attempt."""

    rank: int = 0
    begin: int = 0
    """First progress of the last block of values."""
    stride: int = 1
    steps: int = 0
    """Number of its progresses; 0: no block has come yet."""
    digest: bytes = b""
    """What `values_digest` returns of it."""
    frontier: int = 0
    """Up to where the client was told that losses are final."""
    reported: int = 0
    """Up to where the client's own reports were acknowledged; 0: none was."""
    offer: int = 0
    """Leader mode: the sequence number of the newest permit; 0: none has come yet."""
    declared: int = 0
    """Leader mode: first progress behind what the holder has declared; 0: nothing yet."""
    log: str = ""
    """Digest at seq 1 of the log that opened the attempt, as many digits as travel; empty: not
    known."""

    @property
    def last(self) -> int:
        """Last progress of the block."""
        return self.begin + (self.steps - 1) * self.stride


BlockDigest = Callable[[int, int, int], bytes | None]
"""Begin, stride and steps of a block to its digest; None: not all of it is recorded."""


def values_digest(rates: Sequence[float], decays: Iterable[float]) -> bytes:
    """Return the digest of a block of values: learning rates, then weight decays, as they travel.

    The first 16 bytes of SHA-256 over the numbers as little-endian float64.
    """
    numbers = (*rates, *decays)
    return hashlib.sha256(struct.pack(f"<{len(numbers)}d", *numbers)).digest()[:DIGEST_BYTES]


def recorded_digest(state: RunState, begin: int, stride: int, steps: int) -> bytes | None:
    """Return the digest of a block as it is recorded, or None where not all of it is."""
    whole = state.records.from_on(begin, stride, steps)
    if whole is not None and whole.steps == steps:
        return values_digest(whole.learning_rates, whole.weight_decays or ())
    # On another stride than it was recorded on.
    values = [state.records.at(begin + step * stride) for step in range(steps)]
    if None in values:
        return None
    found = [item for item in values if item is not None]
    rates = [rate for rates, _ in found for rate in rates]
    return values_digest(rates, [decay for _, decays in found for decay in decays or ()])


def missing(
    state: RunState,
    attempt: int,
    token: str,
    held: Held,
    digest: BlockDigest | None = None,
) -> Forgot | None:
    """Return the event that says what the log has not of what a client holds; None: it has all.

    `digest` may remember what `recorded_digest` returned. Whose attempt is not the current one
    is refused for that, unless the log itself gave it and forgot. Of an imported log that is not
    known: attempts open where it came from, too.
    """
    if state.finished:
        return None
    if attempt > state.greatest_attempt:
        gave = held.log and state.log.startswith(held.log) and not state.is_imported
        return Forgot(attempt, held.rank, "attempt", _reach(held)) if gave else None
    if state.forgot is not None or (attempt, token) != (state.attempt, state.token):
        return None
    if held.frontier > state.frontier:
        return Forgot(attempt, held.rank, "losses", held.frontier)
    if held.reported > max(state.frontier, state.reporters.positions.get(held.rank, state.begin)):
        return Forgot(attempt, held.rank, "losses", held.reported)
    # What a request had of values that a declaration undid since is not missing.
    is_undone = bool(state.declared) and state.declared[-1].end > held.declared
    if held.steps and not is_undone:
        block = (held.begin, held.stride, held.steps)
        found = recorded_digest(state, *block) if digest is None else digest(*block)
        if found != held.digest:
            return Forgot(attempt, held.rank, "values", held.last)
    if held.offer and not _knows_permit(state, held.offer):
        return Forgot(attempt, held.rank, "offer", _reach(held))
    return None


def _knows_permit(state: RunState, seq: int) -> bool:
    state.refuse_dropped_permit(seq)
    return any(item.seq == seq for item in state.permits)


def _reach(held: Held) -> int:
    return max(held.frontier, held.last if held.steps else 0)


def refuse_forgotten(state: RunState) -> None:
    """Raise LogForgotten where the log has forgotten something of the current attempt."""
    if state.forgot is not None:
        raise log_forgotten(state, state.forgot)


def log_forgotten(state: RunState, forgot: Forgotten) -> LogForgotten:
    """Return the error for who holds, or may hold, what the log has forgotten."""
    what = {
        "attempt": f"attempt {forgot.attempt}, which the log does not know",
        "values": f"values up to progress {forgot.progress}",
        "losses": f"word that losses below progress {forgot.progress} were taken",
        "offer": "a permit to go on alone",
    }[forgot.what]
    recorded = "none" if forgot.recorded is None else forgot.recorded
    return LogForgotten(
        f"the log of run {state.name!r} has forgotten what it gave: rank {forgot.rank} holds "
        f"{what}, and the log ended at seq {forgot.seq} in attempt {state.attempt}, frontier "
        f"{forgot.frontier}, last recorded progress {recorded}. Its database was put back from an "
        "older copy; to go on would give one step two values. Restart the job from a checkpoint: "
        "an older one than the copy resumes as ever, and the scheduler state of a newer one brings "
        "back what was lost",
        run=state.name,
        attempt=forgot.attempt,
        log_attempt=state.attempt,
        seq=forgot.seq,
        frontier=forgot.frontier,
        recorded=recorded,
        rank=forgot.rank,
        holds=forgot.what,
        progress=forgot.progress,
    )
