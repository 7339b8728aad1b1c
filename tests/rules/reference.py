"""What the promise says the values are, worked out without the core's plan, fold and records.

Only the base curves are the core's: other tests hold them against Megatron-LM. The plateau rule
is written again here, as torch has it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lrpilot import core

Hex = tuple[str, ...]
"""LR and then WD of every group at one progress, as `float.hex`."""


@dataclass(frozen=True)
class Version:
    """One version of the spec."""

    effective: int
    observes_from: int
    spec: Mapping[str, Any]

    @cached_property
    def base(self) -> Callable[[int], tuple[tuple[float, float | None], ...]]:
        """Progress to LR and WD of every group, without adjustments."""
        return core.base_schedule(core.parse_spec(self.spec))

    @property
    def policy(self) -> dict[str, Any]:
        return dict(self.spec["policies"][0])


@dataclass(frozen=True)
class Decided:
    """Where the policy stands after the losses so far, and what it decided."""

    policy: Mapping[str, Any] | None = None
    best: float = math.inf
    bad: int = 0
    muted_until: int = 0
    cuts: tuple[tuple[int, float], ...] = ()
    """(first progress at which it shows, factor)."""


@dataclass
class Reference:
    """One run as the promise has it."""

    delay: int
    versions: list[Version]
    frontier: int = 0
    begin: int = 0
    attempt: int = 0
    before: Decided = field(default_factory=Decided)
    """What was decided before the losses below."""
    origin: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    """The losses that policies saw, by progress."""
    late: dict[int, float] = field(default_factory=dict)
    openings: list[tuple[int, int]] = field(default_factory=list)
    """(attempt, begin) of each."""

    @property
    def horizon(self) -> int:
        return self.frontier + self.delay if self.attempt else 0

    def expected(self, progress: int) -> Hex:
        """The values at a progress below the horizon."""
        cuts = self.decided().cuts
        version = self.version_at(progress)
        pairs = version.base(progress)
        rates = [_cut(rate, cuts, progress) for rate, _ in pairs]
        decays = [decay for _, decay in pairs if decay is not None]
        return tuple(float(x).hex() for x in (*rates, *decays))

    def version_at(self, progress: int) -> Version:
        return [item for item in self.versions if item.effective <= progress][-1]

    def decided(self, until: float = math.inf) -> Decided:
        """What the losses below `until` decide."""
        now = self.before
        for at in sorted(self.losses):
            if at < until:
                now = self._observe(now, at, self.losses[at])
        return now

    def _observe(self, now: Decided, at: int, loss: float) -> Decided:
        policy = [item for item in self.versions if item.observes_from <= at][-1].policy
        if policy != now.policy:
            now = replace(now, policy=policy, best=math.inf, bad=0, muted_until=0)
        if at < now.muted_until or not math.isfinite(loss):
            return now
        if loss < now.best * (1.0 - 1e-4):
            return replace(now, best=loss, bad=0)
        if now.bad + 1 <= policy["patience"]:
            return replace(now, bad=now.bad + 1)
        shows, factor = at + self.delay, policy["factor"]
        rates = [rate for rate, _ in self.version_at(shows).base(shows)]
        before = [_cut(rate, now.cuts, shows) for rate in rates]
        after = [_cut(rate, (*now.cuts, (shows, factor)), shows) for rate in rates]
        if before == after:
            return replace(now, bad=0)
        return replace(now, bad=0, muted_until=shows, cuts=(*now.cuts, (shows, factor)))

    # What happens to the run.

    def open(self, begin: int) -> None:
        self.losses = {at: loss for at, loss in self.losses.items() if at < begin}
        self.late = {at: loss for at, loss in self.late.items() if at < begin}
        self.attempt += 1
        self.openings.append((self.attempt, begin))
        self.begin = self.frontier = begin

    def take_over(self, begin: int, before: Decided) -> None:
        """Open from a saved state whose past is not the log's."""
        self.losses, self.late = {}, {}
        self.before, self.origin = before, begin
        self.open(begin)

    def report(self, at: int, loss: float | None, moves_to: int) -> str:
        """Take one report that is not refused; return what becomes of it."""
        outcome = "RECORDED"
        if at >= self.frontier:
            if loss is not None:
                self.losses[at] = loss
        elif loss is None or at in self.losses:
            outcome = "REPEATED"
        else:
            outcome = "LATE"
            self.late.setdefault(at, loss)
        self.frontier = max(self.frontier, moves_to)
        return outcome

    def waive(self, wanted: int) -> None:
        while wanted >= self.horizon:
            self.frontier += self.delay

    def revise(self, spec: Mapping[str, Any]) -> int:
        effective = self.horizon
        self.versions.append(Version(effective, self.frontier, spec))
        return effective


def _cut(rate: float, cuts: tuple[tuple[int, float], ...], progress: int) -> float:
    for shows, factor in cuts:
        if shows <= progress and rate - rate * factor > 1e-8:
            rate = rate * factor
    return rate
