"""What was greatest lately, in bounded memory."""


class RecentMaximum:
    """The greatest of the values of the last `span_s` to twice `span_s` seconds.

    Only two numbers are kept, so that it does not matter how many ask. Times are on one monotonic
    clock, in seconds, and never go back.
    """

    def __init__(self, span_s: float) -> None:
        self._span_s = span_s
        self._since_s = 0.0
        self._now: int | None = None
        self._before: int | None = None

    def add(self, value: int, at_s: float) -> None:
        """Take a value that was seen at `at_s`."""
        self._turn(at_s)
        self._now = value if self._now is None else max(self._now, value)

    def greatest(self, at_s: float) -> int | None:
        """Return the greatest value as of `at_s`, or None where none was seen lately."""
        self._turn(at_s)
        return max((item for item in (self._now, self._before) if item is not None), default=None)

    def _turn(self, at_s: float) -> None:
        """Begin a new span where the one under way is over."""
        passed_s = at_s - self._since_s
        if passed_s >= self._span_s:
            self._before = self._now if passed_s < 2 * self._span_s else None
            self._now = None
            self._since_s = at_s
