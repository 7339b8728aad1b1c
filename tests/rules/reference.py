"""What the promise says the values are, worked out without the core's plan, fold and records.

Only the base curves are the core's: other tests hold them against Megatron-LM. The rules of the
plateau policy (as torch has it), of the chain of changes, of clamps, of taking back and of
rollbacks are written again here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lrpilot import core

Hex = tuple[str, ...]
"""LR and then WD of every group at one progress, as `float.hex`."""

Name = tuple[str, int]
"""What an undo goes by: ("loss", n) of what a policy decided on it, ("made", count) of another."""


@dataclass(frozen=True)
class Version:
    """One version of the spec."""

    effective: int
    observes_from: int
    spec: Mapping[str, Any]
    made: int = 0
    """How many things were done to the run before."""

    @cached_property
    def base(self) -> Callable[[int], tuple[tuple[float, float | None], ...]]:
        """Progress to LR and WD of every group, without adjustments."""
        return core.base_schedule(core.parse_spec(self.spec))

    @property
    def policy(self) -> dict[str, Any] | None:
        return next((dict(item) for item in self.spec["policies"]), None)

    @cached_property
    def bounds(self) -> tuple[float, float]:
        bounds = self.spec.get("bounds", {})
        return bounds.get("min_lr", 0.0), bounds.get("max_lr", math.inf)

    def stage_begin(self, progress: int) -> int:
        ends = [stage["until"] for stage in self.spec.get("stages", ()) if "until" in stage]
        return max((end for end in ends if end <= progress), default=0)


@dataclass(frozen=True)
class Link:
    """One change of the plan from a progress on."""

    effective: int
    name: Name
    action: str
    amount: float = 0.0
    """Factor of a multiplication, LR of a set."""
    eps: float = 0.0
    targets: tuple[Name, ...] = ()
    """Of an undo."""
    asked: str = ""
    """Kind of a directive."""
    is_rollback: bool = False
    """Whether an attempt that carries out a rollback brought it."""

    @property
    def key(self) -> tuple[int, int, int]:
        """Changes apply in the order of this: policies first, where they take effect at once."""
        kind, number = self.name
        return self.effective, int(kind == "made"), number


@dataclass(frozen=True)
class Decided:
    """Where the policy stands after the losses so far, and what it decided."""

    policy: Mapping[str, Any] | None = None
    best: float = math.inf
    bad: int = 0
    muted_until: int = 0
    cuts: tuple[Link, ...] = ()


@dataclass(frozen=True)
class Permit:
    """How far a job may go on alone, and what was known when it was told."""

    end: int
    horizon: int
    count: int
    """How many things had been done to the run."""
    plan: object
    """What the values followed then."""


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
    skips: dict[tuple[int, int], float | None] = field(default_factory=dict)
    """(progress, number of skipped updates before it there) to the loss of a skipped update."""
    late: dict[int, float] = field(default_factory=dict)
    rewinds: list[int] = field(default_factory=list)
    """Progress from which on the losses became others, each time that this happened."""
    permit: Permit | None = None
    """The newest one of an attempt in leader mode."""
    made: tuple[Link, ...] = ()
    """What operators and rollbacks did, in the order in which it applies."""
    count: int = 0
    """How many things were done to the run."""

    @property
    def horizon(self) -> int:
        return self.frontier + self.delay if self.attempt else 0

    def expected(self, progress: int) -> Hex:
        """The values at a progress below the horizon."""
        rates, decays = self._values(progress, self.decided().cuts)
        return tuple(x.hex() for x in (*rates, *decays))

    def version_at(self, progress: int) -> Version:
        return [item for item in self.versions if item.effective <= progress][-1]

    def decided(self, until: float = math.inf) -> Decided:
        """What the losses below `until` decide."""
        now = self.before
        for at in sorted({*self.losses, *(at for at, _ in self.skips)}):
            if at < until:
                now = self._observe(now, at, self.losses.get(at, math.nan))
        return now

    def _observe(self, now: Decided, at: int, loss: float) -> Decided:
        policy = [item for item in self.versions if item.observes_from <= at][-1].policy
        if policy is None:
            return now
        if policy != now.policy:
            now = replace(now, policy=policy, best=math.inf, bad=0, muted_until=0)
        if at < now.muted_until or not math.isfinite(loss) or self.holds(at):
            return now
        if loss < now.best * (1.0 - 1e-4):
            return replace(now, best=loss, bad=0)
        if now.bad + 1 <= policy["patience"]:
            return replace(now, bad=now.bad + 1)
        shows, factor = at + self.delay, policy["factor"]
        rates, _ = self._values(shows, now.cuts)
        if all(rate - rate * factor <= 1e-8 for rate in rates):
            return replace(now, bad=0)
        cut = Link(shows, ("loss", at), "multiply", factor, 1e-8)
        return replace(now, bad=0, muted_until=shows, cuts=(*now.cuts, cut))

    # The chain of changes.

    def _values(self, progress: int, cuts: Sequence[Link]) -> tuple[list[float], list[float]]:
        links = [item for item in self._ordered(cuts) if item.effective <= progress]
        known: dict[int, tuple[list[float], list[float]]] = {}

        def just_before(index: int) -> tuple[list[float], list[float]]:
            """Return LR and WD where a link takes effect, as they are without it."""
            if index not in known:
                link = links[index]
                met = [
                    item
                    for item in self.versions
                    if item.effective < link.effective
                    or (item.effective == link.effective and item.made < link.key[2])
                ]
                known[index] = after(index, link.effective, met[-1])
            return known[index]

        def after(count: int, at: int, version: Version) -> tuple[list[float], list[float]]:
            """Return LR and WD at a progress after the first `count` links."""
            pairs = version.base(at)
            rates = [rate for rate, _ in pairs]
            decays = [decay for _, decay in pairs if decay is not None]
            begin, undone = version.stage_begin(at), _undone(links[:count])
            is_held = False
            for index, link in enumerate(links[:count]):
                if link.name in undone or (link.effective < begin and link.action != "hold"):
                    continue
                if is_held and link.name[0] == "loss":
                    continue
                if link.action == "hold":
                    rates, decays = just_before(index)
                    is_held = True
                elif link.action == "multiply":
                    wanted = [rate * link.amount for rate in rates]
                    rates = _moved(rates, wanted, link.eps, version.bounds)
                elif link.action == "set":
                    first = just_before(index)[0][0]
                    wanted = [link.amount * (rate / first) for rate in rates]
                    rates = _moved(rates, wanted, link.eps, version.bounds)
                elif link.action == "scale weight decay":
                    decays = [decay * link.amount for decay in decays]
            return rates, decays

        return after(len(links), progress, self.version_at(progress))

    def _ordered(self, cuts: Sequence[Link]) -> list[Link]:
        return sorted((*cuts, *self.made), key=lambda item: item.key)

    def undone(self, progress: float = math.inf) -> set[Name]:
        return _undone([item for item in self.made if item.effective <= progress])

    def holds(self, progress: int) -> tuple[Name, ...]:
        """The holds in force at a progress."""
        undone = self.undone(progress)
        return tuple(
            item.name
            for item in self.made
            if item.action == "hold" and item.effective <= progress and item.name not in undone
        )

    def directives(self, begin: int, last: int) -> list[Link]:
        """What ranks that have values up to and with `last` must know of."""
        return [item for item in self.made if item.asked and begin <= item.effective <= last]

    # What happens to the run.

    def open(self, begin: int) -> None:
        self.losses = {at: loss for at, loss in self.losses.items() if at < begin}
        self.late = {at: loss for at, loss in self.late.items() if at < begin}
        self.skips = {key: loss for key, loss in self.skips.items() if key[0] < begin}
        self.attempt += 1
        self.rewinds.append(begin)
        self.begin = self.frontier = begin
        self.permit = None

    def take_over(self, begin: int, before: Decided) -> None:
        """Open from a saved state whose past is not the log's."""
        self.losses, self.late, self.skips = {}, {}, {}
        self.before, self.origin = before, begin
        self.open(begin)

    def roll_back(self, begin: int, asked: Link) -> None:
        """Open as a directive asks: with a cut, in place of those of earlier rollbacks there."""
        undone = self.undone()
        old = [item for item in self.made if item.is_rollback and item.effective >= begin]
        factor = asked.amount
        for item in old:
            if item.name not in undone:
                factor *= item.amount
        self.made = tuple(item for item in self.made if item not in (*old, asked))
        self.open(begin)
        self._make("multiply", factor, at=begin, is_rollback=True)

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

    def skip(self, at: int, loss: float | None, tries: int) -> str:
        """Take the report of a skipped update: it moves nothing past its own progress."""
        if at < self.frontier or (at, tries) in self.skips:
            return "REPEATED"
        self.skips[at, tries] = loss
        self.frontier = at
        return "RECORDED"

    def tries(self, at: int) -> int:
        """Skipped updates at a progress."""
        return sum(progress == at for progress, _ in self.skips)

    def waive(self, wanted: int) -> None:
        while wanted >= self.horizon:
            self.frontier += self.delay

    def offer(self, end: int) -> Permit:
        """Let the holder go on alone below `end`; return what it knows then."""
        plan = (self.made, self.decided().cuts, [item.effective for item in self.versions])
        known = self.permit
        if known is None or end > known.end or known.plan != plan:
            end = max(end, known.end if known else 0)
            self.permit = Permit(end, self.horizon, self.count, plan)
        assert self.permit is not None
        return self.permit

    def declare(self, low: int, end: int, offer: Permit) -> None:
        """Take for a fact that the job used values of an offer alone, in [`low`, `end`).

        Losses that would have acted there never came, save those in the offer; what operators did
        after it waits until `end`.
        """

        def waits(count: int, effective: int) -> bool:
            return count > offer.count and low <= effective < end

        until = end - self.delay
        moved = (
            replace(item, effective=end)
            if item.name[0] == "made" and waits(item.name[1], item.effective)
            else item
            for item in self.made
        )
        self.made = tuple(sorted(moved, key=lambda item: item.key))
        self.versions = [
            replace(item, effective=end, observes_from=until)
            if waits(item.made, item.effective)
            else item
            for item in self.versions
        ]
        first = max(self.begin, max(low, offer.horizon) - self.delay)
        if first >= until:
            return
        self.rewinds.append(first)
        for at in [at for at in self.losses if first <= at < until]:
            self.late[at] = self.losses.pop(at)
        self.skips = {key: loss for key, loss in self.skips.items() if not first <= key[0] < until}
        self.frontier = max(self.frontier, until)

    def revise(self, spec: Mapping[str, Any]) -> int:
        effective = self.horizon
        # All tries at one progress are seen by the same policies.
        observes_from = self.frontier + (self.tries(self.frontier) > 0)
        self.count += 1
        self.versions.append(Version(effective, observes_from, spec, self.count))
        return effective

    def adjust(self, action: str, amount: float = 0.0, target: Name | None = None) -> bool:
        """Let an operator change the plan from the horizon on; False: it is so already."""
        at = self.horizon
        targets: tuple[Name, ...] = ()
        if action == "release":
            action, targets = "undo", self.holds(at)
        elif target is not None and target not in self.undone(at):
            targets = (target,)
        if (action == "hold" and self.holds(at)) or (action == "undo" and not targets):
            return False
        self._make(action, amount, at=at, targets=targets)
        return True

    def ask(self, kind: str, factor: float = 0.0) -> None:
        """Let an operator ask the trainers for something."""
        self._make("directive", factor, at=self.horizon, asked=kind)

    def approve(self, factor: float) -> None:
        """Let an operator follow the advice of a plateau policy."""
        self._make("multiply", factor, at=self.horizon, eps=1e-8)

    def _make(self, action: str, amount: float, *, at: int, **fields: Any) -> None:
        self.count += 1
        link = Link(at, ("made", self.count), action, amount, **fields)
        self.made = tuple(sorted((*self.made, link), key=lambda item: item.key))


def _undone(links: Sequence[Link]) -> set[Name]:
    return {name for link in links for name in link.targets}


def _moved(
    rates: Sequence[float], wanted: Sequence[float], eps: float, bounds: tuple[float, float]
) -> list[float]:
    """Return LRs after a change: a cut never raises, a raise never lowers, nor leaves bounds."""
    low, high = bounds
    moved = []
    for old, new in zip(rates, wanted, strict=True):
        held = max(new, low) if new < old else min(new, high)
        moves = old - held > eps if new < old else held - old > eps
        moved.append(held if moves else old)
    return moved
