"""The state of Megatron-LM's scheduler, under the names that it has had."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lrpilot.client import _timing
from lrpilot.client._arguments import integer
from lrpilot.client._errors import InvalidState, invalid_argument
from lrpilot.client.megatron._schedule import Schedule

_NAMES: Mapping[str, tuple[str, ...]] = {
    "max_lr": ("start_lr", "max_lr"),
    "min_lr": ("min_lr",),
    "lr_warmup_steps": ("warmup_iter", "warmup_steps", "lr_warmup_steps"),
    "lr_decay_steps": ("end_iter", "decay_steps", "lr_decay_steps"),
    "lr_decay_style": ("decay_style", "lr_decay_style"),
    "num_steps": ("num_iters", "num_steps"),
    "start_wd": ("start_wd",),
    "end_wd": ("end_wd",),
    "wd_incr_steps": ("wd_incr_steps",),
    "wd_incr_style": ("wd_incr_style",),
}
"""Keys of a state by argument; of several the first that is there counts, the last is today's."""

_WEIGHT_DECAY = ("start_wd", "end_wd", "wd_incr_steps", "wd_incr_style")
"""Keys that none counts of where the first is missing: older states have no weight decay."""


@dataclass(frozen=True)
class MegatronState:
    """A state read back."""

    num_steps: int
    """Progress, in samples."""
    arguments: Mapping[str, Any]
    """Arguments of the scheduler that saved it, by their present names."""

    @classmethod
    def read(cls, state: Mapping[str, Any]) -> "MegatronState":
        """Read a state; keys that it does not know are passed over. Raises InvalidState."""
        if not isinstance(state, Mapping):
            raise InvalidState(
                f"state: got {type(state).__name__}; allowed: what state_dict() returned"
            )
        known: dict[str, Any] = {}
        for argument, names in _NAMES.items():
            if argument in _WEIGHT_DECAY and "start_wd" not in state:
                continue
            name = next((name for name in names if name in state), None)
            if name is None:
                raise InvalidState(
                    f"state: {names[-1]} is missing; allowed: a state of Megatron-LM's "
                    "OptimizerParamScheduler",
                    facts={"key": names[-1]},
                )
            known[argument] = state[name]
        return cls(
            integer("num_steps", known.pop("num_steps"), 0, _timing.MAX_PROGRESS),
            known,
        )

    def checked(self, schedule: Schedule) -> Schedule:
        """Return the schedule where it equals the state's. Raises InvalidArgument with both."""
        for argument, saved in self.arguments.items():
            got = getattr(schedule, argument)
            if got != saved:
                raise invalid_argument(
                    argument,
                    got,
                    f"{saved!r}, which the checkpoint has; or override_opt_param_scheduler, by "
                    "which the argument wins, or use_checkpoint_opt_param_scheduler, by which the "
                    "checkpoint does",
                )
        return schedule

    def applied(self, schedule: Schedule) -> Schedule:
        """Return the schedule with the state's values in it. Raises InvalidArgument."""
        return replace(schedule, **self.arguments)


def write_state(schedule: Schedule, num_steps: int) -> dict[str, Any]:
    """Return the state as Megatron-LM's own scheduler writes and reads it."""
    saved = {name: getattr(schedule, name) for name in _NAMES if name != "num_steps"}
    return {**saved, "num_steps": num_steps}
