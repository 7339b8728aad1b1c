"""Policies: state machines that read final losses and propose changes to the plan."""

from lrpilot.core.policies._interface import (
    Misfit,
    Mode,
    Multiply,
    Observation,
    Policy,
    PolicySpec,
    View,
)
from lrpilot.core.policies._plateau import Plateau, PlateauSpec, PlateauState
from lrpilot.core.policies._registry import POLICIES, Registered, build_policy

__all__ = [
    "POLICIES",
    "Misfit",
    "Mode",
    "Multiply",
    "Observation",
    "Plateau",
    "PlateauSpec",
    "PlateauState",
    "Policy",
    "PolicySpec",
    "Registered",
    "View",
    "build_policy",
]
