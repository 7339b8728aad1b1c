"""Values offered ahead: the holder of a leader attempt goes on with them without the server."""

from dataclasses import dataclass
from typing import NamedTuple

from lrpilot.client import _timing
from lrpilot.client._values import Values
from lrpilot.v1 import trainer_pb2 as pb


class Offered(NamedTuple):
    """The values of one step."""

    values: Values
    offer: int
    """What the server called the offer that they came with."""


@dataclass(frozen=True)
class Wanted:
    """What to ask for next."""

    steps: range
    is_fresh: bool
    """Whether it takes the place of what was offered before."""
    age: int


class Offers:
    """The newest offer: values at even distances, under one plan. Whoever uses it locks."""

    def __init__(self) -> None:
        self._values: dict[int, Offered] = {}
        self._stride = 0
        self._end = 0
        """First progress that was not offered."""
        self._permitted = 0
        self._plan = ""
        """The plan as the server named it last."""
        self._age = 0
        """Number of times that the plan has changed."""
        self._offered_at = -1
        """Age of the plan that the values follow."""

    @property
    def reach(self) -> int:
        """Greatest progress that may be used."""
        return max(min(self._permitted, self._end) - 1, 0)

    def get(self, progress: int) -> Offered | None:
        """Return what is offered for a progress, if the holder may use it.

        Between two steps, as where batches have begun to grow since, it is that of the first.
        """
        if progress > self.reach:
            return None
        found = self._values.get(progress)
        if found is None and self._stride:
            found = self._values.get(progress - (progress - self._end) % self._stride)
        return found

    def compare(self, plan: str) -> bool:
        """Take note of the plan now: what was offered under another one is old, if it is one."""
        is_other = plan != self._plan
        if is_other:
            self._plan = plan
            self._age += 1
        return is_other

    def outdate(self) -> None:
        """Take note that the plan has changed."""
        self._age += 1

    def wanted(self, in_use: int, stride: int) -> Wanted | None:
        """Return what to ask for next; None: enough is offered."""
        first = in_use + stride
        is_fresh = self._offered_at != self._age or self._stride != stride or self._end < first
        begin = first if is_fresh else self._end
        if (begin - first) // stride > _timing.MAX_OFFERED - _timing.OFFERED_STEPS:
            return None
        end = min(begin + _timing.OFFERED_STEPS * stride, _timing.MAX_PROGRESS + 1)
        steps = range(begin, end, stride)
        return Wanted(steps, is_fresh, self._age) if steps else None

    def take(
        self,
        wanted: Wanted,
        answer: pb.OfferValuesResponse,
        values: dict[int, Values],
        in_use: int,
    ) -> None:
        """Keep the values of an answer, and forget what lies behind."""
        offered = {at: Offered(held, answer.offer) for at, held in values.items()}
        if wanted.is_fresh:
            if self._age == wanted.age:
                self._plan = answer.plan
            self._values, self._offered_at = offered, wanted.age
        elif wanted.age != self._age:
            return
        elif answer.plan != self._plan:
            self.compare(answer.plan)
            return
        else:
            ahead = {at: held for at, held in self._values.items() if at > in_use}
            self._values = ahead | offered
        self._stride, self._permitted = wanted.steps.step, answer.permitted
        self._end = max(values) + wanted.steps.step
