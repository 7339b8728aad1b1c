"""A policy alone on a stand: losses in, proposals out, with a view that the test sets."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from lrpilot.core import _canonical
from lrpilot.core._changes import Change, Note
from lrpilot.core.policies import Observation, Phase, Policy

FLAT = Phase("", 0, "constant", 0, 0.0, 100_000.0, 100_000)
"""A run without warmup whose LR never moves."""


@dataclass(frozen=True)
class StandView:
    """A view of a plan of one group, at the constant LR of 1e-3 unless told otherwise."""

    at: int = 0
    base: tuple[float, ...] = (1e-3,)
    adjusted: tuple[float, ...] = (1e-3,)
    weight_decay: tuple[float, ...] | None = (0.1,)
    peak: tuple[float, ...] = (1e-3,)
    phase: Phase = FLAT
    total: int = 100_000


@dataclass
class Stand:
    """One policy, fed in order; after a proposal it sees nothing until that shows, as in a run."""

    policy: Policy[Any]
    delay: int = 1
    view: Callable[[int], StandView] = lambda _n: StandView()
    """The view at a progress; `at` is filled in."""
    state: Any = None
    proposed: list[tuple[int, Change]] = field(default_factory=list)
    """(n, proposal) so far."""
    _muted_until: int = 0

    def __post_init__(self) -> None:
        self.state = self.policy.initial()

    def see(self, observation: Observation) -> tuple[Change, ...]:
        """Let the policy observe, unless it waits for its own proposal; return what it proposes."""
        n = observation.progress
        if n < self._muted_until:
            return ()
        view = replace(self.view(n), at=n + self.delay)
        self.state, changes = self.policy.observe(self.state, observation, view)
        # Through its plain form and back, as a snapshot takes it.
        plain = self.policy.encode(self.state)
        again = self.policy.encode(self.policy.decode(plain))
        assert _canonical.to_bytes(again) == _canonical.to_bytes(plain)
        if any(not isinstance(change, Note) for change in changes):
            self._muted_until = n + self.delay
        self.proposed += [(n, change) for change in changes]
        return changes

    def run(self, losses: Iterable[float | None], begin: int = 0) -> list[tuple[int, Change]]:
        """Feed one loss a step from `begin` on; return the proposals of these steps."""
        before = len(self.proposed)
        for n, loss in enumerate(losses, begin):
            self.see(Observation(n, loss))
        return self.proposed[before:]
