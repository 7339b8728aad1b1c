"""What a policy is: a deterministic state machine that reads final losses and proposes changes.

A policy knows nothing of clocks, logs, attempts or bounds. Its state is a frozen value; the
plan keeps it, saves it through `encode`, and hands it back with the next final loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

from lrpilot.core._fields import SpecModel, one_of

Mode = Literal["act", "advise", "off"]


@dataclass(frozen=True, slots=True)
class Observation:
    """A final loss."""

    progress: int
    """Progress n at which the forward pass ran, in the run's unit."""
    loss: float
    """The loss there; it may be NaN or infinite."""


class View(Protocol):
    """What a policy sees of the plan, one LR per group in spec order."""

    @property
    def at(self) -> int:
        """The progress n + D at which a proposal shows."""

    @property
    def base(self) -> tuple[float, ...]:
        """LR at `at` without adjustments."""

    @property
    def adjusted(self) -> tuple[float, ...]:
        """LR at `at` with the adjustments decided so far."""


@dataclass(frozen=True, slots=True)
class Multiply:
    """A proposal to multiply every group's LR from `View.at` on.

    Down (factor < 1): `x' = max(x * factor, min_lr)` if `x - x' > eps`, else `x`; up is
    mirrored with `max_lr`.
    """

    factor: float
    min_lr: tuple[float, ...]
    """Floor of each group."""
    max_lr: tuple[float, ...] | None
    """Ceiling of each group; None where the proposal only cuts."""
    eps: float
    """A change of at most this is not made."""
    reason: str
    """Why, as one phrase with the numbers."""


@dataclass(frozen=True, slots=True)
class Misfit:
    """A policy field that does not fit the rest of the spec."""

    field: str
    """Name of the policy's field."""
    got: object
    allowed: str


class PolicySpec(SpecModel):
    """The fields that every policy has."""

    kind: str
    """Which policy."""
    mode: Annotated[Mode, one_of("act", "advise", "off")] = "act"
    """`act` changes the plan, `advise` only records what it would do, `off` does nothing."""

    @property
    def needs_feedback(self) -> bool:
        """Whether the plan cannot go on without the losses that this policy reads."""
        return self.mode == "act"

    def misfits(self, group_names: Sequence[str]) -> tuple[Misfit, ...]:
        """Return what does not fit the run's groups; a policy with nothing to check keeps this."""
        del group_names
        return ()


StateT = TypeVar("StateT")


class Policy(Protocol[StateT]):
    """A policy with its settings; it holds no state of its own."""

    kind: ClassVar[str]

    def initial(self) -> StateT:
        """Return the state before the first loss."""

    def observe(
        self, state: StateT, observation: Observation, view: View
    ) -> tuple[StateT, tuple[Multiply, ...]]:
        """Return the state after a final loss, and what the policy proposes from `view.at` on.

        Called in order of progress. `view` costs something: read it only to propose.
        """

    def encode(self, state: StateT) -> dict[str, Any]:
        """Return the state as a plain mapping; its floats may be infinite or NaN."""

    def decode(self, data: Mapping[str, Any]) -> StateT:
        """Return the state that `encode` wrote; raises InvalidState if it is none.

        Non-finite floats may come back as the strings "nan", "inf" and "-inf".
        """
