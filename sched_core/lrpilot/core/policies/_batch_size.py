"""Scale the LR with the global batch size that the trainers report."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from lrpilot.core._changes import Change, EndOwn, Multiply
from lrpilot.core._errors import InvalidState
from lrpilot.core._fields import count, one_of
from lrpilot.core.policies._interface import Observation, PolicySpec, View
from lrpilot.core.policies._state import Stateful


class BatchSizeSpec(PolicySpec):
    """Fields of the policy that follows the batch size."""

    kind: Annotated[Literal["batch-size"], one_of("batch-size")] = "batch-size"
    scale: Annotated[Literal["sqrt", "linear"], one_of("sqrt", "linear")] = "sqrt"
    """How the LR goes with the batch: `sqrt` for Adam and its kin, `linear` for SGD."""
    reference: Annotated[int | None, count(1)] = None
    """Global batch in samples that the base LR is meant for; default the first one reported."""


@dataclass(frozen=True, slots=True)
class BatchSizeState:
    """What must be kept between reports; everything else follows from the spec."""

    reference: int | None
    """Global batch that the base LR is meant for; None before the first report."""
    current: int | None
    """Global batch that the LR is scaled for."""


class BatchSize(Stateful[BatchSizeState]):
    """Multiplies every group's LR by the root, or the whole, of how much the batch has grown.

    More precisely, on a reported global batch `b`, with the batch `r` that the base LR is meant for
    and the batch `c` that the LR is scaled for, both of them the first one reported unless
    `reference` names `r`:

    1. If `b == c`, nothing.
    2. Else end what this policy did before, where `c != r`; multiply by `sqrt(b / r)`, or by
       `b / r` (linear), where `b != r`; `c = b`.

    So there is one factor at a time: it does not pile up over a ramp, and back at `r` the LR is
    that of the base, to the bit. It goes up and down alike, and only the run's `bounds` limit it.

    A change seen at n shows at n + D, like any other decision: for D the new batch runs at the old
    LR, and of the changes in between only the last one counts. Where a batch ramp is planned, keep
    D well below the length of its steps. A step without a report of the batch changes nothing; a
    loss that is NaN has no part in it. A new stage begins with a new reference, unless one is set.

    The square root is that of Adam and RMSprop: Malladi et al. 2022 (arXiv:2205.10287); the linear
    rule that of SGD: Goyal et al. 2017 (arXiv:1706.02677).

    >>> policy = BatchSize(BatchSizeSpec(), groups=1)
    >>> state = policy.initial()
    >>> for n, batch in enumerate([256, 1024, 1024, 256]):
    ...     state, proposed = policy.observe(state, Observation(n, 2.0, batch=batch), None)
    ...     print([(change.action, getattr(change, "factor", None)) for change in proposed])
    []
    [('end own', None), ('multiply', 2.0)]
    []
    [('end own', None)]
    """

    kind: ClassVar[str] = "batch-size"
    state_type = BatchSizeState

    def __init__(self, spec: BatchSizeSpec, groups: int) -> None:
        del groups  # They are scaled alike.
        self._spec = spec

    def initial(self) -> BatchSizeState:
        """Return the state before the first report."""
        return BatchSizeState(reference=self._spec.reference, current=self._spec.reference)

    def decode(self, data: Mapping[str, Any]) -> BatchSizeState:
        """Return the state that `encode` wrote; raises InvalidState if it is none."""
        state = super().decode(data)
        if (state.reference is None) != (state.current is None) or state.reference == 0:
            raise InvalidState(f"not the state of a {self.kind} policy: {data!r}")
        return state

    def observe(
        self, state: BatchSizeState, observation: Observation, view: View
    ) -> tuple[BatchSizeState, tuple[Change, ...]]:
        """Return the state after a report, and the other factor where the batch changed."""
        del view
        batch = observation.batch
        if batch is None or batch < 1:
            return state, ()
        if state.reference is None or state.current is None:
            return BatchSizeState(batch, batch), ()
        if batch == state.current:
            return state, ()
        reference = state.reference
        reason = f"global batch {batch}, before {state.current}"
        # Always: the stage before may have left a factor that only shows in this one.
        proposed: tuple[Change, ...] = (EndOwn(reason),)
        if batch != reference:
            ratio = batch / reference
            factor, rule = (
                (math.sqrt(ratio), f"sqrt({batch} / {reference})")
                if self._spec.scale == "sqrt"
                else (ratio, f"{batch} / {reference}")
            )
            proposed += (Multiply(factor, f"{reason}: LR times {rule}"),)
        return BatchSizeState(reference, batch), proposed
