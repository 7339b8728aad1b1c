"""Policies: state machines that read final losses and propose changes to the plan."""

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
from lrpilot.core.policies._plateau import Plateau, PlateauSpec, PlateauState
from lrpilot.core.policies._registry import POLICIES, Registered, build_policy

__all__ = [
    "POLICIES",
    "Greedy",
    "GreedySpec",
    "GreedyState",
    "Misfit",
    "Mode",
    "Nonfinite",
    "NonfiniteSpec",
    "NonfiniteState",
    "Observation",
    "Phase",
    "Plateau",
    "PlateauSpec",
    "PlateauState",
    "Policy",
    "PolicySpec",
    "Quiet",
    "Registered",
    "Rollback",
    "View",
    "build_policy",
]
