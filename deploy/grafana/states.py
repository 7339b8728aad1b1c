"""The state of a run in one word, for every dashboard that shows it."""

from panels import ranges

STATES = ranges(
    (-16, -1, "at its end", "text"),
    (0, 0, "trains", "green"),
    (1, 1, "is held", "blue"),
    (2, 3, "is silent", "orange"),
    (4, 7, "ranks wait", "red"),
    (8, 15, "log forgot", "red"),
)
"""Words for the values of `state`."""


def state(matcher: str = "") -> str:
    """Return a query for the state of the runs that match, in bits: forgot, waits, silent, held.

    A run that is silent at the end of its plan is below zero: it has nothing more to say.
    """
    ended = (
        f"(max by (run) (lrpilot_run_progress{{{matcher}}})"
        f" >= bool max by (run) (lrpilot_run_length{{{matcher}}}))"
    )
    return f"""
8 * max by (run) (lrpilot_run_forgotten{{{matcher}}})
+ 4 * (sum by (run) (lrpilot_run_ranks_waiting{{{matcher}}}) > bool 0)
  * (max by (run) (lrpilot_run_blocked_seconds{{{matcher}}}) > bool 15)
+ (2 - 18 * {ended})
  * (time() - max by (run) (lrpilot_run_updated_timestamp_seconds{{{matcher}}}) > bool 900)
+ max by (run) (lrpilot_run_held{{{matcher}}})
""".strip()
