"""Policies: state machines that read final losses and propose changes to the plan."""

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
from lrpilot.core.policies._plateau import Plateau, PlateauSpec, PlateauState
from lrpilot.core.policies._registry import POLICIES, Registered, build_policy

__all__ = [
    "POLICIES",
    "Misfit",
    "Mode",
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
