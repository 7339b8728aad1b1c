"""Everything that watches the losses: the policies, and the averages shown to people."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from lrpilot.core._plan import Adjustment, Plan, PlanView, decide
from lrpilot.core._spec import RunSpec, parse_policy
from lrpilot.core.policies import Observation, Policy, PolicySpec, build_policy

NEWEST_WEIGHT = 0.02
"""Weight of the newest loss in the smoothed loss."""


@dataclass(frozen=True, slots=True)
class Watch:
    """One policy and where it stands."""

    spec: PolicySpec
    state: Any
    muted_until: int
    """After its own decision at n a policy observes nothing in (n, n + D)."""


@dataclass(frozen=True, slots=True)
class Observers:
    """State after the first `count` losses; a pure function of them and of the plan."""

    count: int = 0
    watches: tuple[Watch, ...] = ()
    nonfinite: int = 0
    average: float = 0.0
    average_weight: float = 0.0

    @property
    def smoothed_loss(self) -> float | None:
        """Exponential average of the finite losses, bias corrected; None before the first."""
        return self.average / self.average_weight if self.average_weight else None

    def observe(
        self, plan: Plan, progress: int, loss: float, seq: int
    ) -> tuple["Observers", list[Adjustment]]:
        """Return the state after one more loss and what the policies decide on it.

        Adjustments in mode act are added to the plan before the next policy looks at it.
        """
        spec = plan.observing(progress)
        at = progress + spec.delay
        watches = []
        decided = []
        for order, watch in enumerate(self._watching(spec)):
            if watch.spec.mode == "off" or progress < watch.muted_until:
                watches.append(watch)
                continue
            policy = _policy(watch.spec, spec.group_names)
            state, changes = policy.observe(
                watch.state, Observation(progress, loss), PlanView(plan, at)
            )
            for change in changes:
                adjustment = decide(
                    plan,
                    change,
                    order=order,
                    kind=watch.spec.kind,
                    mode=watch.spec.mode,
                    loss_at=progress,
                    at=at,
                    seq=seq,
                )
                decided.append(adjustment)
                if adjustment.mode == "act":
                    plan.adjust(adjustment)
            watches.append(replace(watch, state=state, muted_until=at if changes else 0))
        observers = replace(self, count=self.count + 1, watches=tuple(watches))
        return observers._averaged(loss), decided

    def to_mapping(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return {
            "count": self.count,
            "watches": [
                {
                    "spec": watch.spec.model_dump(mode="json"),
                    "state": _policy(watch.spec, None).encode(watch.state),
                    "muted_until": watch.muted_until,
                }
                for watch in self.watches
            ],
            "nonfinite": self.nonfinite,
            "average": self.average,
            "average_weight": self.average_weight,
        }

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> "Observers":
        """Return the state that `to_mapping` wrote."""
        watches = []
        for item in data["watches"]:
            spec = parse_policy(item["spec"])
            state = _policy(spec, None).decode(item["state"])
            watches.append(Watch(spec, state, item["muted_until"]))
        return cls(
            count=data["count"],
            watches=tuple(watches),
            nonfinite=data["nonfinite"],
            average=float(data["average"]),
            average_weight=float(data["average_weight"]),
        )

    def _watching(self, spec: RunSpec) -> tuple[Watch, ...]:
        """Return the watches for the policies of `spec`; an unchanged policy goes on."""
        if tuple(watch.spec for watch in self.watches) == tuple(spec.policies):
            return self.watches
        left = list(self.watches)
        watches = []
        for policy_spec in spec.policies:
            known = next((watch for watch in left if watch.spec == policy_spec), None)
            if known is None:
                known = Watch(policy_spec, _policy(policy_spec, spec.group_names).initial(), 0)
            else:
                left.remove(known)
            watches.append(known)
        return tuple(watches)

    def _averaged(self, loss: float) -> "Observers":
        if not math.isfinite(loss):
            return replace(self, nonfinite=self.nonfinite + 1)
        return replace(
            self,
            average=(1.0 - NEWEST_WEIGHT) * self.average + NEWEST_WEIGHT * loss,
            average_weight=(1.0 - NEWEST_WEIGHT) * self.average_weight + NEWEST_WEIGHT,
        )


@lru_cache(maxsize=1024)
def _policy(spec: PolicySpec, groups: tuple[str, ...] | None) -> Policy[Any]:
    return build_policy(spec, groups or ("",))
