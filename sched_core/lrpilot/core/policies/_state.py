"""How the frozen state of a policy becomes plain data and comes back."""

from collections.abc import Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, ClassVar, Generic, TypeVar, get_args, get_origin, get_type_hints

from lrpilot.core._errors import InvalidState

StateT = TypeVar("StateT")


class Stateful(Generic[StateT]):
    """What policies share: a frozen dataclass as state, and its two directions.

    A state's fields are ints from 0 on, floats, bools, strings, tuples of these, or None where the
    annotation says so.
    """

    kind: ClassVar[str]
    reads_skipped: ClassVar[bool] = False
    counts_bad: ClassVar[str] = ""
    state_type: ClassVar[type[Any]]

    def encode(self, state: StateT) -> dict[str, Any]:
        """Return the state as a plain mapping."""
        return {item.name: getattr(state, item.name) for item in fields(self.state_type)}

    def decode(self, data: Mapping[str, Any]) -> StateT:
        """Return the state that `encode` wrote; raises InvalidState if it is none."""
        try:
            hints = get_type_hints(self.state_type)
            values = {
                item.name: _read(hints[item.name], data[item.name])
                for item in fields(self.state_type)
            }
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InvalidState(f"not the state of a {self.kind} policy: {data!r}") from error
        state: StateT = self.state_type(**values)
        return state


def _read(hint: Any, value: Any) -> Any:
    if get_origin(hint) is UnionType:
        if value is None:
            return None
        (hint,) = (item for item in get_args(hint) if item is not type(None))
    if get_origin(hint) is tuple:
        (item_hint, _) = get_args(hint)
        return tuple(_read(item_hint, item) for item in value)
    if hint is float:
        return float(value)
    if type(value) is not hint or (hint is int and value < 0):
        raise ValueError(f"{value!r} is no {hint}")
    return value
