"""What a policy is: a deterministic state machine that reads final losses and proposes changes.

A policy knows nothing of clocks, logs, attempts or bounds. Its state is a frozen value; the
plan keeps it, saves it through `encode`, and hands it back with the next observation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

from lrpilot.core._changes import Change
from lrpilot.core._fields import SpecModel, one_of

Mode = Literal["act", "advise", "off"]

Quiet = Literal["hold", "dip", "stage change", "warmup", "stable phase"]
"""Times in which some policies observe nothing: LR and WD are held; a curve of a policy (a spike's
cut, hold and rewarm) is under way; a stage after the first began, and its warmup, or one delay
where that is longer, is not over; the first stage warms up; the stable phase of `wsd`."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What became final at one progress."""

    progress: int
    """Progress n at which the forward pass ran, in the run's unit."""
    loss: float | None
    """The loss there; it may be NaN or infinite. None: only other metrics were reported."""
    validation: Mapping[str, float] = field(default_factory=dict)
    """Validation losses by name, each of them perhaps NaN or infinite."""
    gradient_norm: float | None = None
    batch: int | None = None
    """Global batch size in samples, where it was reported."""
    is_skipped: bool = False
    """The optimizer refused the update: the progress does not advance, and the same n comes again.
    Only a policy with `reads_skipped` gets such an observation."""
    tries: int = 0
    """Number of skipped updates at this progress before this one."""
    left_out: int = 0
    """Non-finite losses that the mean over several reporters leaves out."""

    @property
    def is_plain(self) -> bool:
        """Whether there is a loss and nothing else."""
        return (
            self.loss is not None
            and not self.validation
            and self.gradient_norm is None
            and self.batch is None
            and not (self.is_skipped or self.tries or self.left_out)
        )

    def metric(self, name: str) -> float | None:
        """Return the loss, or the validation loss of that name; None where there is none."""
        return self.loss if name == "loss" else self.validation.get(name)


@dataclass(frozen=True, slots=True)
class Phase:
    """Where in the base schedule a progress lies."""

    stage: str
    """Name of the stage; empty for a run without stages."""
    index: int
    """Position of the stage, 0 for the first."""
    name: Literal["warmup", "constant", "stable", "decay", "ended"]
    """`stable`: between warmup and anneal of `wsd`; `ended`: past the end of the decay."""
    begin: int
    """First progress of the stage."""
    warmup_end: float
    """Progress at which its warmup ends; `begin` where it has none."""
    decay_begin: float
    """Progress at which the LR starts down; `end` where it does not."""
    end: int
    """Progress at which its decay ends, or the stage."""


@dataclass(frozen=True, slots=True)
class Rollback:
    """An attempt that was opened to undo damage."""

    begin: int
    """Progress at which it opened."""
    before: int
    """Progress at which the damage was said to begin."""
    decided_at: int
    """Progress of the loss that asked for it."""
    factor: float
    """What the LR was multiplied by from `begin` on."""


class View(Protocol):
    """What a policy sees of the plan; one LR or WD per group, in spec order.

    Each costs something: read it only where it is needed.
    """

    @property
    def at(self) -> int:
        """The progress n + D at which a proposal shows."""

    @property
    def base(self) -> tuple[float, ...]:
        """LR at `at` without adjustments."""

    @property
    def adjusted(self) -> tuple[float, ...]:
        """LR at `at` with the adjustments decided so far."""

    @property
    def weight_decay(self) -> tuple[float, ...] | None:
        """WD at `at` with the adjustments decided so far; None where the run sets none."""

    @property
    def peak(self) -> tuple[float, ...]:
        """Peak of the base LR in the stage that holds `at`."""

    @property
    def phase(self) -> Phase:
        """Where in the base schedule n lies."""

    @property
    def total(self) -> int:
        """Planned length of the run."""


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

    @property
    def quiet(self) -> frozenset[Quiet]:
        """When the policy observes nothing; see the table in docs/policies.md."""
        return frozenset()

    def misfits(self, group_names: Sequence[str]) -> tuple[Misfit, ...]:
        """Return what does not fit the run's groups; a policy with nothing to check keeps this."""
        del group_names
        return ()


StateT = TypeVar("StateT")


class Policy(Protocol[StateT]):
    """A policy with its settings; it holds no state of its own."""

    kind: ClassVar[str]
    reads_skipped: ClassVar[bool]
    """Whether it also gets observations of skipped updates."""
    counts_bad: ClassVar[str]
    """Field of the state that counts what speaks for acting, in a row, such as reports without
    improvement or means that are too high; empty: none does."""

    def initial(self) -> StateT:
        """Return the state before the first loss, of the run or of a stage."""

    def observe(
        self, state: StateT, observation: Observation, view: View
    ) -> tuple[StateT, tuple[Change, ...]]:
        """Return the state after an observation, and what the policy proposes from `view.at` on.

        Called in order of progress, save while the policy is quiet, and not between a proposal at n
        (other than a note) and n + D. Proposals of the mode `advise` come to the same state.
        """

    def encode(self, state: StateT) -> dict[str, Any]:
        """Return the state as a plain mapping; its floats may be infinite or NaN."""

    def decode(self, data: Mapping[str, Any]) -> StateT:
        """Return the state that `encode` wrote; raises InvalidState if it is none.

        Non-finite floats may come back as the strings "nan", "inf" and "-inf", tuples as lists.
        """
