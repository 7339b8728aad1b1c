"""Policies: state machines that read final losses and propose changes to the plan."""

from lrpilot.core.policies._batch_size import BatchSize, BatchSizeSpec, BatchSizeState
from lrpilot.core.policies._decay_on_plateau import (
    DecayOnPlateau,
    DecayOnPlateauSpec,
    DecayOnPlateauState,
)
from lrpilot.core.policies._divergence import Divergence, DivergenceSpec, DivergenceState
from lrpilot.core.policies._greedy import Greedy, GreedySpec, GreedyState
from lrpilot.core.policies._interface import (
    Misfit,
    Mode,
    Observation,
    Phase,
    Policy,
    PolicySpec,
    Quiet,
    Rollback,
    View,
)
from lrpilot.core.policies._nonfinite import Nonfinite, NonfiniteSpec, NonfiniteState
from lrpilot.core.policies._overfit import Overfit, OverfitSpec, OverfitState
from lrpilot.core.policies._plateau import Plateau, PlateauSpec, PlateauState
from lrpilot.core.policies._registry import DETECTORS, POLICIES, Registered, build_policy
from lrpilot.core.policies._slow_convergence import (
    SlowConvergence,
    SlowConvergenceSpec,
    SlowConvergenceState,
)
from lrpilot.core.policies._spike import Spike, SpikeSpec, SpikeState
from lrpilot.core.policies._warmup_guard import WarmupGuard, WarmupGuardSpec, WarmupGuardState

__all__ = [
    "DETECTORS",
    "POLICIES",
    "BatchSize",
    "BatchSizeSpec",
    "BatchSizeState",
    "DecayOnPlateau",
    "DecayOnPlateauSpec",
    "DecayOnPlateauState",
    "Divergence",
    "DivergenceSpec",
    "DivergenceState",
    "Greedy",
    "GreedySpec",
    "GreedyState",
    "Misfit",
    "Mode",
    "Nonfinite",
    "NonfiniteSpec",
    "NonfiniteState",
    "Observation",
    "Overfit",
    "OverfitSpec",
    "OverfitState",
    "Phase",
    "Plateau",
    "PlateauSpec",
    "PlateauState",
    "Policy",
    "PolicySpec",
    "Quiet",
    "Registered",
    "Rollback",
    "SlowConvergence",
    "SlowConvergenceSpec",
    "SlowConvergenceState",
    "Spike",
    "SpikeSpec",
    "SpikeState",
    "View",
    "WarmupGuard",
    "WarmupGuardSpec",
    "WarmupGuardState",
    "build_policy",
]
