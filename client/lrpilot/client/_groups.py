"""The parameter groups of an optimizer: which of the run's groups each is, and writing to them."""

import logging
from collections.abc import Sequence
from typing import Any

from lrpilot.client._capture import CapturedStep, InGraph
from lrpilot.client._errors import GroupMismatch, invalid_argument
from lrpilot.client._values import Values
from lrpilot.v1 import trainer_pb2 as pb

logger = logging.getLogger("lrpilot.client")

OWN = "initial_weight_decay"
"""Key in a param group for its own weight decay, as torch keeps its `initial_lr`: it travels in
the optimizer's checkpoint, where the weight decay in force could be the 0 that a ramp begins at."""


class Groups:
    """The parameter groups of one optimizer.

    Always found anew in the optimizer: its `load_state_dict` replaces their dictionaries.
    """

    def __init__(self, optimizer: Any, wd_in_graph: InGraph = "refuse") -> None:
        if not isinstance(getattr(optimizer, "param_groups", None), (list, tuple)):
            raise invalid_argument("optimizer", optimizer, "an object with param_groups")
        self._optimizer = optimizer
        self._run = ""
        self._names: list[str] = []
        self._has_weight_decay = False
        self._own = [_number(group.get("weight_decay")) for group in optimizer.param_groups]
        """Weight decay of each param group when it was attached, or when it was added."""
        self._plan: list[tuple[int, bool]] = []
        """For each param group the run's group, and whether its weight decay is written."""
        self._written: Values = ()
        """Values of the run's groups that were written last."""
        self._step = CapturedStep(optimizer, wd_in_graph)

    @property
    def param_groups(self) -> Sequence[dict[str, Any]]:
        """Those of the optimizer."""
        groups: Sequence[dict[str, Any]] = self._optimizer.param_groups
        return groups

    def bind(self, run: str, opened: pb.OpenAttemptResponse) -> None:
        """Match the param groups with the run's. Raises GroupMismatch."""
        self._run = run
        self._names = list(opened.groups)
        self._has_weight_decay = opened.has_weight_decay
        self._match()

    def write(self, values: Values) -> None:
        """Write LR and WD into every param group. Raises GroupMismatch, CaptureRefused."""
        groups = self._optimizer.param_groups
        if len(groups) != len(self._plan):
            # add_param_group was called.
            self._match()
        if self._step.may_keep:
            plan = enumerate(self._plan)
            self._step.check(
                self._run, {at: values[index][1] for at, (index, decays) in plan if decays}
            )
        for group, (index, decays) in zip(groups, self._plan, strict=True):
            rate, decay = values[index]
            _put(group, "lr", rate)
            if decays:
                _put(group, "weight_decay", decay)
        self._written = values

    def applied(self) -> Values:
        """Return LR and WD of each param group as the optimizer's step uses them.

        A tensor holds them in its own precision. Nothing is read from a device: what a tensor
        there holds is told from what was written.
        """
        held = []
        for at, group in enumerate(self._optimizer.param_groups[: len(self._plan)]):
            index, decays = self._plan[at]
            rate, decay = self._written[index]
            own = self._own[at]
            used = self._step.kept.get(at)
            if used is None:
                used = _held(group.get("weight_decay"), decay if decays else own)
            held.append((_held(group["lr"], rate), used))
        return tuple(held)

    def applied_by_name(self) -> dict[str, tuple[float, float | None]]:
        """Return what `applied` does for the first param group of each of the run's groups.

        Weight decay is that of the first one which the run's is written to; None: of none.
        """
        found: dict[str, tuple[float, float | None]] = {}
        for (index, decays), (rate, decay) in zip(self._plan, self.applied(), strict=False):
            name = self._names[index]
            first, known = found.get(name, (rate, None))
            found[name] = first, decay if known is None and decays else known
        return found

    def _match(self) -> None:
        groups = self._optimizer.param_groups
        self._own += [_number(group.get("weight_decay")) for group in groups[len(self._own) :]]
        plan = [(index, self._has_weight_decay) for index in self._indices(groups)]
        if self._has_weight_decay:
            without = [at for at, group in enumerate(groups) if group.get("weight_decay") is None]
            kept = [] if self._named else [at for at in range(len(groups)) if self._keeps_zero(at)]
            for at in (*without, *kept):
                plan[at] = (plan[at][0], False)
            if without:
                logger.warning(
                    "run %s: param groups %s have no weight decay; only their LR is written",
                    self._run,
                    without,
                )
            if kept:
                logger.info(
                    "run %s: param groups %s have weight decay 0 of their own and keep it, since "
                    "the spec has no groups",
                    self._run,
                    kept,
                )
        self._plan = plan
        _separate(groups, "lr", [index for index, _ in plan])
        _separate(groups, "weight_decay", plan)

    @property
    def _named(self) -> bool:
        """Whether the spec has groups: the one group of a spec without has no name."""
        return self._names != [""]

    def _indices(self, groups: Any) -> list[int]:
        """Return the run's group of each param group: by name, without names by position."""
        if not self._named:
            return [0] * len(groups)
        names = [group.get("name") for group in groups]
        if all(name is None for name in names) and len(names) == len(self._names):
            return list(range(len(names)))
        if any(name not in self._names for name in names):
            found = [f"#{at} (no name)" if name is None else name for at, name in enumerate(names)]
            raise GroupMismatch(
                f"run {self._run!r} has the groups {self._names}; the optimizer has the param "
                f"groups {found}. Give each param group the name of its group in the spec, or no "
                "param group a name and as many of them, in the same order",
                facts={"run": self._run, "groups": self._names, "param_groups": found},
            )
        missing = [name for name in self._names if name not in names]
        if missing:
            logger.info(
                "run %s: no param group of this rank is in the groups %s", self._run, missing
            )
        return [self._names.index(name) for name in names]

    def _keeps_zero(self, at: int) -> bool:
        group = self._optimizer.param_groups[at]
        attached = self._own[at]
        return attached is not None and group.setdefault(OWN, attached) == 0


def _put(group: Any, key: str, value: Any) -> None:
    held = group.get(key)
    if hasattr(held, "fill_"):
        # Compiled and captured optimizers hold on to the tensor.
        held.fill_(value)
    else:
        group[key] = value


def _number(held: Any) -> Any:
    """Return a tensor as a number, read once before the training: it is written to later."""
    return held.item() if hasattr(held, "fill_") else held


def _held(held: Any, written: Any) -> Any:
    """Return what a param group holds, given what was written to it last."""
    if not hasattr(held, "fill_"):
        return held
    if held.device.type == "cpu":
        return held.item()
    return held.new_full((), written, device="cpu").item()


def _separate(groups: Any, key: str, owners: Sequence[object]) -> None:
    """Give param groups tensors of their own where the values may differ.

    torch hands the one tensor that an optimizer was made with to every param group.
    """
    first: dict[int, object] = {}
    for group, owner in zip(groups, owners, strict=True):
        held = group.get(key)
        if hasattr(held, "fill_") and first.setdefault(id(held), owner) != owner:
            group[key] = held.clone()
