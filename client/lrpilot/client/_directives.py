"""Directives: what the server asks of the trainers at one step, the same one on every rank."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lrpilot.client._errors import invalid_argument
from lrpilot.v1 import trainer_pb2 as pb

Kind: TypeAlias = Literal["rollback", "skip", "evaluate", "stop"]

_KINDS: dict[int, Kind] = {
    pb.DIRECTIVE_KIND_ROLLBACK: "rollback",
    pb.DIRECTIVE_KIND_SKIP: "skip",
    pb.DIRECTIVE_KIND_EVALUATE: "evaluate",
    pb.DIRECTIVE_KIND_STOP: "stop",
}


@dataclass(frozen=True)
class Directive:
    """Something that a policy or an operator asks of the trainers."""

    id: str
    kind: str
    """rollback: go back to a state from before `before`, and open a new attempt there. skip: pass
    over the data up to `until`. evaluate: evaluate, and report the validation loss. stop: end the
    training. A newer server may name others."""
    progress: int
    """Progress from which on it is due."""
    reason: str
    """Why, as one phrase with the numbers."""
    before: int = 0
    """rollback: progress at which the damage began."""
    until: int = 0
    """rollback, skip: progress up to which the data is suspect; 0: not said."""
    factor: float = 0.0
    """rollback: what the LR is multiplied by from where the new attempt opens."""


Handler: TypeAlias = Callable[[Directive], object]


def read_directive(sent: pb.Directive) -> Directive:
    """Return a directive as it came."""
    return Directive(
        id=sent.id,
        kind=_KINDS.get(sent.kind, f"kind {sent.kind}"),
        progress=sent.progress,
        reason=sent.reason,
        before=sent.before,
        until=sent.until,
        factor=sent.factor,
    )


class Handlers:
    """The handlers that the training registered, one for each kind."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    def add(self, kind: Kind, handler: Any) -> None:
        """Register a handler. Raises InvalidArgument."""
        if kind not in _KINDS.values():
            raise invalid_argument("kind", kind, ", ".join(map(repr, _KINDS.values())))
        if not callable(handler):
            raise invalid_argument("handler", handler, "a function of one argument")
        if kind in self._handlers:
            raise invalid_argument(
                "handler", handler, f"one for {kind!r}, which has {self._handlers[kind]!r} already"
            )
        self._handlers[kind] = handler

    def get(self, kind: str) -> Handler | None:
        """Return the handler of a kind, or None."""
        return self._handlers.get(kind)
