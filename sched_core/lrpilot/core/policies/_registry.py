"""Which policies there are. A new one is a file of its own and a line here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrpilot.core.policies._batch_size import BatchSize, BatchSizeSpec
from lrpilot.core.policies._decay_on_plateau import DecayOnPlateau, DecayOnPlateauSpec
from lrpilot.core.policies._divergence import Divergence, DivergenceSpec
from lrpilot.core.policies._greedy import Greedy, GreedySpec
from lrpilot.core.policies._interface import Policy, PolicySpec
from lrpilot.core.policies._nonfinite import Nonfinite, NonfiniteSpec
from lrpilot.core.policies._overfit import Overfit, OverfitSpec
from lrpilot.core.policies._plateau import Plateau, PlateauSpec
from lrpilot.core.policies._slow_convergence import SlowConvergence, SlowConvergenceSpec
from lrpilot.core.policies._spike import Spike, SpikeSpec
from lrpilot.core.policies._warmup_guard import WarmupGuard, WarmupGuardSpec


@dataclass(frozen=True, slots=True)
class Registered:
    """A policy's fields and how it is built from them."""

    spec: type[PolicySpec]
    build: Callable[[Any, int], Policy[Any]]
    """Takes the spec, of the type above, and the number of groups."""


POLICIES: Mapping[str, Registered] = {
    Nonfinite.kind: Registered(NonfiniteSpec, Nonfinite),
    Spike.kind: Registered(SpikeSpec, Spike),
    Divergence.kind: Registered(DivergenceSpec, Divergence),
    WarmupGuard.kind: Registered(WarmupGuardSpec, WarmupGuard),
    Plateau.kind: Registered(PlateauSpec, Plateau),
    Greedy.kind: Registered(GreedySpec, Greedy),
    DecayOnPlateau.kind: Registered(DecayOnPlateauSpec, DecayOnPlateau),
    SlowConvergence.kind: Registered(SlowConvergenceSpec, SlowConvergence),
    Overfit.kind: Registered(OverfitSpec, Overfit),
    BatchSize.kind: Registered(BatchSizeSpec, BatchSize),
}
"""By kind."""

DETECTORS: tuple[PolicySpec, ...] = (SpikeSpec(), DivergenceSpec())
"""Policies that watch every run in mode advise, unless its spec names them."""


def build_policy(spec: PolicySpec, groups: Sequence[str]) -> Policy[Any]:
    """Return the policy that `spec` describes, for a run with these groups in this order."""
    return POLICIES[spec.kind].build(spec, len(groups))
