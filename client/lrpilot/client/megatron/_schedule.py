"""The arguments of Megatron-LM's scheduler, checked, and as a run spec."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lrpilot.client._arguments import text
from lrpilot.client._errors import invalid_argument
from lrpilot.client.megatron._groups import GroupKeys, GroupTable

_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")

_RAMPS = ("constant", "linear", "cosine")

_ANNEALS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda part: 1.0 - part,
    "cosine": lambda part: 0.5 * (math.cos(math.pi * part) + 1.0),
    "exponential": lambda part: 2.0 * math.pow(0.5, part) - 1.0,
    "minus_sqrt": lambda part: 1.0 - math.sqrt(part),
}
"""Share of the way above the minimum that is left, by the part of the anneal that is over."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What Megatron-LM's scheduler is told, by the names of its constructor; lengths in samples."""

    init_lr: float
    max_lr: float
    min_lr: float
    lr_warmup_steps: float
    lr_decay_steps: int
    lr_decay_style: str
    start_wd: float
    end_wd: float
    wd_incr_steps: int
    wd_incr_style: str
    wsd_decay_steps: int | None = None
    lr_wsd_decay_style: str | None = None

    def __post_init__(self) -> None:
        """Check what Megatron-LM checks when a scheduler is made or steps.

        Raises InvalidArgument; the server checks the rest when the run is created.
        """
        for field in fields(self):
            if field.type in (float, int):
                _number(field.name, getattr(self, field.name))
        _style("lr_decay_style", self.lr_decay_style, _STYLES)
        _style("wd_incr_style", self.wd_incr_style, _RAMPS)
        _least("min_lr", self.min_lr, 0.0)
        _least("max_lr", self.max_lr, self.min_lr, " (min_lr)")
        if not self.init_lr <= self.max_lr:
            raise invalid_argument("init_lr", self.init_lr, f"at most {self.max_lr!r} (max_lr)")
        if not self.lr_decay_steps > 0:
            raise invalid_argument("lr_decay_steps", self.lr_decay_steps, "above 0")
        if not 0 <= self.lr_warmup_steps < self.lr_decay_steps:
            allowed = f"from 0 to below {self.lr_decay_steps!r} (lr_decay_steps)"
            raise invalid_argument("lr_warmup_steps", self.lr_warmup_steps, allowed)
        if self.lr_decay_style == "WSD":
            _number("wsd_decay_steps", self.wsd_decay_steps)
            _least("wsd_decay_steps", self.wsd_decay_steps, 0)
            _style("lr_wsd_decay_style", self.lr_wsd_decay_style, tuple(_ANNEALS))
        _least("start_wd", self.start_wd, 0.0)
        _least("end_wd", self.end_wd, self.start_wd, " (start_wd)")
        _least("wd_incr_steps", self.wd_incr_steps, 0)
        if self.wd_incr_style == "constant" and self.start_wd != self.end_wd:
            allowed = f"{self.start_wd!r} (start_wd), since wd_incr_style is constant"
            raise invalid_argument("end_wd", self.end_wd, allowed)

    @property
    def own(self) -> GroupKeys:
        """What holds for a param group without keys."""
        return GroupKeys(self.max_lr, self.min_lr, self.start_wd, self.end_wd)

    def rate_at_start(self, keys: GroupKeys) -> float:
        """Return the LR of a param group at progress 0, before any server was asked."""
        group = keys.within(self.own)
        peak, low = float(group.max_lr), float(group.min_lr)
        if self.lr_warmup_steps > 0:
            return float(self.init_lr)
        if self.lr_decay_style == "constant":
            return peak
        if self.lr_decay_style == "inverse-square-root":
            return max(low, peak)
        return low + self._left_at_start() * (peak - low)

    def decay_at_start(self, keys: GroupKeys) -> float:
        """Return the WD of a param group at progress 0 likewise, without its multiplier."""
        return float(keys.within(self.own).start_wd)

    def _left_at_start(self) -> float:
        anneal = self.wsd_decay_steps or 0
        if self.lr_decay_style != "WSD" or self.lr_decay_steps >= anneal:
            return 1.0
        # The anneal began before the training did.
        return _ANNEALS[str(self.lr_wsd_decay_style)]((anneal - self.lr_decay_steps) / anneal)

    def spec(
        self, table: GroupTable, *, name: str, extras: Mapping[str, Any], delay: int | None
    ) -> dict[str, Any]:
        """Return the run spec with these values, bit for bit, at every progress.

        `extras` are fields of the spec that Megatron-LM has no arguments for; `delay` is the
        delay of the feedback, in samples, where `extras` name none.
        """
        decay: dict[str, Any] = {"style": self.lr_decay_style, "end": self.lr_decay_steps}
        if self.lr_decay_style == "WSD":
            decay = {
                "style": "wsd",
                "end": self.lr_decay_steps,
                "anneal": self.wsd_decay_steps,
                "anneal_style": self.lr_wsd_decay_style,
            }
        ramp = {
            "start": self.start_wd,
            "end": self.end_wd,
            "style": self.wd_incr_style,
            "over": self.wd_incr_steps,
        }
        feedback = {**({} if delay is None else {"delay": delay}), **extras.get("feedback", {})}
        return {
            "name": text("run", name),
            "unit": "samples",
            # Past the longer of the two nothing changes any more, here as there.
            "total": max(self.lr_decay_steps, self.wd_incr_steps),
            "learning_rate": {
                "init": self.init_lr,
                "peak": self.max_lr,
                "min": self.min_lr,
                "warmup": self.lr_warmup_steps,
                "decay": decay,
            },
            "weight_decay": self.end_wd if self.wd_incr_style == "constant" else ramp,
            "groups": table.spec(),
            **extras,
            **({"feedback": feedback} if feedback else {}),
        }

    def check_groups(self, keys: Sequence[GroupKeys]) -> None:
        """Refuse param groups that the schedule cannot serve. Raises InvalidArgument."""
        for at, group in enumerate(each.within(self.own) for each in keys):
            if self.wd_incr_style == "constant" and group.start_wd != group.end_wd:
                raise invalid_argument(
                    f"end_wd of param group {at}",
                    group.end_wd,
                    f"{group.start_wd!r} (start_wd), since wd_incr_style is constant",
                )


def read_extras(policies: Any, feedback: Any, bounds: Any) -> dict[str, Any]:
    """Return the fields of a spec that Megatron-LM has no arguments for, those that are given.

    Raises InvalidArgument; what is in them the server checks when the run is created.
    """
    if not isinstance(policies, (list, tuple)):
        raise invalid_argument("policies", policies, "a list of mappings, each with a kind")
    for name, got in (("feedback", feedback), ("bounds", bounds)):
        if got is not None and not isinstance(got, Mapping):
            raise invalid_argument(name, got, "a mapping")
    fields = {"policies": list(policies), "feedback": feedback, "bounds": bounds}
    return {name: given for name, given in fields.items() if given}


def _number(name: str, got: Any) -> None:
    is_number = hasattr(got, "__float__") and not isinstance(got, (bool, str))
    if not is_number or not math.isfinite(float(got)):
        raise invalid_argument(name, got, "a finite number")


def _least(name: str, got: Any, least: float, why: str = "") -> None:
    if not got >= least:
        raise invalid_argument(name, got, f"at least {least!r}{why}")


def _style(name: str, got: Any, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        raise invalid_argument(name, got, f"one of {', '.join(allowed)}")
