"""Means of losses, added in order: the last bit of sum() depends on the version of Python."""

from collections.abc import Sequence


def mean_of(losses: Sequence[float]) -> float:
    """Return the mean of some losses, at least one; huge ones make it infinite."""
    # The first loss is taken as it is: 0.0 + -0.0 would lose its sign.
    total = losses[0]
    for loss in losses[1:]:
        total += loss
    return total / len(losses)


def into_window(
    total: float, seen: int, loss: float, window: int
) -> tuple[float, int, float | None]:
    """Return the sum and number of losses in the window under way, and its mean once it is full.

    A full window is emptied: windows do not overlap. The losses are added in order.
    """
    # The first loss is taken as it is: 0.0 + -0.0 would lose its sign.
    total = total + loss if seen else loss
    seen += 1
    if seen < window:
        return total, seen, None
    return 0.0, 0, total / seen
