"""Which policies there are. A new one is a file of its own and a line here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrpilot.core.policies._greedy import Greedy, GreedySpec
from lrpilot.core.policies._interface import Policy, PolicySpec
from lrpilot.core.policies._nonfinite import Nonfinite, NonfiniteSpec
from lrpilot.core.policies._plateau import Plateau, PlateauSpec


@dataclass(frozen=True, slots=True)
class Registered:
    """A policy's fields and how it is built from them."""

    spec: type[PolicySpec]
    build: Callable[[Any, int], Policy[Any]]
    """Takes the spec, of the type above, and the number of groups."""


POLICIES: Mapping[str, Registered] = {
    Nonfinite.kind: Registered(NonfiniteSpec, Nonfinite),
    Plateau.kind: Registered(PlateauSpec, Plateau),
    Greedy.kind: Registered(GreedySpec, Greedy),
}
"""By kind."""


def build_policy(spec: PolicySpec, groups: Sequence[str]) -> Policy[Any]:
    """Return the policy that `spec` describes, for a run with these groups in this order."""
    return POLICIES[spec.kind].build(spec, len(groups))
