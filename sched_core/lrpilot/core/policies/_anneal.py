"""How long an anneal is that a policy begins."""

from lrpilot.core._fields import LENGTH, Rule, length_of

ANNEAL = Rule(
    'a length in the unit from 0 to 2**53, or a share of what was run from "0%" to "100%"',
    LENGTH.read,
    "10%",
)
"""Length of an anneal; a share is of the progress of the loss that begins it."""

ENOUGH = "10%"
"""MiniCPM (Hu et al. 2024, arXiv:2404.06395): a decay over 10% of the tokens is
enough; Hägele et al. 2024 (arXiv:2405.18392) find 10 to 20%, with the shape `1 - sqrt`."""


def anneal_length(anneal: int | float | str, progress: int, left: int) -> int:
    """Return the length in the unit, at least 1 and at most what is left of the stage, `left >= 1`.

    A fraction is rounded, a half to the even side.
    """
    return min(max(1, round(length_of(anneal, progress))), left)
