"""Megatron-LM's param groups: they carry keys and no name, and differ from rank to rank."""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from typing import Any

from lrpilot.client._errors import GroupMismatch, invalid_argument
from lrpilot.client._launch import _process_group

MAIN = "main"
"""Group of the spec that has the scheduler's own values; no param group need be in it."""


@dataclass(frozen=True)
class GroupKeys:
    """What a param group does differently; None: as the scheduler has it.

    Other keys have no effect on LR and WD: lr_mult has had none since Megatron-LM 0.16.
    """

    max_lr: Any = None
    min_lr: Any = None
    start_wd: Any = None
    end_wd: Any = None
    wd_mult: float = 1.0

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "GroupKeys":
        """Read the keys of a param group."""
        found = {field.name: group.get(field.name) for field in fields(cls)}
        return cls(**{name: value for name, value in found.items() if value is not None})

    def within(self, own: "GroupKeys") -> "GroupKeys":
        """Return the same with nothing left open: what is not said is as in `own`."""
        return GroupKeys(
            own.max_lr if self.max_lr is None else self.max_lr,
            own.min_lr if self.min_lr is None else self.min_lr,
            own.start_wd if self.start_wd is None else self.start_wd,
            own.end_wd if self.end_wd is None else self.end_wd,
            self.wd_mult,
        )

    def write(self, group: MutableMapping[str, Any]) -> None:
        """Give a param group these bounds again, where it had them."""
        for name, value in vars(self).items():
            if value is not None and name in group:
                group[name] = value


def read_groups(optimizer: Any) -> list[GroupKeys]:
    """Return the keys of each param group. Raises InvalidArgument."""
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, (list, tuple)):
        raise invalid_argument("optimizer", optimizer, "an object with param_groups")
    return [GroupKeys.of(group) for group in groups]


def of_all_ranks(keys: list[GroupKeys]) -> list[GroupKeys]:
    """Return the keys of the param groups of every rank: pipeline stages have different ones."""
    group = _process_group()
    if group is None or group.size == 1:
        return keys
    return [each for theirs in group.gather(keys) for each in theirs]


class GroupTable:
    """The groups of a spec: those of all param groups of all ranks, the same on every rank."""

    def __init__(self, own: GroupKeys, keys: Iterable[GroupKeys]) -> None:
        """Make one group for each way in which param groups differ from `own`, and one for it."""
        self._own = own
        others = {each.within(own) for each in keys} - {own}
        # WD without the multiplier must be known as well, see `without_multiplier`.
        spans = {(own.start_wd, own.end_wd)}
        spans |= {(each.start_wd, each.end_wd) for each in others if each.wd_mult == 1.0}
        for each in sorted(others, key=_order):
            if (each.start_wd, each.end_wd) not in spans:
                spans.add((each.start_wd, each.end_wd))
                others.add(replace(each, wd_mult=1.0))
        self._names: dict[GroupKeys, str] = {own: MAIN}
        for each in sorted(others, key=_order):
            self._names[each] = self._free_name(_name(each, own))
        self._indices = {each: index for index, each in enumerate(self._names)}

    def _free_name(self, name: str) -> str:
        taken = set(self._names.values())
        number = 2
        free = name
        while free in taken:
            free, number = f"{name}_{number}", number + 1
        return free

    def index(self, keys: GroupKeys) -> int:
        """Return the position of a param group's group in the spec. Raises GroupMismatch."""
        wanted = keys.within(self._own)
        if wanted not in self._indices:
            raise GroupMismatch(
                f"no param group had the keys {vars(wanted)} when the scheduler was made; the run "
                f"has the groups {list(self._names.values())}",
                facts={"groups": list(self._names.values())},
            )
        return self._indices[wanted]

    def name(self, keys: GroupKeys) -> str:
        """Return the name of a param group's group in the spec. Raises GroupMismatch."""
        return list(self._names.values())[self.index(keys)]

    def without_multiplier(self, keys: GroupKeys) -> int:
        """Return the position of a group with this WD before `wd_mult`. Raises GroupMismatch."""
        wanted = keys.within(self._own)
        for each, index in self._indices.items():
            span = (each.start_wd, each.end_wd, each.wd_mult)
            if span == (wanted.start_wd, wanted.end_wd, 1.0):
                return index
        return self.index(keys)

    def spec(self) -> list[dict[str, Any]]:
        """Return the groups as a spec has them: a name, and what differs from the run's own."""
        return [
            {"name": name, **_differences(each, self._own)} for each, name in self._names.items()
        ]


def _order(keys: GroupKeys) -> tuple[Any, ...]:
    return (-keys.wd_mult, -keys.max_lr, -keys.min_lr, keys.start_wd, keys.end_wd)


def _name(keys: GroupKeys, own: GroupKeys) -> str:
    """Return a name that stays the same where a start of the job has other values."""
    words = []
    if (keys.max_lr, keys.min_lr) != (own.max_lr, own.min_lr):
        words.append("own_lr")
    if (keys.start_wd, keys.end_wd) != (own.start_wd, own.end_wd) or keys.wd_mult not in (0.0, 1.0):
        words.append("own_decay")
    if keys.wd_mult == 0.0:
        words.append("no_decay")
    return "_".join(words)


def _differences(keys: GroupKeys, own: GroupKeys) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if keys.max_lr != own.max_lr:
        found["peak"] = keys.max_lr
    if keys.min_lr != own.min_lr:
        found["min"] = keys.min_lr
    if (keys.start_wd, keys.end_wd) != (own.start_wd, own.end_wd):
        found["weight_decay"] = {"start": keys.start_wd, "end": keys.end_wd}
    if keys.wd_mult != 1.0:
        found["weight_decay_multiplier"] = keys.wd_mult
    return found


class NamedOptimizer:
    """An optimizer whose param groups have a name, which none of them is given.

    A name in the param group would go into the checkpoints of the optimizer. The names go by
    position: what is loaded into an optimizer may change the keys that they were told from.
    """

    def __init__(self, optimizer: Any, names: Sequence[str]) -> None:
        self._optimizer = optimizer
        self._names = names

    @property
    def param_groups(self) -> list["_NamedGroup"]:
        """The optimizer's own, each with its name."""
        groups = self._optimizer.param_groups
        # A param group that was added since has none, and is refused.
        return [
            _NamedGroup(group, name)
            for group, name in zip_longest(groups, self._names)
            if group is not None
        ]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class _NamedGroup(MutableMapping[str, Any]):
    """A param group, and a name that is not in it."""

    def __init__(self, group: MutableMapping[str, Any], name: str | None) -> None:
        self._group = group
        self._name = name

    def __getitem__(self, key: str) -> Any:
        return self._name if key == "name" else self._group[key]

    def get(self, key: str, default: Any = None) -> Any:
        # As inherited, save that it asks the param group alone: each step calls it.
        return self._name if key == "name" else self._group.get(key, default)

    def __setitem__(self, key: str, value: Any) -> None:
        self._group[key] = value

    def __delitem__(self, key: str) -> None:
        del self._group[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._group)

    def __len__(self) -> int:
        return len(self._group)
