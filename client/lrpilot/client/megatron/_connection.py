"""Where the run of a scheduler is, and what of it Megatron-LM knows."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lrpilot.client._launch import _process_group
from lrpilot.client._pilot import Pilot, connect

DELAY_STEPS = 32
"""Steps that a loss takes to act where the spec says nothing: a delay in samples is easily less
than one step."""


@dataclass(frozen=True)
class Connection:
    """Where the run of a scheduler is, and what Megatron-LM has no arguments for."""

    address: str
    """HOST:PORT of the server, as for `lrpilot.connect`."""
    run: str
    """Name of the run."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the spec beside the schedule: policies, feedback, bounds."""
    resume_at: int | None = None
    """Progress in samples to begin at where no state is loaded, or one that another run saved;
    None: 0, without losses."""
    on_change: Literal["refuse", "revise"] = "refuse"
    """What to do where the spec of a known run differs and no flag for checkpoints says so."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Other arguments of `lrpilot.connect`."""

    def open(
        self, spec: Mapping[str, Any], *, begin: int | None, revise: bool, start: int
    ) -> Pilot:
        """Connect to the run; `start` counts how often this process has. Raises as `connect`."""
        options = dict(self.options)
        if options.get("key"):
            # The same key again would join the attempt that this process leaves.
            options["key"] = f"{options['key']}/{start}"
        if options.get("reporter") is None:
            options["reporter"] = _last_stage()
        return connect(
            self.address,
            run=self.run,
            spec=spec,
            on_change="revise" if revise else self.on_change,
            resume_at=begin,
            **options,
        )


def _last_stage() -> int:
    """Return the global rank that has the loss: the first of the last pipeline stage."""
    state: Any = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return 0
    group = _process_group()
    if group is None:
        return int(state.get_pipeline_model_parallel_last_rank())
    return int(group.from_first(state.get_pipeline_model_parallel_last_rank))


def usual_delay() -> int | None:
    """Return the delay of some steps in samples, where Megatron-LM knows its batch size."""
    module: Any = sys.modules.get("megatron.core.num_microbatches_calculator")
    calculator = getattr(module, "_GLOBAL_NUM_MICROBATCHES_CALCULATOR", None)
    # While batches grow, the current size is not the one that they grow to.
    batch = getattr(calculator, "global_batch_size", None) or getattr(
        calculator, "current_global_batch_size", None
    )
    return DELAY_STEPS * batch if batch else None
