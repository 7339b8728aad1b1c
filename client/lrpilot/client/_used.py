"""What the holder of a leader attempt used while the server was away, until that is declared."""

import threading
import time
from collections.abc import Callable, Mapping
from itertools import islice, takewhile

from lrpilot.client import _timing
from lrpilot.client._call import Link, Unanswered
from lrpilot.client._offers import Offered
from lrpilot.client._values import Values
from lrpilot.v1 import trainer_pb2 as pb


class Used:
    """Values by progress, in order; for several threads."""

    def __init__(self, link: Link, opened: pb.OpenAttemptResponse, token: bytes) -> None:
        self._link = link
        self._attempt = opened.attempt
        self._token = token
        most = _timing.MAX_VALUES // len(opened.groups)
        self._most = max(min(_timing.OFFERED_STEPS, most), 1)
        self._values: dict[int, Offered] = {}
        self._batch: dict[int, Values] = {}
        """The first of them, of one offer: a declaration under way is repeated as it was."""
        self._offer = 0
        self._lock = threading.Lock()
        self._declaring = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def __str__(self) -> str:
        with self._lock:
            ends = (min(self._values), max(self._values)) if self._values else (0, 0)
            return f"{len(self._values)} steps from progress {ends[0]} to {ends[1]}"

    def get(self, progress: int) -> Values | None:
        """Return the values used at a progress, if they were not declared yet."""
        found = self._values.get(progress)
        return None if found is None else found.values

    def add(self, progress: int, offered: Offered) -> None:
        """Keep what is used at a progress beyond all others."""
        with self._lock:
            self._values[progress] = offered

    def declare(
        self, record: Callable[[Mapping[int, Values]], None], timeout_s: float | None = None
    ) -> None:
        """Declare the first part of it, and give `record` what the server has recorded.

        It takes `timeout_s` at most; None: as long as a job waits for a server. Raises
        Unanswered, AttemptSuperseded, BeyondPermit, ….
        """
        if timeout_s is None:
            timeout_s = _timing.LEADER_PATIENCE_S
        end_s = time.monotonic() + timeout_s
        if not self._declaring.acquire(timeout=timeout_s):
            raise Unanswered("another declaration is under way")
        try:
            if self._take():
                self._call(end_s - time.monotonic())
                record(self._batch)
                with self._lock:
                    for progress in self._batch:
                        del self._values[progress]
                    self._batch = {}
        finally:
            self._declaring.release()

    def _take(self) -> bool:
        with self._lock:
            if not self._batch and self._values:
                self._offer = next(iter(self._values.values())).offer
                same = takewhile(lambda item: item[1].offer == self._offer, self._values.items())
                self._batch = {at: item.values for at, item in islice(same, self._most)}
            return bool(self._batch)

    def _call(self, timeout_s: float) -> None:
        link = self._link
        answer = link.once(
            link.stub.DeclareValues,
            pb.DeclareValuesRequest(
                run=link.run,
                attempt=self._attempt,
                holder=self._token,
                blocks=blocks(self._batch),
                offer=self._offer,
                held=link.held(),
            ),
            max(timeout_s, _timing.LEAST_CALL_S),
        )
        link.heard(answer.frontier, answer.horizon)


def blocks(used: Mapping[int, Values]) -> list[pb.Block]:
    """Return blocks of even strides that hold exactly these values, in order."""
    found: list[pb.Block] = []
    steps = last = 0
    for progress, values in used.items():
        stride = progress - last
        if not steps or (steps > 1 and stride != found[-1].stride):
            found.append(pb.Block(begin=progress, stride=1))
            steps = 0
        elif steps == 1:
            found[-1].stride = stride
        for rate, decay in values:
            found[-1].learning_rates.append(rate)
            if decay is not None:
                found[-1].weight_decays.append(decay)
        steps, last = steps + 1, progress
    return found
